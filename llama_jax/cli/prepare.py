"""Tokenize text, or examples to fine-tune on, into a folder to train on.

python prepare.py stories                                  # the embedded corpus
python prepare.py shakespeare --vocab_size 2048            # a 1 MB download
python prepare.py tinystories                              # a 2 GB download
python prepare.py my_texts/ --output data/mine             # your own .txt, .jsonl or .json
python prepare.py a.jsonl b.jsonl --text_key body --output data/both
python prepare.py book.txt --output data/book --tokenizer tokenizer.model
python prepare.py shakespeare --vocab_size 8192 --model_type unigram --save_tokenizer my.model

Examples to fine-tune on are recognised by the keys of their JSON objects: messages, conversations,
prompt and completion, Alpaca's instruction and output, text, or chosen and rejected.

python prepare.py chats.jsonl --tokenizer ckpt/smollm2 --output data/chats
python prepare.py alpaca.json --tokenizer ckpt/llama2 --sequence_length 512 --output data/alpaca
python prepare.py --dataset mine.py:examples --tokenizer ckpt/smollm2 --output data/mine --show 3
"""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from llama_jax.cli import main as cli
from llama_jax.data.prepare.corpora import (
    NAMES,
    STORIES,
    VALIDATION_FRACTION,
    Corpus,
    corpus_from_files,
    named_corpus,
)
from llama_jax.data.prepare.documents import ReadOptions, ReadProgress
from llama_jax.data.prepare.examples import Display, ExampleOptions, prepare_examples
from llama_jax.data.prepare.examples import summary as examples_summary
from llama_jax.data.prepare.records import (
    PARQUET,
    find_records,
    function_records,
    is_example,
    read_records,
)
from llama_jax.data.prepare.tokenize import (
    TokenOptions,
    chosen_tokenizer,
    default_options,
    prepare,
    split_warning,
    summary,
)
from llama_jax.errors import UsageError, UserError, did_you_mean, shown
from llama_jax.files import check_new_path
from llama_jax.formats.vocabulary import NOT_BPE, Vocabulary
from llama_jax.text.chat import TRAIN_ON
from llama_jax.text.chat_formats import NO_TEMPLATE, TEMPLATES, find_template, read_template
from llama_jax.text.sentencepiece import MODEL_TYPES
from llama_jax.text.tokenizer import (
    MODEL,
    Tokenizer,
    load_tokenizer,
    tokenizer_file_name,
    tokenizer_path,
)

OPTION_NAMES = tuple(field.name for field in dataclasses.fields(TokenOptions))
EXAMPLE_OPTION_NAMES = tuple(field.name for field in dataclasses.fields(ExampleOptions))
TUNING_FLAGS = ("chat", "dataset", "train_on", "sequence_length", "overlong", "show")
TEXT_FLAGS = (
    *("split_at", "text_key", "errors", "stories", "eos", "vocab_size", "workers"),
    *("model_type", "save_tokenizer"),
)
RANGES = {  # of the values of flags
    "stories": (1, 10**9),
    "vocab_size": (1, 2**20),
    "shard_tokens": (1, 10**12),
    "workers": (0, 1024),
    "sequence_length": (2, 2**31 - 1),
    "show": (0, 10**9),
}


def main(argv: list[str]) -> None:
    """Run the command and print a summary of the token folder that it writes."""
    given = {"inputs": []} | vars(_parser().parse_args(argv))
    _check(given)
    (_prepare_examples if _are_examples(given) else _prepare_text)(given)


def _prepare_text(given: dict[str, Any]) -> None:
    """Write a folder of text, and print a summary of it."""
    source = given["inputs"][0]
    changes = {name: given[name] for name in OPTION_NAMES if name in given}
    if "tokenizer" in given:
        path, description = _tokenizer(given["tokenizer"])
        if description:  # documents are separated as the model knows it
            is_separated = description.bos or description.eos
            separators = {"bos": description.bos, "eos": description.eos or not is_separated}
            changes = separators | changes
        changes["tokenizer"] = str(path)
    options = dataclasses.replace(default_options(source), **changes)
    output = Path(given.get("output", Path("data") / source))
    check_new_path(output)
    if options.save_tokenizer:
        check_new_path(Path(options.save_tokenizer))
    if options.tokenizer:  # before any text is read
        _warn_of_limited_exports(chosen_tokenizer(options))
    elif options.model_type != "bpe":
        print(f"warning: {NOT_BPE}", file=sys.stderr)
    corpus = _corpus(given)
    folder = prepare(corpus, output, options)
    for line in (*corpus.notices, *summary(folder)):
        print(line)
    if corpus.validation and (warning := split_warning(folder, corpus.validation)):
        print(f"warning: {warning}", file=sys.stderr)


def _tokenizer(word: str) -> tuple[Path, Any]:
    """Return the tokenizer file that a flag names, and the checkpoint's description or None."""
    from llama_jax.checkpoints.metadata import CONFIG, read_description
    from llama_jax.checkpoints.restore import folder_and_step
    from llama_jax.formats.named_models import checkpoint_path

    folder, _ = folder_and_step(checkpoint_path(word))
    if not (folder / CONFIG).is_file():
        return Path(word), None
    return tokenizer_path(folder), read_description(folder)


def _are_examples(given: dict[str, Any]) -> bool:
    """Return whether the input is of examples to fine-tune on, by the flags or the first record."""
    inputs = given["inputs"]
    if any(flag in given for flag in TUNING_FLAGS):
        return True
    if not inputs or inputs[0] in NAMES or "text_key" in given:
        return False
    with contextlib.suppress(UserError):  # reported when the text is read
        files = find_records(inputs)
        if files[0].suffix.lower() == PARQUET:
            return True
        _, record = next(read_records(files, ReadProgress()), ("", None))
        return is_example(record)
    return False


def _prepare_examples(given: dict[str, Any]) -> None:
    """Write a folder of examples to fine-tune on, and print what was left out."""
    for flag in TEXT_FLAGS:
        if flag in given:
            raise UsageError(f"--{flag} applies to texts, not to examples; leave it out")
    if "tokenizer" not in given:
        raise UsageError("--tokenizer is missing; name the checkpoint folder that will be tuned")
    output = Path(given["output"])
    check_new_path(output)
    path, description = _tokenizer(given["tokenizer"])
    tokenizer = load_tokenizer(path)
    chat = read_template(given["chat"], "--chat ") if "chat" in given else ""
    changes = {name: given[name] for name in EXAMPLE_OPTION_NAMES if name in given}
    if description:
        recorded = description.chat_template
        chat = chat or recorded * (recorded != NO_TEMPLATE)
        context = description.model.context_length
        changes = {"bos": description.bos, "sequence_length": context} | changes
    options = ExampleOptions(
        template=find_template(chat, "--chat ") if chat else None,
        template_for_instructions="chat" in given,
        **changes,
    )
    state, files = ReadProgress(), list[Path]()
    if dataset := given.get("dataset"):
        records, source = function_records(dataset), f"examples of {dataset}"
    else:
        files = find_records(given["inputs"])
        records, source = read_records(files, state), f"examples of {', '.join(given['inputs'])}"
    display = Display(write=print, count=given.get("show", 0), is_terminal=sys.stdout.isatty())
    folder, report = prepare_examples(
        records,
        output,
        tokenizer,
        options,
        source=source,
        state=state,
        size=sum(file.stat().st_size for file in files),
        display=display if "show" in given else None,
    )
    for line in examples_summary(folder, report):
        print(line)


def _warn_of_limited_exports(tokenizer: Tokenizer) -> None:
    """Warn of a tokenizer that few formats can hold, as SentencePiece's Unigram models."""
    content = tokenizer.path.read_bytes()
    try:
        if tokenizer_file_name(content) == MODEL:
            Vocabulary.from_model(content)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


