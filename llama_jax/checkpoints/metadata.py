"""The `config.json` of a checkpoint folder: of a run, or of a converted model."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from llama_jax.checkpoints.layout import CHECKSUM, json_checksum, with_checksum
from llama_jax.config import Config, LoraConfig, ModelConfig
from llama_jax.config_parsing import parse
from llama_jax.errors import UserError, warn
from llama_jax.quantization import QuantizationConfig

CONFIG = "config.json"
SAMPLING = {  # parameters that a model may recommend: the type, the least, the largest
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 1e-6, 1),
    "repetition_penalty": (float, 1e-6, 100),
}
PROMPTING = ("bos", "eos", "chat_template", "stop_ids", "generation")  # fields of both classes
RUN_KIND, MODEL_KIND, VERSION = "llama_jax run", "llama_jax model", 1


NO_ADAPTERS = LoraConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is needed to load the model of a checkpoint folder, a run's or a converted one."""

    model: ModelConfig
    bos: bool  # documents in training began with BOS
    eos: bool  # they ended with EOS
    quantization: QuantizationConfig | None = None  # how matrices are stored; None: as floats
    # A key of `text.chat_formats.TEMPLATES`, "none", or a Jinja template itself; "": unknown.
    chat_template: str = ""
    stop_ids: tuple[int, ...] = ()  # tokens that end a text; (): the tokenizer's EOS
    generation: dict[str, float] = dataclasses.field(default_factory=dict)  # keys of `SAMPLING`
    lora: LoraConfig = NO_ADAPTERS  # of a run that trained adapters: rank is not 0
    base: str = ""  # and the checkpoint that they are attached to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The config of a run, how its data separate documents, and how its model is prompted."""

    config: Config
    bos: bool
    eos: bool
    chat_template: str = ""  # this and the next as in `Description`
    stop_ids: tuple[int, ...] = ()
    generation: dict[str, float] = dataclasses.field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Return the run that a folder holds.

    Raises:
      UserError: when the folder is missing, holds no run, or its `config.json` is damaged.
    """
    found = _read(folder)
    if isinstance(found, Run):
        return found
    what = f"{folder} holds a converted model, not a run"
    if found is None:
        what = f"{folder / CONFIG} is damaged: it describes no {RUN_KIND}"
    raise UserError(f"{what}; choose another folder with --config.run.checkpoint_dir=…")


def read_description(folder: Path) -> Description:
    """Return the description of the model that a folder holds; errors as for `read_run`."""
    found = _read(folder)
    if found is None:
        raise UserError(f"{folder} has Hugging Face's format; convert it with convert.py")
    if isinstance(found, Run):
        config = found.config
        prompting = {name: getattr(found, name) for name in PROMPTING}
        base = config.run.init_from if config.lora.rank else ""
        return Description(model=config.model, lora=config.lora, base=base, **prompting)
    return found


def write_run(folder: Path, run: Run) -> None:
    """Write the `config.json` of a run."""
    _write(folder / CONFIG, RUN_KIND, run)


def write_description(folder: Path, description: Description) -> None:
    """Write the `config.json` of a converted model."""
    _write(folder / CONFIG, MODEL_KIND, description)


def _read(folder: Path) -> Run | Description | None:
    """Return what a folder's `config.json` describes; None for a model of Hugging Face."""
    path = folder / CONFIG
    if folder.is_file():
        raise UserError(f"{folder} is a file; make a checkpoint folder of it with convert.py")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; expected a checkpoint folder")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run (it has no {CONFIG}); train one with train.py, or convert"
            " another project's weights with convert.py",
            page="models.md",
        )
    try:
        tree = json.loads(path.read_bytes())
        if "model_type" in tree and "kind" not in tree:
            return None
        checksum = tree.pop(CHECKSUM, None)
        found = _parse(tree)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it from a copy") from error
    if checksum is None:
        warn(f"{path} has no checksum: it was edited, or written by an early version")
    elif checksum != json_checksum(tree):
        warn(f"{path} was edited or damaged after it was written; results may differ")
    return found


def _parse(tree: dict[str, Any]) -> Run | Description:
    if tree["version"] != VERSION or tree["kind"] not in (RUN_KIND, MODEL_KIND):
        raise ValueError(f"it describes neither a run nor a model of version {VERSION}")
    template = tree.get("chat_template", "")
    if not isinstance(template, str):
        raise ValueError(f"chat_template={template!r} is not text")
    stop_ids, generation = tree.get("stop_ids", []), tree.get("generation", {})
    if not all(type(token) is int and 0 <= token < 2**31 for token in stop_ids):
        raise ValueError(f"stop_ids={stop_ids!r:.60} are not token ids")
    for name, value in generation.items():
        if name not in SAMPLING or type(value) not in (int, float) or not 0 <= value < 2**31:
            raise ValueError(f"generation.{name}={value!r:.60} is not a sampling parameter")
    prompting: dict[str, Any] = {name: bool(tree[name]) for name in ("bos", "eos")}
    prompting |= {"chat_template": template, "stop_ids": tuple(stop_ids), "generation": generation}
    if tree["kind"] == RUN_KIND:
        return Run(config=parse(Config, tree["config"]), **prompting)
    quantization, base = tree.get("quantization"), tree.get("base", "")
    if not isinstance(base, str):
        raise ValueError(f"base={base!r} is not a path")
    return Description(
        model=parse(ModelConfig, tree["model"], "model."),
        quantization=quantization and parse(QuantizationConfig, quantization, "quantization."),
        lora=parse(LoraConfig, tree.get("lora", {}), "lora."),
        base=base,
        **prompting,
    )


def _write(path: Path, kind: str, content: Run | Description) -> None:
    tree = {"kind": kind, "version": VERSION, **dataclasses.asdict(content)}
    if isinstance(content, Description) and not content.lora.rank:
        del tree["lora"], tree["base"]  # as in earlier versions
    write_atomically(path, (json.dumps(with_checksum(tree), indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that a reader finds the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
