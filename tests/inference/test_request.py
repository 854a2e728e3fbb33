"""What a call may ask for: every wish in range, and no two that do not go together."""

import math

import pytest

from llama_jax.errors import UsageError
from llama_jax.inference.request import Request, SamplingOptions, Wishes
from llama_jax.inference.sampler import make_sampler

XORSHIFT = SamplingOptions(rng="xorshift")


def test_options_are_those_of_the_sampler():
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.7, "min_p": 0.1}
    options |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4}
    found = SamplingOptions(**options, logit_bias={5: 1.0}).sampler
    expected = make_sampler(**options, logit_bias={5: 1.0})
    for name, value in vars(expected).items():
        assert hasattr(value, "shape") or vars(found)[name] == value, name
    assert found.bias_ids_I[0] == 5 and SamplingOptions().sampler.top_p == 0.9
    assert SamplingOptions().chooser(1) is None and XORSHIFT.chooser(1) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("logit_bias", {3: 1.0}),
    ],
)
def test_what_xorshift_would_ignore_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* does not go with rng='xorshift'") as error:
        SamplingOptions(**{name: value}, rng="xorshift")
    assert "\n" not in str(error.value)
    SamplingOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("logprobs", 0), ("speculate", True)])
def test_xorshift_writes_one_plain_text(name, value):
    with pytest.raises(UsageError, match=f"^{name}={value} does not go with rng='xorshift'"):
        Wishes(sampling=XORSHIFT, seed=1, **{name: value})
    wishes = Wishes(sampling=XORSHIFT, seed=2**40)
    with pytest.raises(UsageError, match="one text at a time, not 2"):
        Request([[1], [1]], ["", ""], (), wishes)
    with pytest.raises(UsageError, match="seed=0 is out of range"):
        Wishes(sampling=XORSHIFT)


def test_an_unknown_rng_is_refused():
    with pytest.raises(UsageError, match="rng='dice' is unknown"):
        SamplingOptions(rng="dice")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("n", 0),
        ("n", 10**5),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_number_out_of_range_is_named(name, value):
    message = rf"^{name}={value} is (out of range|no whole number); expected "
    with pytest.raises(UsageError, match=message):
        Wishes(**{name: value})


def test_numbers_that_are_none_are_refused_before_anything_is_read():
    with pytest.raises(UsageError, match="temperature=nan"):
        SamplingOptions(temperature=math.nan)
    with pytest.raises(UsageError, match="stop"):
        Wishes(stop=[""])


def test_texts_of_a_prompt_have_seeds_that_follow():
    request = Request([[1], [1], [2], [2]], [""] * 4, (), Wishes(seed=7, n=2))
    assert request.seeds == [7, 8, 7, 8]
    own = Request([[1]], [""], (), Wishes(stop="a"), stop_strings=("[INST]",))
    assert own.stops == ("[INST]", "a")
