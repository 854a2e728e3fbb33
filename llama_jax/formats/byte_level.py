"""Byte-level BPE vocabularies as the content of a tokenizer.json, and their pre-tokenizers by name.

A pre-tokenizer splits a text into words by regular expressions, one after the other; BPE merges the
bytes within each word. GGUF files name it, and Meta's ranks files have Llama 3's.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.formats.vocabulary import Kind
from llama_jax.text.huggingface import ROLE

# The patterns as Hugging Face's tokenizer.json files have them. llama.cpp spells some differently,
# since its regular expressions know fewer categories of characters.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SYMBOLS}|{LINES}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{SYMBOLS}|{LINES}"
SEED = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START, PATHS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}|{PATHS}|{LINES}"
GPT4O = (
    rf"{START}{UPPER}*{LOWER}+{CONTRACTIONS}?|{START}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{PATHS}|{LINES}"
)
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
CJK = "[一-龥ࠀ-一가-퟿]+"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a text is split, and whether a word that is a piece becomes it without merging."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False  # where a file does not say whether texts begin with BOS


def _named(names: str, *patterns: str, **settings: bool) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(patterns, **settings))


# By GGUF's names. Of those that are equal, the first is written.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 pixtral", LLAMA3, ignore_merges=True, adds_bos=True
    ),
    **_named("smaug-bpe dbrx chatglm-bpe glm4", LLAMA3),
    **_named("gpt-2 mpt olmo phi-2 jais gigachat exaone4 trillion mellum", GPT2),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b", DIGIT, GPT2),
    **_named("qwen2 deepseek-r1-qwen stablelm2 hunyuan grok-2", QWEN2),
    **_named("tekken", TEKKEN, ignore_merges=True, adds_bos=True),
    **_named("gpt-4o llama4", GPT4O),
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **_named("deepseek-coder", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT),
    **_named("seed-coder", SEED),
    **_named("bloom poro-chat gpt3-finnish", BLOOM),
    **_named("viking", BLOOM, DIGIT),
}


def to_json(
    texts: Sequence[str],
    kinds: Sequence[int],
    merges: Sequence[str | Sequence[str]],
    pre_tokenizer: PreTokenizer,
    roles: Mapping[str, int],
    bos: bool,
) -> bytes:
    """Return the content of a tokenizer.json.

    Of equal texts the last is the piece; the others become control tokens that nothing leads to.

    Args:
      texts: of the pieces by id, bytes as GPT-2's characters.
      kinds: of the pieces, numbers of `Kind`.
      merges: pairs of pieces, or such pairs with a space between, the first to be merged first.
      roles: the ids of "bos" and "eos", as far as they exist.
      bos: whether encoded texts begin with BOS.
    """
    last = {text: token for token, text in enumerate(texts)}
    by_token = {token: role for role, token in roles.items()}
    vocab: dict[str, int] = {}
    added = []
    for token, text in enumerate(texts):
        is_repeated = last[text] != token
        name = unused_name(token, last) if is_repeated else text
        is_special = kinds[token] in (Kind.CONTROL, Kind.UNKNOWN) or token in by_token
        if is_repeated or is_special or kinds[token] == Kind.USER_DEFINED:
            entry = added_token(token, name, special=is_repeated or is_special)
            added.append(entry | ({ROLE: by_token[token]} if token in by_token else {}))
        vocab[name] = token
    split, use_regex = _steps(pre_tokenizer.patterns)
    start = texts[roles["bos"]] if bos and "bos" in roles else ""
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*split, _byte_level(use_regex=use_regex)],
        },
        "post_processor": bos_template(start, roles["bos"], bos) if start else None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignore_merges,
            "vocab": vocab,
            "merges": list(merges),
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()


def added_token(token: int, text: str, special: bool) -> dict[str, Any]:
    """Return an entry of `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, **flags, "special": special}


def unused_name(token: int, taken: Mapping[str, Any]) -> str:
    """Return a text for an id that stands for nothing, unlike all others."""
    text = f"<unused_{token}>"
    while text in taken:
        text += "_"
    return text


def patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """Return the patterns of a tokenizer.json's pre-tokenizer; None if it is not such a one."""
    found: list[str] = []
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            pass
        case _:
            steps = [pre_tokenizer]
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
                if step.get("invert"):
                    return None
                found.append(pattern)
            case {"type": "Digits"}:
                found.append(DIGIT if step.get("individual_digits") else DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                if step.get("use_regex", True):
                    found.append(GPT2)
                return tuple(found)
            case _:
                return None
    return None  # without the step that turns bytes into characters


def _steps(patterns: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """Return the steps before ByteLevel, and whether that one splits by GPT-2's pattern."""
    use_regex = patterns[-1] == GPT2
    steps: list[dict[str, Any]] = []
    for pattern in patterns[: len(patterns) - use_regex]:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        digits = {"type": "Digits", "individual_digits": True}
        steps.append(digits if pattern == DIGIT else split | {"invert": False})
    return steps, use_regex


def _byte_level(use_regex: bool) -> dict[str, Any]:
    settings = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **settings}


def bos_template(text: str, token: int, bos: bool) -> dict[str, Any]:
    """Return a post-processor that puts BOS, if `bos`, before a text, or before each of a pair."""

    def after_bos(letter: str, number: int) -> list[dict[str, Any]]:
        sequence = {"Sequence": {"id": letter, "type_id": number}}
        special = {"SpecialToken": {"id": text, "type_id": number}}
        return [special, sequence] if bos else [sequence]

    return {
        "type": "TemplateProcessing",
        "single": after_bos("A", 0),
        "pair": after_bos("A", 0) + after_bos("B", 1),
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }
