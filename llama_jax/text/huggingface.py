"""Hugging Face tokenizers (tokenizer.json): byte-level BPE, and every other kind the library loads.

Encoding is the `tokenizers` library's, by a copy of the file without its control tokens, so that no
text can become one. Decoding is our own, since the library has no incremental decoder.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import UserError, first_line, shown
from llama_jax.text.decoding import SPACE, Decoder, Tokenizer, require_no_surrogate

ROLE = "role"  # our own key of an added token: "bos" or "eos", which tokenizer.json cannot say
KNOWN_NAMES = {  # in files that say nothing of them, the most specific first
    "bos": ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "<|bos|>", "[BOS]"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eos|>", "[EOS]"),
}
HIDDEN = "\U0010ffff"  # a noncharacter, before the names of control tokens in the encoder
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
LOWEST = -1e9  # score of a piece that no text becomes


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json.

    Tokens added to the vocabulary are found in texts as the library finds them, except those marked
    as special, and BOS and EOS.
    """

    def __init__(self, content: bytes, path: Path) -> None:
        """Load the content of the file at `path`.

        Raises:
          UserError: if it is damaged, or of a kind that the library or `decoder` does not know.
        """
        # Texts come one at a time, often in threads of ours; its own would warn after each fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.path = path
        self.sha256: str = hashlib.sha256(content).hexdigest()
        values = parse_json(content, path)
        self._pieces = pieces(values, path)
        self.vocab_size: int = max(self._pieces) + 1
        roles = special_roles(values, self._pieces)
        self.bos_id: int = roles.get("bos", -1)
        self.eos_id: int = roles.get("eos", -1)
        special = {token["id"] for token in values["added_tokens"] if token.get("special")}
        special |= set(roles.values())
        self.special_ids: Mapping[str, int] = {self._pieces[i]: i for i in sorted(special)}
        self._steps = list(_steps(values.get("decoder")))
        try:
            without = json.dumps(_without_special(values, set(self.special_ids)))
            self._encoder = tokenizers.Tokenizer.from_str(without)
            self._surfaces  # noqa: B018  (refuses an unknown decoder now)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            message = f"tokenizer {path} is damaged or of an unknown kind, {_kinds(values)}"
            advice = "copy it again, or give another"
            raise UserError(f"{message}: {first_line(error)}; {advice}") from error

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Return the ids of a text as int32; see `Tokenizer`.

        Raises:
          UserError: if the text has a character that the vocabulary has no token for, not even
            an unknown one.
        """
        if continues and self._doubles_space:
            text = text.removeprefix(" ")
        require_no_surrogate(text)
        try:
            # A batch releases the GIL, a single text does not.
            encoded = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            message = f"tokenizer {self.path} cannot encode {shown(text)}: {first_line(error)}"
            raise UserError(f"{message}; give another text, or another tokenizer") from error
        return np.array(encoded[0].ids, np.int32)

    def new_decoder(self) -> Decoder:
        """Return an incremental decoder at the start of a text."""
        errors = "replace" if self._is_byte_level else "replace_each_byte"
        return Decoder(self._surfaces, self._drops_space, joins_spaces=False, errors=errors)

    @functools.cached_property
    def _doubles_space(self) -> bool:
        """Whether a space is put before every text, also before one that begins with a space."""
        plain, spaced = self.encode("a"), self.encode(" a")
        return self._pieces[plain[0]].startswith(SPACE) and plain != spaced if plain else False

    @property
    def _is_byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in self._steps)

    @property
    def _drops_space(self) -> bool:
        """Whether a space at the start of a text is not part of it."""
        return not self._steps or any(
            (step["type"] == "Strip" and step.get("start", 0) > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            or step["type"] == "WordPiece"
            for step in self._steps
        )

    @functools.cached_property
    def _surfaces(self) -> list[str | bytes]:
        """What each id adds to a text; see `Decoder`."""
        surfaces: list[str | bytes] = [""] * self.vocab_size
        special = set(self.special_ids.values())
        for token, text in self._pieces.items():
            if token not in special:
                surfaces[token] = self._surface(text)
        return surfaces

    def _surface(self, text: str) -> str | bytes:
        if not self._steps:  # pieces are words
            return SPACE + text
        for step in self._steps:
            match step:
                case {"type": "ByteLevel"}:
                    is_bytes = BYTE_OF_CHARACTER.keys() >= set(text)
                    return bytes(BYTE_OF_CHARACTER[c] for c in text) if is_bytes else text.encode()
                case {"type": "ByteFallback"}:
                    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
                        return bytes([int(text[1:-1], 16)])
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    text = text.replace(old, new)
                case {"type": "Metaspace"}:
                    text = text.replace(step.get("replacement", SPACE), " ")
                case {"type": "WordPiece"}:
                    prefix = step.get("prefix", "##")
                    text = text.removeprefix(prefix) if text.startswith(prefix) else f" {text}"
                case {"type": "BPEDecoder"}:
                    text = text.replace(step.get("suffix", "</w>"), " ")
                case {"type": "Fuse"} | {"type": "Strip", "stop": 0}:
                    pass
                case _:
                    what = f"decodes by {shown(step.get('type'))}"
                    raise UserError(f"tokenizer {self.path} {what}, which is unknown; give another")
        return text.replace(" ", SPACE)


# ---- the content of a file ----


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return the object in a tokenizer.json, with a list of `added_tokens` and a dict `model`.

    Raises:
      UserError: if it is damaged, or another file.
    """
    try:
        values = json.loads(content)
        if ESCAPED_SURROGATE.search(content):  # of a pair, or alone: then it is no text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        message = f"tokenizer {path} is damaged: {first_line(error)}"
        raise UserError(f"{message}; copy it again") from error
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{path} holds no vocabulary; give a tokenizer.json, or a tokenizer.model")
    added = values.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        is_known = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_known or type(token.get("id")) is not int or not 0 <= token["id"] < 2**31:
            raise UserError(
                f"{path}: added_tokens has {shown(token)}; expected an id and a content"
            )
    return values | {"added_tokens": added}


