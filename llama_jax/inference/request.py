"""How tokens are to be chosen, as users say it: the library, the command and a chat alike.

What the numbers mean `sampling` knows, and `xorshift` for llama2.c's way.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.config import require
from llama_jax.errors import nearest, whole_number
from llama_jax.inference.sampler import Sampler, make_sampler
from llama_jax.inference.speculation import require_plainly_greedy
from llama_jax.text.chat import Message, Template, TruncationWarning, fit
from llama_jax.text.stop_strings import texts_of_stops
from llama_jax.text.tokenizer import Tokenizer

RNGS = ("jax", "xorshift")
OF_XORSHIFT = ("temperature", "top_p", "rng")  # what llama2.c's way knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The settings of `sampler.make_sampler`, and whose random numbers are drawn.

    Raises:
      UsageError: when made with a number out of range, or one that does not go with `rng`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # by token id
    rng: str = "jax"  # "xorshift": as llama2.c chooses, one text at a time

    def __post_init__(self) -> None:
        require(self.rng in RNGS, f"rng={self.rng!r} is unknown; expected 'jax' or 'xorshift'")
        if self.rng == "xorshift":
            off = SamplingOptions()
            for name, value in vars(self).items():
                require(
                    name in OF_XORSHIFT or value == getattr(off, name),
                    f"{name}={value!r} does not go with rng='xorshift', which knows temperature,"
                    " top_p and seed alone; leave one of them out",
                )
        self.sampler  # noqa: B018  raises

    @functools.cached_property
    def sampler(self) -> Sampler:
        """What chooses on the device."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del settings["rng"]
        return make_sampler(**settings)

    def chooser(self, seed: int) -> Callable[[np.ndarray], int] | None:
        """What chooses a text's tokens on the host; None where the sampler does on the device.

        Raises:
          UsageError: for a seed that xorshift cannot start from.
        """
        if self.rng == "jax":
            return None
        from llama_jax.inference.xorshift import XorshiftSampler

        return XorshiftSampler(self.temperature, self.top_p, seed).choose


# What a library call asks for: its wishes checked, and its prompts told as rows of token ids.

MOST_COMPLETIONS = 10_000  # of a prompt; they are made side by side
MOST_STOPS = 32  # that a user may give; a chat format has its own beside them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What texts are to be like, whatever they continue.

    Raises:
      UsageError: when made with one that is out of range, or two that do not go together.
    """

    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_tokens: int = 256  # new ones of each text, at most
    stop: str | Sequence[str] = ()  # texts at which one ends; they are not part of it
    seed: int = 0  # of a prompt's first text; the others have those that follow
    n: int = 1  # texts of each prompt
    logprobs: int | None = None  # likeliest tokens told of beside each; None: nothing is told
    speculate: bool = False  # guess ahead where a text repeats itself; only for temperature 0

    def __post_init__(self) -> None:
        whole_number("max_tokens", self.max_tokens, lambda most: most >= 1, "1 or more")
        whole_number("n", self.n, lambda n: 1 <= n <= MOST_COMPLETIONS, f"1 to {MOST_COMPLETIONS}")
        texts_of_stops(self.stop, MOST_STOPS)
        if self.sampling.rng == "jax":
            most = 2**32 - self.n
            whole_number("seed", self.seed, lambda seed: 0 <= seed <= most, f"0 to {most}")
            if self.speculate:
                require_plainly_greedy(self.sampling.sampler, self.logprobs)
        else:
            self._require_one_plain_text()

    def _require_one_plain_text(self) -> None:
        self.sampling.chooser(self.seed)
        others = {"n": 1, "logprobs": None, "speculate": False}
        for name, off in others.items():
            value = getattr(self, name)
            message = f"{name}={value} does not go with rng={self.sampling.rng!r}"
            require(value == off, f"{message}, which writes one plain text; leave one of them out")


def wishes_of(**named: Any) -> Wishes:
    """Wishes, those about sampling named beside the others; None wishes for nothing of that name.

    Raises:
      TypeError: for a name that is unknown.
      UsageError: as `Wishes` and `SamplingOptions` do.
    """
    about_sampling = [field.name for field in dataclasses.fields(SamplingOptions)]
    known = {field.name for field in dataclasses.fields(Wishes)}.union(about_sampling)
    for name in named:
        if name not in known:
            raise TypeError(f"{name!r} is an unknown argument{nearest(name, known)}")
    given = {name: value for name, value in named.items() if value is not None}
    sampling = {name: given.pop(name) for name in about_sampling if name in given}
    return Wishes(sampling=SamplingOptions(**sampling), **given)


@dataclasses.dataclass(frozen=True)
class Request:
    """One call's rows and how to go on with them.

    Raises:
      UsageError: when made of several rows for a chooser that writes one text.
    """

    rows: list[list[int]]  # ids, those of a prompt as often as texts of it are wished
    echoes: list[str]  # what each text begins with
    stop_ids: tuple[int, ...]
    wishes: Wishes
    stop_strings: tuple[str, ...] = ()  # beside those that were wished for

    def __post_init__(self) -> None:
        require(
            len(self.rows) == 1 or self.wishes.sampling.rng == "jax",
            f"rng={self.wishes.sampling.rng!r} writes one text at a time, not {len(self.rows)}",
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """All texts at which one of its texts ends."""
        return (*self.stop_strings, *texts_of_stops(self.wishes.stop))

    @property
    def seeds(self) -> list[int]:
        """One a row: text j of a prompt has the first one's plus j."""
        return [self.wishes.seed + row % self.wishes.n for row in range(len(self.rows))]


def texts_of(name: str, texts: str | Sequence[str]) -> list[str]:
    """The texts of an argument, refused if they are something else."""
    listed = [texts] if isinstance(texts, str) else texts
    is_list = isinstance(listed, list | tuple) and all(isinstance(text, str) for text in listed)
    require(is_list and len(listed) > 0, f"{name}={texts!r:.60} is not a text or a list of texts")
    return list(listed)


# A dialogue as a request: told in a chat format, shortened where that is allowed.


def request_of_dialogue(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    wishes: Wishes,
    stop_ids: tuple[int, ...],
    *,
    context: int,
    truncate: bool,
) -> tuple[Request, int]:
    """The request whose one text is the answer, and how many of the oldest exchanges it lacks.

    The answer is left `max_tokens` of the context, or a quarter of it if that is less. A warning
    says what was left out.

    Raises:
      UserError: as `shortening.fit`.
      UsageError: when more than one answer is wished for.
    """
    require(wishes.n == 1, f"n={wishes.n} does not go with a chat, which gives one answer")
    room = context - min(wishes.max_tokens, context // 4)
    fitted = fit(messages, template, tokenizer, room, truncate)
    if fitted.statement:
        warnings.warn(fitted.statement, TruncationWarning, stacklevel=3)
    ends = template.stops(tokenizer)
    all_ids = (*ends.ids, *stop_ids)
    request = Request([fitted.ids], [""], all_ids, wishes, stop_strings=ends.strings)
    return request, fitted.dropped
