"""SamplingParams and Request: values in range, and none that exclude each other."""

from typing import get_type_hints

import numpy as np
import pytest

from llama_jax.errors import UsageError
from llama_jax.inference.request import Request, SamplingOptions, SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("temperature", value, "0 (greedy) or more") for value in (-1, -1e-9, np.nan, np.inf, "hot")]
    + [("top_k", value, "0 (off) or more") for value in (-1, -(2**40), 2.0, np.nan, None)]
    + [("top_p", value, "more than 0, up to 1 (off)") for value in (0, -0.5, 1.001, np.nan, np.inf)]
    + [("min_p", value, "0 (off) to 1") for value in (-0.1, 1.01, np.nan, -np.inf)]
    + [("repetition_penalty", value, "more than 0; 1 is off") for value in (0, -1, np.nan, np.inf)]
    + [
        (name, value, "a finite number; 0 is off")
        for name in ("presence_penalty", "frequency_penalty")
        for value in (np.nan, np.inf, -np.inf, "1")
    ]
    + [("max_tokens", value, "1 or more") for value in (0, -5, 1.5)]
    + [("seed", value, "0 to 4294967295") for value in (-1, 2**32, 0.5)]
    + [("logprobs", value, "0 or more") for value in (-1, 1.5, True)],
)
def test_a_value_out_of_range_is_named(name, value, expected):
    with pytest.raises(UsageError, match=f"^{name}=") as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    shown = repr(value) if isinstance(value, str) else value
    assert message.startswith(f"{name}={shown} is ") and message.endswith(f"; expected {expected}")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([1, 2], "logit_bias=[1, 2] is not a mapping"),
        ({-1: 1.0}, "logit_bias=-1 is out of range; expected token ids"),
        ({2**31: 1.0}, "logit_bias=2147483648 is out of range; expected token ids"),
        ({"5": 1.0}, "logit_bias='5' is "),
        ({5: np.nan}, "logit_bias[5]=nan is out of range; expected a finite number or minus"),
        ({5: np.inf}, "logit_bias[5]=inf is out of range; expected a finite number or minus"),
        ({5: np.ones(2)}, "logit_bias[5]=array([1., 1.]) is "),
    ],
)
def test_an_invalid_bias_is_refused(bias, message):
    with pytest.raises(UsageError) as error:
        SamplingParams(logit_bias=bias)
    assert str(error.value).startswith(message)


XORSHIFT_REFUSES = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {3: 1.0},
    "logprobs": 0,
}


@pytest.mark.parametrize(("name", "value"), XORSHIFT_REFUSES.items())
def test_what_xorshift_does_not_support_is_refused(name, value):
    with pytest.raises(UsageError, match=f"^{name}=.* does not go with rng='xorshift'") as error:
        SamplingParams(**{name: value}, rng="xorshift", seed=1)
    assert "\n" not in str(error.value)
    SamplingParams(**{name: value})


@pytest.mark.parametrize("seed", [0, -1, 2**64, 1.0, True])
def test_seeds_of_xorshift(seed):
    with pytest.raises(UsageError, match=f"^seed={seed} is .*; expected 1 to {2**64 - 1}"):
        SamplingParams(rng="xorshift", seed=seed)
    SamplingParams(rng="xorshift", seed=2**40)


@pytest.mark.parametrize(
    "others",
    [
        {"temperature": 1.0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "logit_bias": {1: 1.0}},
        {"temperature": 0, "logprobs": 0},
    ],
)
def test_only_plain_greedy_sampling_speculates(others):
    with pytest.raises(UsageError, match=r"speculate=True .* temperature=0 and without penalties"):
        SamplingParams(**others, speculate=True)
    SamplingParams(temperature=1e-300, speculate=True)


def test_other_invalid_values_are_refused():
    with pytest.raises(UsageError, match="rng='dice' is unknown"):
        SamplingParams(rng="dice")
    with pytest.raises(UsageError, match="stop"):
        SamplingParams(stop=[""])
    with pytest.raises(UsageError, match="stop"):
        SamplingParams(stop="")


def test_keyword_arguments_of_a_call():
    nothing = dict.fromkeys(["stop", "logit_bias", "seed", "temperature"])
    assert SamplingParams.of(**nothing, top_k=3) == SamplingParams(top_k=3)
    assert SamplingParams.of(stop="a").stop == ("a",)
    with pytest.raises(UsageError, match="'top_q' is an unknown argument; did you mean 'top_"):
        SamplingParams.of(top_q=1)


def test_keyword_arguments_have_the_types_of_the_fields():
    options, fields = get_type_hints(SamplingOptions), get_type_hints(SamplingParams)
    assert options.keys() == fields.keys()
    for name, field in fields.items():
        assert options[name] in (field, field | None)


def test_completions_of_a_prompt_have_consecutive_seeds():
    request = Request.same_params([[1], [2]], SamplingParams(seed=7), n=2, echo=["a", "b"])
    assert request.prompts == [[1], [1], [2], [2]] and request.echo == ["a", "a", "b", "b"]
    assert [params.seed for params in request.params] == [7, 8, 7, 8]
    for n in (0, 10**5, 1.5):
        with pytest.raises(UsageError, match=rf"^n={n} is .*; expected 1 to 10000"):
            Request.same_params([[1]], SamplingParams(), n=n)
    with pytest.raises(UsageError, match=f"^seed={2**32 - 1} is out of range; expected 0 to"):
        Request.same_params([[1]], SamplingParams(seed=2**32 - 1), n=2)


def test_sequences_of_a_request_fit_together():
    plain = SamplingParams()
    for other, message in [
        (SamplingParams(logprobs=1), "logprobs differs within a request: 1, None"),
        (SamplingParams(rng="xorshift", seed=1), "rng differs within a request"),
        (SamplingParams(temperature=0, speculate=True), "speculate differs within a request"),
    ]:
        with pytest.raises(UsageError, match=message):
            Request(prompts=[[1], [2]], params=[plain, other])
    with pytest.raises(UsageError, match="2 prompts and 1 params"):
        Request(prompts=[[1], [2]], params=[plain])
    with pytest.raises(UsageError, match="one sequence at a time, not 2"):
        Request.same_params([[1]], SamplingParams(rng="xorshift", seed=1), n=2)
