"""The `Config` of a run: a config file with the `--config.key=value` flags applied to it."""

import dataclasses
import difflib
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import Config
from llama_jax.config_parsing import parse, type_name
from llama_jax.errors import (
    UsageError,
    UserError,
    is_utf16,
    shipped_folder,
    shown,
)

CONFIG_FLAG = re.compile(r"--(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)

ALIASES = {  # other projects' names of settings
    "batch": "data.batch_size",
    "block_size": "data.sequence_length",
    "bs": "data.batch_size",
    "epochs": "optimizer.epochs",
    "num_train_epochs": "optimizer.epochs",
    "grad_accum": "optimizer.accumulation_steps",
    "grad_clip": "optimizer.clip_norm",
    "gradient_accumulation_steps": "optimizer.accumulation_steps",
    "lr": "optimizer.learning_rate",
    "max_grad_norm": "optimizer.clip_norm",
    "max_iters": "optimizer.steps",
    "max_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "max_steps": "optimizer.steps",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "out_dir": "run.checkpoint_dir",
    "output_dir": "run.checkpoint_dir",
    "seq_len": "data.sequence_length",
    "warmup": "optimizer.warmup_steps",
    "wd": "optimizer.weight_decay",
}


def read_config(path: str, words: Sequence[str] = (), *, fetch: bool = False) -> Config:
    """Return the validated `Config` of a file with flags such as `--config.run.seed=1` applied.

    The file is named by its path, or one of the shipped ones by its name, such as 110m.

    With `run.init_from`, the model's settings are those of that checkpoint, but for the flags given
    and its dtype and dropout; without such a folder they are the file's.

    Args:
      fetch: whether `run.init_from` may name a model that is fetched, and has to exist.

    Raises:
      UsageError: as `load_config` does, and for a key that is missing or a value out of range.
      UserError: if that checkpoint cannot be read.
    """
    config = load_config(path, words)
    _shorten_warmup(config, words)
    start = config.get("run", {}).get("init_from", "")
    if isinstance(start, str) and start:
        _take_model(config, start, words, fetch)
    return parse(Config, config, where=path)


def _take_model(config: Any, start: str, words: Sequence[str], fetch: bool) -> None:
    """Replace the settings of a model by those of the checkpoint that a run starts from."""
    from llama_jax.checkpoints.metadata import read_description
    from llama_jax.checkpoints.restore import folder_and_step
    from llama_jax.formats.named_models import find_named

    if fetch and (named := find_named(start)):
        start = config.run.init_from = str(named.checkpoint())
    folder, _ = folder_and_step(start)
    if not fetch and not folder.exists():
        return
    given = {word.partition("=")[0].removeprefix("--config.model.") for word in words}
    theirs = dataclasses.asdict(read_description(folder).model)
    own = {"compute_dtype", "dropout", *given}
    config.model.update({name: value for name, value in theirs.items() if name not in own})


def _shorten_warmup(config: Any, words: Sequence[str]) -> None:
    """Shorten a file's warm-up, with a notice, to a tenth of a run that a flag made shorter."""
    names = {word.partition("=")[0] for word in words}
    if "--config.optimizer.steps" not in names or "--config.optimizer.warmup_steps" in names:
        return
    steps, warmup = config.optimizer.steps, config.optimizer.get("warmup_steps", 0)
    if isinstance(warmup, int) and 0 < steps < warmup:
        config.optimizer.warmup_steps = steps // 10
        print(
            f"notice: the run has {steps} steps, so its warm-up has {steps // 10} instead of"
            f" {warmup}; --config.optimizer.warmup_steps sets another",
            file=sys.stderr,
        )


def load_config(path: str, words: Sequence[str] = ()) -> Any:
    """Return the ConfigDict of a file with flags applied; of several for one key the last counts.

    Flags are written as in absl: `--config.key=value`, `--config.key value` and, for booleans,
    `--config.key` and `--noconfig.key`.

    Raises:
      UsageError: for a file that is missing or broken, an unknown key, a value of the wrong type,
        or a word that is not a flag.
    """
    config = _load(path)
    leaves = dict(_leaves(config))
    words = list(words)
    while words:
        word = words.pop(0)
        flag = CONFIG_FLAG.fullmatch(word)
        if flag is None:
            raise UsageError(_unknown_word(word, leaves))
        key, text = flag["key"], flag["value"]
        if key not in leaves:
            raise _unknown_key(path, key, leaves)
        is_switch = isinstance(leaves[key], bool)
        if flag["no"] and (text is not None or not is_switch):
            raise UsageError(_unknown_word(word, leaves))
        if text is None and not flag["no"] and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif text is None and is_switch:
            text = "false" if flag["no"] else "true"
        elif text is None:
            example = f"--config.{key}={leaves[key]}"
            raise UsageError(f"{word} has no value; expected one, as in {example}")
        config.update_from_flattened_dict({key: _parse_value(key, text, type(leaves[key]))})
    return config


def shipped_configs() -> dict[str, Path]:
    """Return the files of configs/ by name."""
    return {file.stem: file for file in sorted(shipped_folder("configs").glob("*.py"))}


def _find(path: str) -> Path:
    """Return the file of a path, or the shipped config of a name."""
    shipped, here = shipped_configs(), sorted(Path("configs").glob("*.py"))
    if path in shipped or Path(path).is_file():
        return shipped.get(path, Path(path))
    known = {file.stem: str(file) for file in here} | {name: name for name in shipped}
    close = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.65)
    hint = f"; did you mean {known[close[0]]!r}?" if close else ""
    names = ", ".join(shipped)
    raise UsageError(f"--config={path} is not a file; expected one, or a name: {names}{hint}")


