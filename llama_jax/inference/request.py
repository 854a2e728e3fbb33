"""What a caller wants generated, and what comes back: `SamplingParams`, `Request`, `Delta`.

A `Request` travels unchanged from the library, or a command, to `inference.engine`. Nothing here
imports JAX, so that a command line can check its flags before anything is loaded.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from llama_jax.errors import UsageError, did_you_mean, finite_number, shown, whole_number
from llama_jax.text.stop_strings import parse_stops

RNGS = ("jax", "xorshift")
XORSHIFT_PARAMS = ("temperature", "top_p", "seed", "rng", "max_tokens", "stop")
MAX_STOPS = 32  # stop strings per completion; a chat format adds its own
MAX_COMPLETIONS = 10_000  # per prompt; they are generated in one batch
MAX_TOKEN_ID = 2**31 - 1  # int32
MIN_TEMPERATURE = 2.0**-126  # the smallest normal float32; a lower temperature is 0


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that become `SamplingParams`, for type checkers and editors."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int
    rng: str
    max_tokens: int
    stop: str | Sequence[str] | None
    logprobs: int | None
    speculate: bool
    json_schema: Mapping[str, Any] | str | bool | None
    regex: str | None
    grammar: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a completion are chosen, where it ends, and what is reported of it.

    The order in which the parameters apply is that of `inference.sampler`.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: sample from the k most likely tokens; 0 is off.
      top_p: sample from the fewest tokens that together have this probability; 1 is off.
      min_p: sample from tokens at least this many times as likely as the first; 0 is off.
      repetition_penalty: more than 1 discourages tokens of the prompt and the completion.
      presence_penalty: subtracted from the logits of tokens that the completion has.
      frequency_penalty: subtracted for each time that the completion has the token.
      logit_bias: added to logits, by token id; minus infinity forbids a token.
      seed: the same seed gives the same text.
      rng: "jax", or "xorshift" for the sampler of llama2.c: one sequence at a time, on the host.
      max_tokens: new tokens at most.
      stop: texts that end the completion and are not part of it.
      logprobs: report each token's log-probability and those of so many top tokens; None: neither.
      speculate: guess ahead where the text repeats itself; faster, same text; needs temperature 0.
      json_schema: only JSON of a schema: a mapping, or its JSON text; True: any JSON object.
      regex: only text that matches, as a whole, an expression in the syntax of Rust's `regex`.
      grammar: only text of a grammar in Lark's syntax, whose first rule is `start`.

    Raises:
      UsageError: naming the argument and its range, or two that exclude each other.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    rng: str = "jax"
    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    speculate: bool = False
    json_schema: Mapping[str, Any] | str | bool | None = None  # JSON text, once it is here
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        number, integer = self._check_number, self._check_integer
        number("temperature", lambda t: t >= 0, "0 (greedy) or more")
        integer("top_k", lambda k: k >= 0, "0 (off) or more")
        number("top_p", lambda p: 0 < p <= 1, "more than 0, up to 1 (off)")
        number("min_p", lambda p: 0 <= p <= 1, "0 (off) to 1")
        number("repetition_penalty", lambda r: r > 0, "more than 0; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            number(name, lambda _: True, "a finite number; 0 is off")
        _check_bias(self.logit_bias)
        integer("max_tokens", lambda n: n >= 1, "1 or more")
        if self.logprobs is not None:
            integer("logprobs", lambda n: n >= 0, "0 or more")
        if self.stop != ():
            object.__setattr__(self, "stop", parse_stops(self.stop, MAX_STOPS))
        if (self.json_schema, self.regex, self.grammar) != (None, None, None):
            self._check_constraint()
        if self.rng not in RNGS:
            raise UsageError(f"rng={self.rng!r} is unknown; expected 'jax' or 'xorshift'")
        if self.rng == "xorshift":
            self._check_xorshift()
        else:
            integer("seed", lambda s: 0 <= s < 2**32, f"0 to {2**32 - 1}")
        is_plain = not (self.has_penalties or self.logit_bias) and self.logprobs is None
        if self.speculate and not (self.is_greedy and is_plain and self.constraint is None):
            raise UsageError(
                "speculate=True guesses the most likely token; use it with temperature=0 and"
                " without penalties, logit_bias, logprobs, json_schema, regex and grammar"
            )

    @classmethod
    def of(cls, **named: Unpack[SamplingOptions]) -> "SamplingParams":
        """Return parameters from keyword arguments of a call; None stands for the default.

        Raises:
          UsageError: for an unknown name, and as the class does.
        """
        for name in named.keys() - SamplingOptions.__annotations__.keys():
            hint = did_you_mean(name, SamplingOptions.__annotations__)
            raise UsageError(f"{name!r} is an unknown argument{hint}")
        given: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
        return cls(**given)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that occurred already are treated differently."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """What text is allowed: the name of the parameter that says so and its value, if any.

        Raises:
          UsageError: for more than one.
        """
        values = {name: getattr(self, name) for name in ("json_schema", "regex", "grammar")}
        found = [(name, value) for name, value in values.items() if value is not None]
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise UsageError(f"{names} exclude each other; choose one")
        return found[0] if found else None

    def _check_number(self, name: str, accepts: Any, expected: str) -> None:
        finite_number(name, getattr(self, name), accepts, expected)

    def _check_integer(self, name: str, accepts: Any, expected: str) -> None:
        whole_number(name, getattr(self, name), accepts, expected)

    def _check_constraint(self) -> None:
        # Imports NumPy, which would make --help slow.
        from llama_jax.inference.constraints import compile_grammar, schema_text

        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        for name in ("regex", "grammar"):
            if not isinstance(value := getattr(self, name), str | None):
                raise UsageError(f"{name}={shown(value)} is not a text; expected one")
        if constraint := self.constraint:
            compile_grammar(*constraint)

    def _check_xorshift(self) -> None:
        # From state 0 the generator never moves.
        self._check_integer("seed", lambda s: 1 <= s < 2**64, f"1 to {2**64 - 1}")
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            is_off = not value if field.name == "logit_bias" else value == default
            if field.name not in XORSHIFT_PARAMS and not is_off:
                raise UsageError(
                    f"{field.name}={shown(value)} does not go with rng='xorshift', which supports"
                    " only temperature, top_p, seed, max_tokens and stop; leave one of them out"
                )


def _check_bias(logit_bias: Any) -> None:
    if not isinstance(logit_bias, Mapping):
        raise UsageError(f"logit_bias={logit_bias!r} is not a mapping; expected {{id: bias}}")
    for token, bias in logit_bias.items():
        expected = f"token ids of 0 to {MAX_TOKEN_ID - 1}"
        whole_number("logit_bias", token, lambda i: 0 <= i < MAX_TOKEN_ID, expected)
        if not (isinstance(bias, numbers.Real) and bias == -float("inf")):
            expected = "a finite number or minus infinity"
            finite_number(f"logit_bias[{token}]", bias, lambda _: True, expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A batch of sequences to generate, each with parameters of its own.

    Attributes:
      prompts: token ids of each sequence, at least one; a prompt with several completions is
        repeated.
      params: one per sequence; they agree in `rng`, `logprobs` and `speculate`.
      stop_ids: token ids that end any sequence and are not returned.
      stop_strings: texts that end any sequence, in addition to its own `stop`.
      echo: a text per sequence that its text begins with; () for none.
      strip: whether to drop the whitespace that a text begins with.

    Raises:
      UsageError: when the sequences cannot share a batch.
    """

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    echo: Sequence[str] = ()
    strip: bool = False

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.params) or not self.params:
            raise UsageError(
                f"the request has {len(self.prompts)} prompts and {len(self.params)} params;"
                " expected one of each per sequence"
            )
        for name in ("rng", "logprobs", "speculate"):
            values = {getattr(params, name) for params in self.params}
            if len(values) > 1:
                found = ", ".join(sorted(map(repr, values)))
                raise UsageError(f"{name} differs within a request: {found}; use one value")
        if self.shared.rng == "xorshift" and len(self.params) > 1:
            raise UsageError(
                f"rng='xorshift' generates one sequence at a time, not {len(self.params)}"
            )

    @classmethod
    def same_params(
        cls,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        n: int = 1,
        echo: Sequence[str] = (),
        **others: Any,
    ) -> "Request":
        """Return a request for `n` completions of each prompt; completion j has `seed` + j.

        Args:
          echo: a text per prompt, or ().

        Raises:
          UsageError: for an `n` out of range, or seeds that would be.
        """
        whole_number("n", n, lambda n: 1 <= n <= MAX_COMPLETIONS, f"1 to {MAX_COMPLETIONS}")
        if params.rng == "jax":
            expected = f"0 to {2**32 - n}"
            whole_number("seed", params.seed, lambda seed: seed <= 2**32 - n, expected)
        with_next_seeds = [dataclasses.replace(params, seed=params.seed + j) for j in range(1, n)]
        return cls(
            prompts=[ids for ids in prompts for _ in range(n)],
            params=[params, *with_next_seeds] * len(prompts),
            echo=[text for text in echo for _ in range(n)],
            **others,
        )

    @property
    def shared(self) -> SamplingParams:
        """The parameters of any sequence, for those in which all agree."""
        return self.params[0]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model, before temperature, penalties and filters."""

    id: int
    logprob: float  # nats
    top: tuple["TokenLogprob", ...] = ()  # the most likely tokens in its place, falling
    text: str = ""  # of this token alone; bytes of an incomplete character are U+FFFD


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a sequence of a request has gained.

    `inference.engine` makes deltas of token ids; `inference.completions.add_text` adds the text.
    """

    index: int  # of the sequence in the request
    ids: tuple[int, ...] = ()  # without a stop token
    logprobs: tuple[TokenLogprob, ...] = ()  # as many as ids, if requested
    finish_reason: str = ""  # in the last delta: "stop" at a stop id or string, else "length"
    text: str = ""  # "" while a character or a possible stop string is incomplete
