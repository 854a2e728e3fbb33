"""From deltas to text: decoding, stop strings, and the completions that a library call returns."""

import dataclasses
from collections.abc import Generator, Iterable, Sequence

from llama_jax.inference.request import Delta, Request, TokenLogprob
from llama_jax.text.stop_strings import StopStrings
from llama_jax.text.tokenizer import Tokenizer


def add_text(
    deltas: Iterable[Delta], request: Request, tokenizer: Tokenizer
) -> Generator[Delta, None, None]:
    """Yield the deltas of a request with their text, up to each sequence's first stop string.

    A character is held back until it is complete, and text that may become a stop string until it
    is clear that it does not. Once every sequence has ended no further delta is drawn.
    """
    texts = RequestText(request, tokenizer)
    for delta in deltas:
        shown = texts.push(delta)
        if shown is not None:
            yield shown
        if not texts.running:
            return


class RequestText:
    """The texts of a request's sequences as they grow.

    A sequence also ends at a stop string, which the engine does not know: `push` then returns a
    delta with a finish reason where the engine's had none.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self._texts = [_Text(request, index, tokenizer) for index in range(len(request.prompts))]
        self.running = len(self._texts)  # sequences that have not ended

    def push(self, delta: Delta) -> Delta | None:
        """Return the engine's delta with its text; None if its sequence has ended."""
        text = self._texts[delta.index]
        if text.has_ended:
            return None
        shown = text.extend(delta)
        self.running -= text.has_ended
        return shown


class _Text:
    """The text of one sequence as it grows."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer):
        stops = (*request.stop_strings, *request.params[index].stop)
        self._decoder = tokenizer.decoder(after=request.prompts[index])
        self._stops = StopStrings(stops) if stops else None
        self._echo = request.echo[index] if request.echo else ""
        # A constraint says of each character whether it is part of the text.
        self._strips = request.strip and request.params[index].constraint is None
        self._tokenizer = tokenizer
        self.has_ended = False

    def extend(self, delta: Delta) -> Delta:
        """Return the delta with its text; ids after the one that completes a stop string go."""
        text, used, reason = "", len(delta.ids), delta.finish_reason
        if self._stops is None:
            text = self._decoder.push(delta.ids) + (self._decoder.flush() if reason else "")
        else:
            for place, token in enumerate(delta.ids, start=1):
                shown, stopped = self._stops.push(self._decoder.push([token]))
                text += shown
                if stopped:
                    used, reason = place, "stop"
                    break
            else:
                if reason:
                    shown, stopped = self._stops.push(self._decoder.flush())
                    text += shown if stopped else shown + self._stops.flush()
                    reason = "stop" if stopped else reason
        self.has_ended = bool(reason)
        logprobs = tuple(self._named(each) for each in delta.logprobs[:used])
        return Delta(delta.index, delta.ids[:used], logprobs, reason, self._begin(text))

    def _begin(self, text: str) -> str:
        """Return the text without leading whitespace and with the echoed prompt, at the start."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        text, self._echo = self._echo + text, ""
        return text

    def _named(self, logprob: TokenLogprob) -> TokenLogprob:
        name = self._tokenizer.piece_text
        top = tuple(dataclasses.replace(each, text=name(each.id)) for each in logprob.top)
        return dataclasses.replace(logprob, top=top, text=name(logprob.id))


def encode_prompt(tokenizer: Tokenizer, text: str, bos: bool) -> list[int]:
    """Return the ids of a text to be continued; EOS alone for one without ids.

    Args:
      bos: whether training documents began with BOS; without it they follow the EOS of another.
    """
    return tokenizer.encode(text, bos=bos) or [max(tokenizer.eos_id, 0)]


def stop_ids(tokenizer: Tokenizer, bos: bool, listed: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ids that end a text.

    Args:
      bos: whether training documents began with BOS, which then ends the one before.
      listed: the tokens of the model's description; none: EOS.
    """
    ids = (*(listed or [tokenizer.eos_id]), *([tokenizer.bos_id] if bos else []))
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of a completion."""

    prompt_tokens: int  # with BOS, if the model has one
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated text."""

    text: str
    token_ids: tuple[int, ...]  # with those that completed a stop string, without a stop token
    finish_reason: str  # "stop": at an end token or stop string; "length": limit or context reached
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token id, if requested
    dropped: int = 0  # oldest exchanges of a chat that did not fit and were left out


def collect(deltas: Iterable[Delta], request: Request) -> list[Completion]:
    """Return the completions that deltas with text add up to, one per sequence."""
    gained: list[list[Delta]] = [[] for _ in request.prompts]
    for delta in deltas:
        gained[delta.index].append(delta)
    completions = []
    for prompt, params, parts in zip(request.prompts, request.params, gained):
        ids = tuple(token for part in parts for token in part.ids)
        logprobs = tuple(each for part in parts for each in part.logprobs)
        completions.append(
            Completion(
                text="".join(part.text for part in parts),
                token_ids=ids,
                finish_reason=parts[-1].finish_reason,
                usage=Usage(len(prompt), len(ids)),
                logprobs=None if params.logprobs is None else logprobs,
            )
        )
    return completions