def _load(path: str) -> Any:
    """Return the ConfigDict that the `get_config()` of a Python file returns."""
    file = _find(path)
    if is_utf16(file.read_bytes()):
        raise UsageError(f"{path} is UTF-16; convert it to UTF-8")
    try:
        scope = runpy.run_path(str(file))
        if "get_config" not in scope:
            raise UsageError(f"{path} defines no get_config(); see configs/demo.py")
        config = scope["get_config"]()
    except UserError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:  # would end the command, with success if it is 0
        message = f"{path} calls sys.exit({error.code!r}); expected a get_config() that returns"
        raise UsageError(f"{message} a ConfigDict") from error
    except Exception as error:
        raise UsageError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not hasattr(config, "update_from_flattened_dict"):
        raise UsageError(f"{path}: get_config() returns {shown(config)}; expected a ConfigDict")
    return config


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every leaf of a ConfigDict."""
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse_value(key: str, text: str, expected: type) -> Any:
    """Return the value that a flag's text stands for."""
    from absl import flags

    parsers = {bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser}
    try:
        return parsers.get(expected, flags.ArgumentParser)().parse(text)
    except (ValueError, TypeError) as error:
        message = f"config.{key}={shown(text)} has the wrong type; expected {type_name(expected)}"
        raise UsageError(message) from error


def _unknown_word(word: str, leaves: dict[str, Any]) -> str:
    """Return the message about a word that is no flag, with the flags that may be meant."""
    name, equals, value = word.lstrip("-").partition("=")
    if word.endswith(".py") or word in shipped_configs():
        return f"{word!r} is not understood; did you mean --config {word}?"
    meant = [leaf for leaf in leaves if name in (leaf, leaf.split(".")[-1])]
    if ALIASES.get(name) in leaves:
        meant = meant or [ALIASES[name]]
    if not word.startswith("--"):  # `lr=3` may be a key, `lr` may be anything
        meant = (meant or [name if "." in name else f"SECTION.{name}"]) if equals else []
    examples = " or ".join(f"--config.{key}{equals}{value}" for key in meant)
    return f"{word!r} is not understood" + (
        f"; did you mean {examples}?" if meant else "; see --help"
    )


def _unknown_key(path: str, key: str, leaves: dict[str, Any]) -> UsageError:
    """Return the error for a key that a config does not have, with one of a similar name."""
    by_name = {leaf.split(".")[-1]: leaf for leaf in leaves}
    by_name |= {alias: leaf for alias, leaf in ALIASES.items() if leaf in leaves}
    close = difflib.get_close_matches(key.split(".")[-1], by_name, n=1, cutoff=0.65)
    if close:
        return UsageError(f"{path} has no key {key!r}; did you mean {by_name[close[0]]!r}?")
    return UsageError(f"{path} has no key {key!r}", page="config.md")
