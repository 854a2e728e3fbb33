"""Measure how good a model is: python evaluate.py --ckpt ckpt/ --text held_out.txt

--text gives the perplexity of text files, per token, and in bits per byte. --tasks gives the
accuracy on tasks: "basics" comes with the package, a .jsonl or .json file is a multiple-choice task
of your own, and any other name is a task of lm-evaluation-harness (`pip install '.[eval]'`).
"""

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import main as cli
from llama_jax.cli.model_flags import add_model_flags, load_llm
from llama_jax.errors import UserError, did_you_mean, first_line, require, whole_number
from llama_jax.files import progress

if TYPE_CHECKING:  # JAX would make --help slow
    from llama_jax.evaluation.perplexity import Perplexity

FOR_TEXT = ("stride", "split_at", "text_key", "errors")
FOR_TASKS = ("limit", "num_fewshot", "include_path", "apply_chat_template")
FOR_HARNESS = ("num_fewshot", "include_path", "apply_chat_template")


def parser() -> cli.Parser:
    """Return the parser of the command's flags."""
    parser = cli.Parser("--text", description=__doc__.splitlines()[0])
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="sequences read together")
    parser.add_argument("--json", action="store_true", help="print an object a line")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--text", action="append", help="text or .jsonl file, or folder; may be repeated"
    )
    text.add_argument(
        "--stride", type=int, default=0, help="tokens from window to window; 0: the context"
    )
    split_help = "documents of text files: auto, none, blank (lines), or a separator line"
    text.add_argument("--split_at", default="auto", help=split_help)
    text.add_argument("--text_key", default="text", help="of the text in JSON objects")
    text.add_argument(
        "--errors", default="strict", choices=("strict", "replace"), help="what is not UTF-8"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", help="names and files, with commas between")
    tasks.add_argument("--limit", type=int, help="items of each task, from its start")
    harness = parser.add_argument_group("tasks of lm-evaluation-harness")
    harness.add_argument("--num_fewshot", type=int, help="solved examples before each question")
    harness.add_argument("--include_path", help="folder with tasks of your own, as YAML")
    harness.add_argument(
        "--apply_chat_template", action="store_true", help="put questions as chat messages"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
      UsageError: for flags out of range, or that do not go together.
      UserError: when the checkpoint, a text or a task cannot be used.
    """
    known = parser()
    flags = known.parse_args(argv)
    require(flags.text or flags.tasks, "nothing to evaluate; add --text FILE or --tasks basics")
    require(not (flags.text and flags.tasks), "--text and --tasks exclude each other; choose one")
    flag, others = ("--text", FOR_TASKS) if flags.text else ("--tasks", FOR_TEXT)
    for name in others:
        unused = f"{flag} does not use --{name}; leave it out"
        require(getattr(flags, name) == known.get_default(name), unused)
    whole_number("batch_size", flags.batch_size, lambda n: n >= 1, "1 or more")
    if flags.text:
        _evaluate_texts(flags)
    else:
        changed = {name for name in FOR_HARNESS if getattr(flags, name) != known.get_default(name)}
        _evaluate_tasks(flags, changed)


# --- perplexity ---


def _evaluate_texts(flags: argparse.Namespace) -> None:
    from llama_jax.data.prepare.documents import (
        ReadOptions,
        ReadProgress,
        find_text_files,
        read_documents,
    )
    from llama_jax.evaluation.perplexity import NOTHING, text_perplexity

    options = ReadOptions(split_at=flags.split_at, text_keys=(flags.text_key,), errors=flags.errors)
    files: list[Path] = []
    for path in map(Path, flags.text):
        require(path.exists(), f"--text={path} does not exist; expected a text file")
        files += find_text_files([path])[0] if path.is_dir() else [path]
    llm = load_llm(flags)
    if not flags.json:
        print("perplexity  bits/byte    loss     tokens      bytes  documents  text")
    total = NOTHING
    for path in files:
        chunks = read_documents(path, options, ReadProgress())
        with progress(f"scoring {path.name}", 0, " tokens") as show:
            found = text_perplexity(llm, chunks, flags.stride, flags.batch_size, show)
        if not found.tokens:
            raise UserError(f"{path} has no text to score; expected two tokens or more")
        _print_perplexity(str(path), found, flags.json)
        total += found
    if len(files) > 1:
        _print_perplexity("total", total, flags.json)


def _print_perplexity(name: str, found: "Perplexity", as_json: bool) -> None:
    if as_json:
        counts = {"documents": found.documents, "tokens": found.tokens, "bytes": found.bytes}
        means = {"loss": found.loss, "perplexity": found.perplexity}
        means |= {"logprob": found.logprob, "bits_per_byte": found.bits_per_byte}
        print(json.dumps({"text": name, **counts, **means}), flush=True)
        return
    figures = f"{found.perplexity:10.4f} {found.bits_per_byte:10.4f} {found.loss:7.4f}"
    print(
        f"{figures} {found.tokens:10,} {found.bytes:10,} {found.documents:10,}  {name}", flush=True
    )


# --- tasks ---


def _evaluate_tasks(flags: argparse.Namespace, for_harness: Collection[str]) -> None:
    from llama_jax.evaluation.multiple_choice import choice_accuracy, read_items, shipped_tasks

    names = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    require(names != [], f"--tasks={flags.tasks} names no task; expected one such as basics")
    if flags.limit is not None:
        whole_number("limit", flags.limit, lambda n: n >= 1, "1 or more")
    shipped = shipped_tasks()
    local = {
        name: shipped.get(name, Path(name))
        for name in names
        if name in shipped or name.endswith((".json", ".jsonl"))
    }
    items = {name: read_items(path)[: flags.limit] for name, path in local.items()}
    others = [name for name in names if name not in local]
    for name in for_harness:
        require(others != [], f"--{name} is for tasks of lm-evaluation-harness; leave it out")
    manager: Any = None
    if others:
        try:
            from llama_jax.evaluation import harness
        except ImportError as error:
            raise UserError(
                f"task {others[0]!r} is unknown; expected {', '.join(shipped)}, a .jsonl file or,"
                " after `pip install '.[eval]'`, a task of lm-evaluation-harness"
                f" ({first_line(error)}){did_you_mean(others[0], shipped)}"
            ) from error
        manager = harness.task_manager(others, list(shipped), flags.include_path)
    llm = load_llm(flags)
    if not flags.json:
        print(f"{'task':24} {'metric':24}    value   stderr")
    for name in local:
        _print_task(name, choice_accuracy(llm, items[name], flags.batch_size), flags.json)
    if others:
        options = harness.HarnessOptions(
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
            apply_chat_template=flags.apply_chat_template,
            batch_size=flags.batch_size,
        )
        for name, figures in harness.evaluate(llm, others, manager, options).items():
            _print_task(name, figures, flags.json)


def _print_task(name: str, figures: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"task": name, **figures}), flush=True)
        return
    for metric, value in figures.items():
        if "_stderr" not in metric and metric != "items":
            stderr = figures.get(f"{metric}_stderr")
            error = "" if stderr is None else f"{stderr:8.4f}"
            print(f"{name:24} {metric:24} {value:8.4f} {error}".rstrip(), flush=True)
