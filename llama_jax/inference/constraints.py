"""Constrained output: which tokens keep a text within a JSON schema, a regex or a grammar.

llguidance (https://github.com/guidance-ai/llguidance) follows the grammar byte by byte and says
which tokens may come next. It is imported only where a constraint is used. Nothing here imports
JAX; `inference.sampler` applies the masks.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import UsageError, UserError, first_line, shown
from llama_jax.text.tokenizer import Tokenizer

# Between the tokens of JSON, as in llama.cpp: without a bound a model may never end.
WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
ANY_OBJECT = {"type": "object"}
NO_TEXT = ("NoExtension", "NoExtensionBias")  # llguidance's words
MAX_LENGTH = 200_000  # characters of a schema, regex or grammar


# --- what a caller sets ---


def schema_text(schema: Any) -> str:
    """Return a JSON schema as JSON text.

    Args:
      schema: a mapping, its JSON text, or True for any JSON object.

    Raises:
      UsageError: if it is something else.
    """
    expected = "expected a JSON schema as a mapping or as JSON text, or True for any object"
    if schema is True:
        schema = ANY_OBJECT
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, Mapping):
            return json.dumps(dict(parsed), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"is not JSON: {first_line(error)}"
        raise UsageError(f"json_schema={shown(schema)} {reason}; {expected}") from error
    raise UsageError(f"json_schema={shown(schema)} is not a JSON object; {expected}")


@functools.lru_cache(maxsize=64)
def compile_grammar(kind: str, text: str) -> str:
    """Return a constraint as llguidance's own grammar, a JSON text.

    Args:
      kind: "json_schema", "regex" or "grammar".
      text: JSON of a schema, a regular expression of Rust's `regex`, or a grammar in Lark's syntax
        or in llama.cpp's (GBNF, whose rules have "::=").

    Raises:
      UsageError: if it is too long or llguidance refuses it; with its reason.
      UserError: if llguidance is not installed.
    """
    matcher = _llguidance().LLMatcher
    if len(text) > MAX_LENGTH:
        raise UsageError(f"{kind} has {len(text):,} characters; expected at most {MAX_LENGTH:,}")
    try:
        if kind == "json_schema":
            options = {"whitespace_pattern": WHITESPACE}
            compiled = matcher.grammar_from_json_schema(text, defaults=options)
        elif kind == "regex":
            compiled = matcher.grammar_from_regex(text)
        else:
            compiled = matcher.grammar_from_lark(_in_lark(text))
        problem = matcher.validate_grammar(compiled, limits=_limits())
    except (ValueError, UnicodeEncodeError) as error:
        problem = first_line(error)
    if problem and not problem.startswith("WARNING"):
        raise _refusal(kind, text, problem)
    return compiled


def _in_lark(grammar: str) -> str:
    """Return a grammar in Lark's syntax; raises `ValueError` for one in GBNF with an error."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # it has no class for all of them
        raise ValueError(f"as GBNF: {first_line(error)}") from error