def _parser() -> cli.Parser:
    """Return the parser of the command's flags; it leaves out those that are not given."""
    parser = cli.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    defaults = TokenOptions()
    names = ", ".join(NAMES)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("inputs", nargs="*", metavar="input", help=f"files and folders, or one of {names}")
    add("--output", help="folder to create; required for your own text (data/INPUT)")
    add(
        "--tokenizer",
        help="tokenizer.model, tokenizer.json or checkpoint folder with the tokenizer to use, in"
        " place of training one",
    )
    vocab_help = f"size of the tokenizer to train ({defaults.vocab_size}; 2048 for stories,"
    add("--vocab_size", type=int, help=f"{vocab_help} shakespeare)")
    type_help = "kind of the tokenizer to train (bpe); only bpe can be exported to all formats"
    add("--model_type", choices=MODEL_TYPES, help=type_help)
    add("--save_tokenizer", metavar="FILE", help="also write the tokenizer that is trained here")
    add(
        "--validation",
        type=float,
        help=f"fraction of the text for validation ({VALIDATION_FRACTION}): the last documents of"
        " one file, or documents from all of several files; of a very long document, its end",
    )
    add(
        "--split_at",
        metavar="TEXT",
        help="document separator in .txt files: a line of this text, `blank` lines, or `none`"
        " (auto: <|endoftext|> if the start of the file has such a line)",
    )
    add("--text_key", metavar="KEY", help="key of the text in JSON objects (text, or story)")
    errors_help = "how to treat bytes that are not UTF-8 (strict)"
    add("--errors", choices=("strict", "replace"), help=errors_help)
    add("--stories", type=int, help=f"training stories of the corpus `stories` ({STORIES})")
    add("--bos", action=switch, help="put BOS before each document (yes)")
    add("--eos", action=switch, help="put EOS after each document (no)")
    add("--shard_tokens", type=int, help=f"tokens per file ({defaults.shard_tokens})")
    add("--workers", type=int, help=f"threads; 0: one per core ({defaults.workers})")
    tuning = parser.add_argument_group("examples to fine-tune on").add_argument
    tuning(
        "--chat",
        metavar="FORMAT",
        help=f"chat format of dialogues: {', '.join(TEMPLATES)}, or a .jinja file (the"
        " checkpoint's; for Alpaca's records alpaca, unless this is set)",
    )
    tuning(
        "--dataset",
        metavar="FILE:FUNCTION",
        help="Python function that yields examples as dicts, in place of input files (examples)",
    )
    tuning(
        "--train_on",
        choices=TRAIN_ON,
        help="tokens in the loss: of all answers and their end tokens, the last one only, or all"
        " tokens (answers)",
    )
    length_help = "longest example, as data.sequence_length (the checkpoint's context; else none)"
    tuning("--sequence_length", type=int, metavar="T", help=length_help)
    tuning(
        "--overlong",
        choices=("drop", "cut"),
        help="what to do with longer ones; only texts, completions and instructions are cut, from"
        " the right (drop)",
    )
    show_help = "print the first N examples with trained tokens marked, and all that is left out"
    tuning("--show", type=int, metavar="N", help=f"{show_help}; then go on")
    return parser


def _check(given: dict[str, Any]) -> None:
    """Raise an error for flags that contradict each other or do not apply to the input."""
    inputs = given["inputs"]
    if "dataset" in given and inputs:
        raise UsageError(f"--dataset takes the place of input files; leave out {inputs[0]}")
    if not inputs and "dataset" not in given:
        raise UsageError("an input is missing; expected files, folders or a corpus, or --dataset")
    source = inputs[0] if inputs else given["dataset"]
    is_named = source in NAMES
    for flag in TUNING_FLAGS:
        if is_named and flag in given:
            raise UsageError(f"--{flag} applies to examples of your own; leave it out for {source}")
    for path in inputs:
        if path in NAMES and len(inputs) > 1:
            raise UsageError(f"{path} is a corpus by itself; prepare it without other inputs")
        if path not in NAMES and not Path(path).exists():
            kinds = f"expected a text file, a folder of them, or one of {', '.join(NAMES)}"
            raise UserError(f"{path} does not exist{did_you_mean(path, NAMES)}; {kinds}")
    if not is_named and not given.get("output"):
        raise UsageError(f"--output is missing; name a folder to create for the tokens of {source}")
    for flag in ("vocab_size", "model_type", "save_tokenizer"):
        if given.get("tokenizer") and flag in given:
            raise UsageError(f"--tokenizer and --{flag} exclude each other; use one of them")
    for flag in ("split_at", "text_key", "errors"):
        if is_named and flag in given:
            raise UsageError(f"--{flag} applies to your own files only; leave it out for {source}")
    if source != "stories" and "stories" in given:
        raise UsageError(
            f"--stories applies to the corpus `stories` only; leave it out for {source}"
        )
    if source == "stories" and "validation" in given:
        raise UsageError(
            "--validation does not apply to `stories`, which has its own; leave it out"
        )
    if not 0 <= given.get("validation", 0) < 1:
        raise UsageError(
            f"--validation {given['validation']} is out of range; expected at least 0, less than 1"
        )
    if not given.get("split_at", "x").strip() or "\n" in given.get("split_at", ""):
        raise UsageError("--split_at needs one line of text; or use `blank` or `none`")
    for flag, (least, most) in RANGES.items():
        if not least <= given.get(flag, least) <= most:
            expected = f"expected {least} to {most}"
            raise UsageError(f"--{flag} {shown(given[flag])} is out of range; {expected}")


def _corpus(given: dict[str, Any]) -> Corpus:
    """Return the corpus that the command line names."""
    inputs = given["inputs"]
    split = {name: given[name] for name in ("validation", "stories") if name in given}
    if inputs[0] in NAMES:
        return named_corpus(inputs[0], **split)
    reading: dict[str, Any] = {
        name: given[name] for name in ("split_at", "errors") if name in given
    }
    if "text_key" in given:
        reading["text_keys"] = (given["text_key"],)
    return corpus_from_files(*inputs, options=ReadOptions(**reading), **split)
