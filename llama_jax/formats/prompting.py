"""How a model is prompted and sampled, as Hugging Face folders and GGUF files record it.

That is the fields `bos`, `stop_ids`, `chat_template` and `generation` of `Weights`. A folder has
them in tokenizer_config.json, chat_template.jinja, generation_config.json, config.json and
tokenizer.json.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.checkpoints.metadata import SAMPLING
from llama_jax.errors import UserError, warn
from llama_jax.formats.gguf.header import Keys, Value
from llama_jax.formats.json_files import read_object, shown, write_object
from llama_jax.formats.weights import Weights, find_file
from llama_jax.text.chat_formats import NO_TEMPLATE, find_template, template_name
from llama_jax.text.huggingface import adds_bos
from llama_jax.text.jinja_sandbox import MAX_SOURCE
from llama_jax.text.tokenizer import JSON, parse_tokenizer

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
JINJA = "chat_template.jinja"
ADDING_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer")  # classes that do so unless set otherwise


# ---- Hugging Face ----


def read_prompting(folder: Path, config: Mapping[str, Any], tokenizer: bytes) -> dict[str, Any]:
    """Return the fields of `Weights` that say how a folder's model is prompted and sampled.

    Args:
      config: the content of config.json.
      tokenizer: the content of a tokenizer file; empty if there is none.

    Raises:
      UserError: if a file is broken.
    """
    paths = {name: find_file(folder, name) for name in (SETTINGS, GENERATION)}
    settings, generation = ({} if path is None else read_object(path) for path in paths.values())
    special = parse_tokenizer(tokenizer, folder).special_ids if tokenizer else {}
    ids: list[Any] = [special.get(_text(settings.get("eos_token")))]
    for each in (generation, config):
        value = each.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    return {
        "bos": _wants_bos(folder, settings),
        "stop_ids": _valid_ids(ids, config.get("vocab_size", 0)),
        "chat_template": _read_template(folder, settings),
        # As transformers does for folders from before generation_config.json.
        "generation": _read_sampling(folder, generation if paths[GENERATION] else config),
    }


def write_prompting(weights: Weights, folder: Path) -> None:
    """Write generation_config.json, and complete the folder's config.json and tokenizer files."""
    own = weights.stop_ids
    path, sampling = folder / "config.json", dict(weights.generation)
    config = read_object(path)
    if own:
        config["eos_token_id"] = own[0] if len(own) == 1 else list(own)
        write_object(path, config)
    if sampling:
        sampling["do_sample"] = sampling.get("temperature") != 0
        if not sampling["do_sample"]:
            del sampling["temperature"]
    ids = {key: config[key] for key in config if key.endswith("_token_id")}
    write_object(folder / GENERATION, ids | sampling)
    if weights.tokenizer:
        settings = read_object(folder / SETTINGS)
        names = {i: t for t, i in parse_tokenizer(weights.tokenizer, folder).special_ids.items()}
        settings |= {"eos_token": names[own[0]]} if own and own[0] in names else {}
        source = template_source(weights.chat_template)
        settings |= {"chat_template": source} if source else {}
        write_object(folder / SETTINGS, settings)


def template_source(template: str) -> str:
    """Return the Jinja template of a checkpoint's `chat_template`; empty if it has none."""
    return "" if template in ("", NO_TEMPLATE) else find_template(template).source


def _text(token: Any) -> str:
    """Return the text of a token, which may be written with its flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _valid_ids(ids: Iterable[Any], vocab_size: Any) -> tuple[int, ...]:
    size = vocab_size if type(vocab_size) is int else 0
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < size))


def _wants_bos(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether texts begin with BOS, as transformers decides it.

    It reads the post-processor of a tokenizer.json, and `add_bos_token` only where there is none.
    """
    if path := find_file(folder, JSON):
        return adds_bos(read_object(path))
    if isinstance(bos := settings.get("add_bos_token"), bool):
        return bos
    kind = settings.get("tokenizer_class")
    return not isinstance(kind, str) or kind.removesuffix("Fast") in ADDING_BOS


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return a name of ours, or the source of a Jinja template; empty if the folder has none."""
    path = find_file(folder, JINJA)
    if path is not None:
        try:
            with path.open(encoding="utf-8") as file:
                return checked_template(file.read(MAX_SOURCE + 1), path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}; copy it again") from error
    source = settings.get("chat_template") or ""
    if isinstance(source, list):  # templates by name
        named = [each for each in source if isinstance(each, dict)]
        default = [each.get("template") for each in named if each.get("name") == "default"]
        source = default[0] if default else ""
    if not isinstance(source, str):
        where = f"{folder / SETTINGS}: chat_template"
        raise UserError(f"{where} is {shown(source)}; expected a Jinja template")
    return checked_template(source, folder / SETTINGS)


def checked_template(source: str, path: Path) -> str:
    """Return how a checkpoint records a template; warn if it does not parse.

    It is recorded also then: the model can do everything but chat.
    """
    try:
        return source and template_name(source)
    except UserError as error:
        warn(f"{path}: {error}; name another with --template")
        return source


def _read_sampling(folder: Path, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the sampling parameters that a folder recommends; those out of range are skipped."""
    sampling: dict[str, float] = {}
    for name, (kind, least, largest) in SAMPLING.items():
        value = values.get(name)
        is_number = type(value) is int or (kind is float and type(value) is float)
        if value is not None and is_number and least <= value <= largest:
            sampling[name] = value
        elif value is not None:
            warn(f"{folder} recommends {name}={shown(value)}, which is out of range; ignored")
    if values.get("do_sample") is False:
        kept = {"repetition_penalty"} & sampling.keys()
        return {"temperature": 0} | {name: sampling[name] for name in kept}
    return sampling


# ---- GGUF ----

CHAT_TEMPLATE = "tokenizer.chat_template"
STOPS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]


def read_prompting_keys(keys: Keys, vocab_size: int) -> dict[str, Any]:
    """Return the fields of `Weights` that say what ends a text, and the chat template."""
    ids = _valid_ids((keys.get(key, int, -1) for key in STOPS), vocab_size)
    source = keys.get(CHAT_TEMPLATE, str, "")
    return {"stop_ids": ids, "chat_template": checked_template(source, keys.path)}


def prompting_keys(weights: Weights) -> dict[str, Value]:
    """Return the keys that hold the same; at most three stop tokens have one."""
    if len(weights.stop_ids) > len(STOPS):
        warn(f"GGUF holds {len(STOPS)} stop tokens; {len(weights.stop_ids)} end this model's texts")
    keys: dict[str, Value] = {}
    if weights.stop_ids:
        special = parse_tokenizer(weights.tokenizer, Path("the tokenizer")).special_ids.values()
        # The first becomes EOS of the vocabulary, which has to be a control token.
        keys |= zip(STOPS, sorted(weights.stop_ids, key=lambda token: token not in special))
    if source := template_source(weights.chat_template):
        keys[CHAT_TEMPLATE] = source
    return keys