def _refusal(kind: str, text: str, problem: str) -> UsageError:
    """Return the error for a grammar that llguidance refuses, in whose words it is not one line."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    reason = "no text fits it" if reason in NO_TEXT else reason.removeprefix("error: ")[:200]
    return UsageError(f"{kind}={shown(text)} cannot be used: {reason}; change it")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            "json_schema, regex and grammar need the package llguidance; install it with:"
            " pip install llama_jax[serve]"
        ) from error
    return llguidance


def _limits() -> Any:
    return _llguidance().LLParserLimits(verbose_errors=False)


# --- one sequence ---


class Constraint:
    """Which tokens may follow, as a sequence grows.

    Its text, up to the stop token, is one of the grammar's.
    """

    has_ended: bool  # whether the text is complete and only a stop token may follow

    def __init__(
        self,
        kind: str,
        text: str,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        prompt: Sequence[int] = (),
    ) -> None:
        """Start a text.

        Args:
          kind, text: as for `compile_grammar`.
          stop_ids: tokens that end the text; allowed where the grammar allows its end, only there.
          vocab_size: of the model; may differ from the tokenizer's.
          prompt: ids that the text follows.

        Raises:
          UsageError: if the constraint is refused, or no text of the tokenizer's tokens fits it.
        """
        self._vocabulary = _vocabulary(tokenizer)  # type: ignore[arg-type]  # it is hashable
        self._matcher = _first_matcher(kind, text, self._vocabulary).deep_copy()
        self._stops_W = _pack([token for token in stop_ids if 0 <= token < vocab_size], vocab_size)
        # A stop token may also be one of texts; there it would end the text too early.
        texts_W = _pack(slice(min(tokenizer.vocab_size, vocab_size)), vocab_size)
        self._texts_W = texts_W & ~self._stops_W
        self._mask_W = self._next_mask()
        if not self.has_ended and self._vocabulary.drops_space_after(prompt):
            self._mask_W = self._without_dropped_space()

    def mask(self) -> np.ndarray:
        """Return which tokens may follow, uint32 [W]; token i is bit i % 32 of word i // 32."""
        return self._mask_W

    def advance(self, token: int) -> None:
        """Continue the text by a token that is allowed; not by a stop token.

        Raises:
          UserError: if the token is not allowed, no token continues the text, or the grammar has
            become too complex to follow.
        """
        if not self._matcher.consume_token(token):
            raise self._error()
        self._mask_W = self._next_mask()

    def extend(self, tokens: Sequence[int]) -> bool:
        """Continue the text by tokens; return whether it is complete; errors as for `advance`."""
        for token in tokens:
            self.advance(token)
        return self.has_ended

    def _next_mask(self) -> np.ndarray:
        """Return the mask after the tokens so far, and set `has_ended`."""
        found_X = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise self._error()
        end = self._vocabulary.end_id
        may_end = bool(found_X[end // 32] >> np.uint32(end % 32) & 1)
        mask_W = _resize(found_X, len(self._texts_W)) & self._texts_W
        self.has_ended = may_end and not mask_W.any()
        if not (may_end or mask_W.any()):
            raise self._error()
        return mask_W | self._stops_W if may_end else mask_W

    def _without_dropped_space(self) -> np.ndarray:
        """Return the mask of a first token whose space, if any, is part of the text.

        A space that a tokenizer puts before every text is not part of it (see `Decoder`), but as a
        byte it is.
        """
        size, vocabulary = len(self._mask_W), self._vocabulary
        kept_W = self._mask_W & ~_resize(vocabulary.dropped_spaces, size)
        if not kept_W.any():
            kept_W = _resize(vocabulary.kept_spaces, size)
        return kept_W if kept_W.any() else self._mask_W

    def _error(self) -> UserError:
        problem = self._matcher.get_error()
        reason = f": {first_line(ValueError(problem))}" if problem else ""
        return UserError(
            f"no token of the vocabulary continues the constrained text{reason}; change the"
            " json_schema, regex or grammar"
        )


def mask_words(vocab_size: int) -> int:
    """Return W, the words of a mask for so many tokens."""
    return -(-vocab_size // 32)


def masks(constraints: Sequence[Constraint | None], vocab_size: int) -> np.ndarray:
    """Return the masks of a batch, uint32 [B, W]: every token for a sequence without constraint.

    Also for one that has ended and has no stop token, since no token at all would be left.
    """
    masks_BW = np.full((len(constraints), mask_words(vocab_size)), 2**32 - 1, np.uint32)
    for mask_W, constraint in zip(masks_BW, constraints):
        if constraint is not None and constraint.mask().any():
            mask_W[:] = constraint.mask()
    return masks_BW


def _pack(tokens: list[int] | slice, vocab_size: int) -> np.ndarray:
    """Return the mask that allows these tokens."""
    bits = np.zeros(32 * mask_words(vocab_size), np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _resize(mask_X: np.ndarray, words: int) -> np.ndarray:
    """Return the mask of another vocabulary size; tokens that it does not have are not allowed."""
    mask_W = np.zeros(words, np.uint32)
    mask_W[: len(mask_X)] = mask_X[:words]
    return mask_W


# --- the vocabulary ---


class _Vocabulary:
    """A tokenizer as llguidance reads it, with one token more that stands for the end."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = {token: text for text, token in tokenizer.special_ids.items()}
        pieces = [tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)]
        self.end_id = self.eos_token_id = tokenizer.vocab_size
        self.special_token_ids = [*special, self.end_id]
        names = [special[i].encode() if i in special else piece for i, piece in enumerate(pieces)]
        self.tokens = [*names, b"<end>"]
        spaced = {token for token, piece in enumerate(pieces) if piece.startswith(b" ")}
        kept = {token for token in spaced if tokenizer.decode([token]).startswith(" ")}
        self._dropped = sorted(spaced - kept)  # tokens whose space a text does not begin with
        self.dropped_spaces = _pack(self._dropped, self.end_id)
        self.kept_spaces = _pack([i for i in kept if pieces[i] == b" "], self.end_id)
        self.trie = _llguidance().LLTokenizer(self)

    def __call__(self, text: str) -> list[int]:
        """Return the ids that a text has within another, without a space before it."""
        for before in ("", "\n"):
            try:
                begun, ids = map(self._tokenizer.encode, (before, before + text))
            except UserError:  # a character without a token
                continue
            is_begun, ids = ids[: len(begun)] == begun, ids[len(begun) :]
            if is_begun and b"".join(self.tokens[token] for token in ids) == text.encode():
                return ids
        return self.trie.greedy_tokenize(text)

    def drops_space_after(self, prompt: Sequence[int]) -> bool:
        """Return whether a text after these ids does not have the space that it begins with."""
        if not self._dropped:
            return False
        return not self._tokenizer.decoder(after=prompt).push(self._dropped[:1]).startswith(" ")


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    return _Vocabulary(tokenizer)


@functools.lru_cache(maxsize=64)
def _first_matcher(kind: str, text: str, vocabulary: _Vocabulary) -> Any:
    """Return a matcher at the start of a text; it is for copying.

    Raises:
      UsageError: if the grammar is refused, or no token can begin its text.
    """
    compiled = compile_grammar(kind, text)
    matcher = _llguidance().LLMatcher(vocabulary.trie, compiled, log_level=0, limits=_limits())
    matcher.compute_bitmask()  # copies keep what this computes
    if matcher.is_error():
        raise _refusal(kind, text, matcher.get_error())
    return matcher
