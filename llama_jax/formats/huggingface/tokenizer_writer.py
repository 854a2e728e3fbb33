"""Writing the tokenizer files of a Hugging Face folder, with which AutoTokenizer encodes as we do.

It encodes as SentencePiece does, except that a control piece written in a text, such as <s>,
becomes that piece. With tokenizers other than Llama 2's there may be other exceptions: user-defined
pieces, and replaced characters with several accents on one letter.
"""

import base64
import json
from pathlib import Path
from typing import Any

from llama_jax.formats import vocabulary as bpe
from llama_jax.formats.byte_level import bos_template
from llama_jax.formats.json_files import write_object
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.decoding import SPACE
from llama_jax.text.huggingface import ROLE, adds_bos, parse_json, pieces, special_roles
from llama_jax.text.tokenizer import JSON, MODEL, tokenizer_file_name

SPECIAL = (Kind.UNKNOWN, Kind.CONTROL)
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
ONE_SPACE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
STRIP = {"type": "Replace", "pattern": {"Regex": "\\A +|[ ▁]+\\z"}, "content": ""}  # not of tabs


def write_tokenizer(content: bytes, bos: bool, context: int, folder: Path) -> None:
    """Write the files of a tokenizer, given the content of its tokenizer.model or tokenizer.json.

    A tokenizer.json is written as it is, except that it puts BOS before texts if `bos` and only
    then; a SentencePiece model is written as a tokenizer.json too.

    Args:
      bos: whether texts begin with BOS.
      context: tokens that the model can take.
    """
    if tokenizer_file_name(content) == JSON:
        values = parse_json(content, folder / JSON)
        added = values["added_tokens"]
        texts = pieces(values, folder / JSON)
        roles = special_roles(values, texts)
        names = {f"{role}_token": texts[token] for role, token in roles.items()}
        plain = [{key: token[key] for key in token if key != ROLE} for token in added]
        changed = values | {"added_tokens": plain}
        if "bos" in roles and bos != adds_bos(values):
            changed["post_processor"] = bos_template(names["bos_token"], roles["bos"], bos)
        if changed != values:
            content = json.dumps(changed, ensure_ascii=False).encode()
        (folder / JSON).write_bytes(content)
        added = plain
    else:
        vocabulary = Vocabulary.from_model(content)
        ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
        ids |= {"unk_token": vocabulary.unknown_id, "pad_token": vocabulary.pad_id}
        names = {name: vocabulary.pieces[token].text for name, token in ids.items() if token >= 0}
        added = _added_tokens(vocabulary)
        (folder / MODEL).write_bytes(content)
        write_object(folder / JSON, to_tokenizer_json(vocabulary, bos))
    settings = {
        # Uses tokenizer.json as it is; LlamaTokenizer would build another one.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "add_bos_token": bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added
        },
        **names,
    }
    write_object(folder / "tokenizer_config.json", settings)
    write_object(folder / "special_tokens_map.json", names)


def to_tokenizer_json(vocabulary: Vocabulary, bos: bool) -> dict[str, Any]:
    """Return the content of tokenizer.json; `bos`: encoded texts begin with BOS."""
    scores = {p.text: p.score for p in vocabulary.pieces if p.kind == Kind.NORMAL}
    start = vocabulary.pieces[vocabulary.bos_id].text if vocabulary.bos_id >= 0 else ""
    has_spaces = any(" " in text for text in scores)  # then older versions cannot read it
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(vocabulary)},
        "pre_tokenizer": None,
        "post_processor": bos_template(start, vocabulary.bos_id, bos) if start else None,
        "decoder": {"type": "Sequence", "decoders": _decoders(vocabulary)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.pieces[vocabulary.unknown_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == Kind.BYTE for piece in vocabulary.pieces),
            "ignore_merges": False,
            "vocab": {_text(piece): token for token, piece in enumerate(vocabulary.pieces)},
            "merges": [list(pair) if has_spaces else " ".join(pair) for pair in bpe.merges(scores)],
        },
    }


def _text(piece: Piece) -> str:
    """Return a piece's text; user-defined ones are found in texts before spaces are replaced."""
    return piece.text.replace(SPACE, " ") if piece.kind == Kind.USER_DEFINED else piece.text


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return the pieces that are found in a text before it is normalized."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": token, "content": _text(piece), **flags, "special": piece.kind in SPECIAL}
        for token, piece in enumerate(vocabulary.pieces)
        if piece.kind in (*SPECIAL, Kind.USER_DEFINED)
    ]


def _normalizers(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if vocabulary.characters:
        table = base64.b64encode(vocabulary.characters).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if vocabulary.joins_spaces:
        steps += [STRIP, ONE_SPACE]
    if vocabulary.adds_space:
        steps.append(PREPEND_SPACE)
    return [*steps, TO_SPACE]


def _decoders(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [*steps, strip] if vocabulary.adds_space else steps
