"""Reading the tokenizer of a Hugging Face folder, which several files describe together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.formats.huggingface.tokenizer_json import Added, read_added
from llama_jax.formats.json_files import read_object
from llama_jax.formats.tokenizer_files import USUAL, Named, read_tokenizer_file
from llama_jax.formats.weights import find_file
from llama_jax.text.tokenizer import JSON, MODEL

SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"


def read_tokenizer(folder: Path, given: Path | None, config: Mapping[str, Any], rows: int) -> bytes:
    """Return the content of a tokenizer file, with a piece for each row of the embedding.

    It is a SentencePiece model or a tokenizer.json, and empty if the folder has none and none is
    given.

    Args:
      given: a tokenizer.model, .json or .bin to use instead of the folder's.
      config: the content of config.json.

    Raises:
      UserError: if a file is broken or the sizes do not fit.
    """
    settings_path = find_file(folder, SETTINGS)
    settings = read_object(settings_path) if settings_path else {}
    path = given or find_file(folder, MODEL) or find_file(folder, JSON)
    if path is None:
        return b""
    texts, ids = dict[str, str](), dict[str, int]()
    for role in USUAL:
        text, token = settings.get(f"{role}_token"), config.get(f"{role}_token_id")
        text = text.get("content") if isinstance(text, dict) else text
        token = token[0] if isinstance(token, list) and token else token
        texts |= {role: text} if isinstance(text, str) else {}
        ids |= {role: token} if type(token) is int else {}
    named = Named(added=_added(folder, settings), texts=texts, ids=ids)
    return read_tokenizer_file(path, rows, named)


def _added(folder: Path, settings: Mapping[str, Any]) -> Added:
    """Return the tokens that a folder adds to its tokenizer."""
    listed = settings.get("added_tokens_decoder", {})
    listed = listed if isinstance(listed, dict) else {"": listed}
    entries = [
        {"id": int(key) if key.isdecimal() and len(key) < 10 else key} | entry
        if isinstance(entry, dict)
        else entry
        for key, entry in listed.items()
    ]
    named = read_added(folder / SETTINGS, entries)
    path = find_file(folder, ADDED)
    plain = read_object(path).items() if path else []
    return read_added(folder / ADDED, [{"id": v, "content": k} for k, v in plain]) | named
