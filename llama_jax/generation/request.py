"""What a library call asks for: its wishes checked, and its prompts told as rows of token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.arguments import whole_number
from llama_jax.config import require
from llama_jax.errors import nearest
from llama_jax.generation.speculation import require_plainly_greedy
from llama_jax.sampling.choice import SamplingOptions
from llama_jax.text.stop_strings import texts_of_stops

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
