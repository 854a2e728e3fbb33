"""The answers of OpenAI's protocol: what a model generated, to JSON."""

import collections
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama_jax.inference.completions import Completion
from llama_jax.inference.request import Delta, Request, TokenLogprob
from llama_jax.inference.scoring import Score
from llama_jax.serving.protocol import Call
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import parse_tool_calls


class Reply:
    """The answer to a call, whole or in chunks; what all its chunks share."""

    def __init__(
        self,
        call: Call,
        request: Request,
        model: str,
        tokenizer: Tokenizer,
        scores: Sequence[Score] = (),
    ):
        """Start an answer.

        Args:
          scores: of the prompts, whose log-probabilities an echo begins with; () for none.
        """
        self._call, self._request, self._tokenizer = call, request, tokenizer
        kind = "chatcmpl" if call.is_chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "object": "chat.completion" if call.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._scores = scores
        self._offsets: dict[int, _Offsets] = {}
        self._held: collections.defaultdict[int, str] = collections.defaultdict(str)
        self._timer = _Timer()
        self._completion_tokens = 0

    # ---- whole ----

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the JSON of all completions of the request, whose deltas were counted."""
        call = self._call
        chosen: list[int] = []
        for start in range(0, len(completions), call.best_of):
            places = list(range(start, start + call.best_of))
            if call.best_of > call.n:
                places.sort(key=lambda place: -_mean_logprob(completions[place]))
            chosen += places[: call.n]
        choices = [
            self._choice(index, place, completions[place]) for index, place in enumerate(chosen)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(), "timings": self.timings()}

    def _choice(self, index: int, place: int, completion: Completion) -> dict[str, Any]:
        logprobs = self._logprobs(place, completion.logprobs or ())
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs}
        reason = completion.finish_reason
        if not self._call.is_chat:
            return {**choice, "text": completion.text, "finish_reason": reason}
        said, reason = self._said(completion.text, reason)
        message = {"role": "assistant", "refusal": None, **said}
        return {**choice, "message": message, "finish_reason": reason}

    def _said(self, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """Return an answer as the content of a message, or as calls of tools; and why it ended."""
        names = {tool["function"]["name"] for tool in self._call.tools}
        said, calls = parse_tool_calls(text, names) if names and reason == "stop" else (text, [])
        if not calls:
            return {"content": text}, reason
        listed = []
        for index, call in enumerate(calls):
            function = {"name": call.name, "arguments": json.dumps(call.arguments)}
            own = {"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
            listed.append({**own, "function": function})
        return {"content": said or None, "tool_calls": listed}, "tool_calls"

    # ---- chunks ----

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks before the first text: of a chat, who speaks."""
        if not self._call.is_chat:
            return []
        role = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, role, None) for index in range(len(self._request.prompts))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks of a delta: its text, and the end of its sequence."""
        self.count(delta)
        found, text, reason = [], delta.text, delta.finish_reason
        content: Any = text
        if self._call.tools:  # whether an answer is a call shows when it is whole
            text = self._held[delta.index] = self._held[delta.index] + text
            text = text if reason else ""
        if self._call.is_chat:
            content, reason = self._said(text, reason)
        logprobs = self._logprobs(delta.index, delta.logprobs)
        if text or delta.logprobs:
            found.append(self._chunk(delta.index, content, logprobs))
        if reason:
            empty: Any = {} if self._call.is_chat else ""
            found.append(self._chunk(delta.index, empty, None, reason))
        return found

    def _chunk(
        self, index: int, content: Any, logprobs: Any, finish_reason: str = ""
    ) -> dict[str, Any]:
        kind = "delta" if self._call.is_chat else "text"
        choice = {"index": index, kind: content, "logprobs": logprobs}
        choice["finish_reason"] = finish_reason or None
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        usage = {"usage": None} if self._call.include_usage else {}
        kind = "chat.completion.chunk" if self._call.is_chat else "text_completion"
        return {**self._head, "object": kind, **usage}

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunks after the last text: token counts, if requested."""
        if not self._call.include_usage:
            return []
        usage = {"usage": self._usage(), "timings": self.timings()}
        return [{**self._chunk_head(), "choices": [], **usage}]

    # ---- counts and times ----

    def count(self, delta: Delta) -> None:
        """Take a delta into account in `usage` and `timings`."""
        self._completion_tokens += len(delta.ids)
        self._timer.count(len(delta.ids))

    def _usage(self) -> dict[str, int]:
        prompts = self._request.prompts[:: self._call.best_of]
        read = sum(map(len, prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self._completion_tokens,
            "total_tokens": read + self._completion_tokens,
        }

    def timings(self) -> dict[str, float | None]:
        """Return the speeds of the answer so far."""
        return self._timer.figures(self._usage()["prompt_tokens"])

    # ---- log-probabilities ----

    def _logprobs(self, place: int, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        """Return the JSON of the log-probabilities of new tokens of a sequence."""
        if self._call.logprobs is None:
            return None
        if self._call.is_chat:
            return {"content": [self._chat_token(each) for each in logprobs], "refusal": None}
        is_new = place not in self._offsets
        offsets = self._offsets.setdefault(place, _Offsets(self._tokenizer))
        prompt = self._request.prompts[place]
        tokens: list[TokenLogprob | int] = list(logprobs)
        if is_new and self._scores:
            score = self._scores[place // self._call.best_of]
            tops = score.top or [()] * len(score.logprobs)
            scored = zip(prompt[1:], score.logprobs, tops)
            tokens[:0] = [prompt[0], *(TokenLogprob(*each) for each in scored)]
        elif is_new:
            offsets.push(prompt)
        return self._text_logprobs(tokens, offsets)

    def _text_logprobs(
        self, tokens: Sequence[TokenLogprob | int], offsets: "_Offsets"
    ) -> dict[str, Any]:
        """Return the columns of the older form; a plain id is the first token, which has none."""
        found: dict[str, Any] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for each in tokens:
            token = each if isinstance(each, int) else each.id
            found["tokens"].append(self._name(token))
            found["text_offset"].append(offsets.push([token]))
            if isinstance(each, int):
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(_finite(each.logprob))
            top = {self._name(other.id): _finite(other.logprob) for other in reversed(each.top)}
            found["top_logprobs"].append({**top, self._name(token): _finite(each.logprob)})
        return found

    def _chat_token(self, token: TokenLogprob) -> dict[str, Any]:
        def named(each: TokenLogprob) -> dict[str, Any]:
            spelled = list(self._tokenizer.piece_bytes(each.id))
            return {
                "token": self._name(each.id),
                "bytes": spelled,
                "logprob": _finite(each.logprob),
            }

        return {**named(token), "top_logprobs": [named(each) for each in token.top]}

    def _name(self, token: int) -> str:
        """Return the text of a token; "bytes:\\xe2" for a part of a character, as OpenAI writes."""
        spelled = self._tokenizer.piece_bytes(token)
        if not spelled:
            special = self._tokenizer.special_ids
            return next((text for text, number in special.items() if number == token), "")
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class _Offsets:
    """Where the tokens of a sequence begin in its text, prompt included."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder, self._length = tokenizer.new_decoder(), 0

    def push(self, ids: Sequence[int]) -> int:
        """Append tokens; return the offset of the first."""
        start = self._length
        self._length += len(self._decoder.push(ids))
        return start


class _Timer:
    """How long the tokens of an answer took."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = 0.0  # when tokens came; 0: not yet
        self._later = 0  # tokens after those that came first

    def count(self, tokens: int) -> None:
        """Note that so many tokens came."""
        self._last = time.perf_counter()
        if self._first:
            self._later += tokens
        else:
            self._first = self._last

    def figures(self, prompt_tokens: int) -> dict[str, float | None]:
        """Return seconds to the first token and tokens per second, None where there were none."""
        first, rest = self._first - self._start, self._last - self._first
        return {
            "prompt_tokens_per_second": prompt_tokens / first if first > 0 else None,
            "tokens_per_second": self._later / rest if rest > 0 and self._later else None,
            "first_token_seconds": first if first > 0 else None,
        }


def _mean_logprob(completion: Completion) -> float:
    found = [each.logprob for each in completion.logprobs or ()]
    return sum(found) / max(len(found), 1)


def _finite(logprob: float) -> float:
    """Return a log-probability that JSON can express, as OpenAI writes that of the impossible."""
    return max(logprob, -9999.0)