def pieces(values: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Return the text of each id, of the vocabulary and of the added tokens."""
    vocab = values["model"]["vocab"]
    try:
        found = dict(enumerate(text for text, _ in vocab)) if isinstance(vocab, list) else {}
        found |= {token: text for text, token in vocab.items()} if isinstance(vocab, dict) else {}
    except (TypeError, ValueError):
        found = {}
    found |= {token["id"]: token["content"] for token in values["added_tokens"]}
    is_text = all(isinstance(text, str) for text in found.values())
    is_id = all(type(token) is int and 0 <= token < 2**31 for token in found)
    if not (found and is_text and is_id and max(found) < 4 * len(found) + 2**16):
        raise UserError(f"{path}: model.vocab is damaged; copy it again")
    return found


def special_roles(values: Mapping[str, Any], pieces: Mapping[int, str]) -> dict[str, int]:
    """Return the ids of "bos" and "eos", those that exist.

    What the file records counts first, then what its post-processor puts around a text, then names
    that are known.
    """
    ids = {text: token for token, text in pieces.items()}
    roles = {
        role: next((ids[name] for name in names if name in ids), -1)
        for role, names in KNOWN_NAMES.items()
    }
    around = dict(_around(values.get("post_processor")))
    roles |= {role: ids[text] for role, text in around.items() if text in ids}
    roles |= {t[ROLE]: t["id"] for t in values["added_tokens"] if t.get(ROLE) in KNOWN_NAMES}
    return {role: token for role, token in roles.items() if token >= 0}


def adds_bos(values: Mapping[str, Any]) -> bool:
    """Return whether the library puts BOS before a text."""
    return "bos" in dict(_around(values.get("post_processor")))


def _around(processor: Any) -> Iterator[tuple[str, str]]:
    """Yield the roles and texts of the tokens that a post-processor puts around a text."""
    match processor:
        case {"type": "Sequence", "processors": list(parts)}:
            for part in parts:
                yield from _around(part)
        case {"type": "TemplateProcessing", "single": [*steps]}:
            for role, end in (("bos", steps[:1]), ("eos", steps[-1:])):
                match end:
                    case [{"SpecialToken": {"id": str(text)}}]:
                        yield role, text
        case {"cls": [str(first), _], "sep": [str(last), _]}:
            yield from (("bos", first), ("eos", last))


def _kinds(values: Mapping[str, Any]) -> str:
    """Return the types of a file's parts, for messages."""
    parts = {name: values.get(name) for name in ("model", "normalizer", "pre_tokenizer", "decoder")}
    found = {name: part.get("type") for name, part in parts.items() if isinstance(part, dict)}
    return ", ".join(f"{name} {shown(kind)}" for name, kind in found.items())


def _without_special(values: Mapping[str, Any], special: set[str]) -> dict[str, Any]:
    """Return the file without control tokens, truncation and padding.

    Other added tokens go into the vocabulary, which keeps their ids.
    """
    model = dict(values["model"])
    kept = [token for token in values["added_tokens"] if token["content"] not in special]
    special = special - {model.get("unk_token")}  # which the model needs
    for key, value in (("single_word", False), ("lstrip", False), ("rstrip", False)):
        kept = [{key: value} | token for token in kept]

    def hide(text: str) -> str:
        return HIDDEN + text if text in special else text

    if isinstance(model["vocab"], dict):
        vocab = {hide(text): token for text, token in model["vocab"].items()}
        model["vocab"] = vocab | {token["content"]: token["id"] for token in kept}
    else:
        unknown = model.get("unk_id")
        entries = [
            [text if place == unknown else hide(text), score]
            for place, (text, score) in enumerate(model["vocab"])
        ]
        texts = {token["id"]: token["content"] for token in kept}
        size = max([len(entries) - 1, *texts]) + 1
        for place in range(len(entries), size):
            entries.append([texts.get(place, f"{HIDDEN}{place}"), LOWEST])
        model["vocab"] = entries
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, special)]
    model["dropout"] = None  # which would make encoding random
    settings = {"truncation": None, "padding": None, "post_processor": None}
    return {**values, **settings, "added_tokens": kept, "model": model}


def _makes(merge: Any, special: set[str]) -> bool:
    """Return whether a merge uses or makes a control token."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return not special.isdisjoint({*parts, "".join(parts)})


def _steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder."""
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        for step in decoder.get("decoders") or []:
            yield from _steps(step)
    elif isinstance(decoder, dict):
        yield decoder


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary (GPT-2's table).

    Printable bytes stand for themselves, the others are the characters from U+0100 on, in order.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
