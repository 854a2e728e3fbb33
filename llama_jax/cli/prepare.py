"""Turns text into a folder of tokens to train on.

python prepare.py stories                                  # this project's own little corpus
python prepare.py shakespeare --vocab_size 2048            # 1 MB from the internet
python prepare.py tinystories                              # 2 GB from the internet
python prepare.py my_texts/ --output data/mine             # your own .txt, .jsonl or .json
python prepare.py book.txt --output data/book --tokenizer tokenizer.model
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from llama_jax.cli import main as cli
from llama_jax.data.prepare.corpora import NAMES, STORIES, default_options, named_corpus
from llama_jax.data.prepare.corpus import HELD_OUT, Corpus, corpus_from_files
from llama_jax.data.prepare.tokenize import TokenOptions, prepare, summary
from llama_jax.errors import UsageError, UserError, did_you_mean
from llama_jax.files import check_new_path
from llama_jax.text.tokenizer import Tokenizer

OPTION_NAMES = tuple(field.name for field in dataclasses.fields(TokenOptions))


def main(argv: list[str]) -> None:
    """Prepare what the command line asks for, and say what came out."""
    flags = _parser().parse_args(argv)
    given = vars(flags)
    _check(given)
    asked = {name: given[name] for name in OPTION_NAMES if name in given}
    options = dataclasses.replace(default_options(flags.input), **asked)
    output = Path(flags.output or Path("data") / flags.input)
    check_new_path(output)
    if options.tokenizer:
        Tokenizer(options.tokenizer)  # a wrong one is found before any text is read
    corpus = _corpus(given)
    folder = prepare(corpus, output, options)
    for line in (*corpus.notices, *summary(folder)):
        print(line)


def _parser() -> cli.Parser:
    """The flags."""
    defaults = TokenOptions()
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", help=f"a text file, a folder of them, or one of {', '.join(NAMES)}")
    add("--output", default="", help="the new folder; needed for text of your own (data/INPUT)")
    add("--tokenizer", default="", help="a SentencePiece model to use instead of training one")
    vocab_help = f"pieces of the tokenizer to train ({defaults.vocab_size}; less for named corpora)"
    add("--vocab_size", type=int, default=argparse.SUPPRESS, help=vocab_help)
    held_out_help = f"fraction of the documents, the last ones, to hold out ({HELD_OUT})"
    add("--validation", type=float, default=argparse.SUPPRESS, help=held_out_help)
    split_help = "what separates documents in .txt: a line of this text, `blank` lines, or `none`"
    split_help += " (auto: <|endoftext|> if the file's beginning has such a line)"
    add("--split_at", default=argparse.SUPPRESS, metavar="TEXT", help=split_help)
    errors_help = "what to do about text that is no UTF-8 (strict)"
    choices = ("strict", "replace")
    add("--errors", choices=choices, default=argparse.SUPPRESS, help=errors_help)
    stories_help = f"how many stories of the corpus `stories` ({STORIES})"
    add("--stories", type=int, default=argparse.SUPPRESS, help=stories_help)
    switch = argparse.BooleanOptionalAction
    add("--bos", action=switch, default=defaults.bos, help="BOS before each document (yes)")
    add("--eos", action=switch, default=defaults.eos, help="EOS after each document (no)")
    shard_help = f"tokens in a file ({defaults.shard_tokens})"
    add("--shard_tokens", type=int, default=defaults.shard_tokens, help=shard_help)
    add("--workers", type=int, default=defaults.workers, help="threads (0: one for each core)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(given: dict[str, Any]) -> None:
    """Refuse flags that contradict each other or have no meaning for the input."""
    source, is_named = given["input"], given["input"] in NAMES
    if not is_named and not Path(source).exists():
        kinds = f"expected a text file, a folder of them, or one of {', '.join(NAMES)}"
        raise UserError(f"{source} does not exist{did_you_mean(source, NAMES)}; {kinds}")
    if not is_named and not given["output"]:
        raise UsageError(f"--output is missing; say where the tokens of {source} shall be")
    if given["tokenizer"] and "vocab_size" in given:
        raise UsageError("--tokenizer and --vocab_size exclude each other; give one of them")
    for flag in ("split_at", "errors"):
        if is_named and flag in given:
            raise UsageError(f"--{flag} is for files of your own; leave it out for {source}")
    if source != "stories" and "stories" in given:
        raise UsageError(f"--stories is for the corpus `stories`; leave it out for {source}")
    if source == "stories" and "validation" in given:
        raise UsageError("--validation is not for `stories`, which makes its own; leave it out")
    if not 0 <= given.get("validation", 0) < 1:
        raise UsageError(f"--validation {given['validation']} is no fraction; expected 0 to 1")
    if not given.get("split_at", "x").strip() or "\n" in given.get("split_at", ""):
        raise UsageError("--split_at needs one line of text; or use `blank` or `none`")
    for flag, least in (("stories", 1), ("vocab_size", 1), ("shard_tokens", 1), ("workers", 0)):
        if given.get(flag, least) < least:
            raise UsageError(f"--{flag} {given[flag]} is out of range; expected {least} or more")


def _corpus(given: dict[str, Any]) -> Corpus:
    """The corpus that the command line names."""
    options = ("validation", "stories", "split_at", "errors")
    arguments = {name: given[name] for name in options if name in given}
    if given["input"] in NAMES:
        return named_corpus(given["input"], **arguments)
    return corpus_from_files(given["input"], **arguments)
