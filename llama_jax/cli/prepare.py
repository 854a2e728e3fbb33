"""Tokenize text into a folder to train on.

python prepare.py stories                                  # the embedded corpus
python prepare.py shakespeare --vocab_size 2048            # a 1 MB download
python prepare.py tinystories                              # a 2 GB download
python prepare.py my_texts/ --output data/mine             # your own .txt, .jsonl or .json
python prepare.py a.jsonl b.jsonl --text_key body --output data/both
python prepare.py book.txt --output data/book --tokenizer tokenizer.model
"""

import argparse
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
from llama_jax.data.prepare.documents import ReadOptions
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
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.text.tokenizer import MODEL, Tokenizer, tokenizer_file_name

OPTION_NAMES = tuple(field.name for field in dataclasses.fields(TokenOptions))
LEAST = {"stories": 1, "vocab_size": 1, "shard_tokens": 1, "workers": 0}  # values of flags
MOST = {"stories": 10**9, "vocab_size": 2**20, "shard_tokens": 10**12, "workers": 1024}


def main(argv: list[str]) -> None:
    """Run the command and print a summary of the token folder."""
    given = vars(_parser().parse_args(argv))
    _check(given)
    source = given["inputs"][0]
    changes = {name: given[name] for name in OPTION_NAMES if name in given}
    options = dataclasses.replace(default_options(source), **changes)
    output = Path(given.get("output", Path("data") / source))
    check_new_path(output)
    if options.tokenizer:
        _warn_of_limited_exports(chosen_tokenizer(options))  # before any text is read
    corpus = _corpus(given)
    folder = prepare(corpus, output, options)
    for line in (*corpus.notices, *summary(folder)):
        print(line)
    if corpus.validation and (warning := split_warning(folder, corpus.validation)):
        print(f"warning: {warning}", file=sys.stderr)


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
    add("inputs", nargs="+", metavar="input", help=f"text files and folders, or one of {names}")
    add("--output", help="folder to create; required for your own text (data/INPUT)")
    add("--tokenizer", help="tokenizer.model or tokenizer.json to use instead of training one")
    vocab_help = f"size of the tokenizer to train ({defaults.vocab_size}; 2048 for stories,"
    add("--vocab_size", type=int, help=f"{vocab_help} shakespeare)")
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
    return parser


def _check(given: dict[str, Any]) -> None:
    """Raise an error for flags that contradict each other or do not apply to the input."""
    inputs = given["inputs"]
    source, is_named = inputs[0], inputs[0] in NAMES
    for path in inputs:
        if path in NAMES and len(inputs) > 1:
            raise UsageError(f"{path} is a corpus by itself; prepare it without other inputs")
        if path not in NAMES and not Path(path).exists():
            kinds = f"expected a text file, a folder of them, or one of {', '.join(NAMES)}"
            raise UserError(f"{path} does not exist{did_you_mean(path, NAMES)}; {kinds}")
    if not is_named and not given.get("output"):
        raise UsageError(f"--output is missing; name a folder to create for the tokens of {source}")
    if given.get("tokenizer") and "vocab_size" in given:
        raise UsageError("--tokenizer and --vocab_size exclude each other; use one of them")
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
    for flag, least in LEAST.items():
        if not least <= given.get(flag, least) <= MOST[flag]:
            expected = f"expected {least} to {MOST[flag]}"
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
