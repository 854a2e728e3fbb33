"""JSON of OpenAI's protocol becomes requests of the engine, or one line that names the field."""

import json

import pytest
from servers import write_tiny

from llama_jax.inference.request import SamplingParams
from llama_jax.llm import LLM
from llama_jax.serving.fields import UNSUPPORTED, ApiError, parse_json
from llama_jax.serving.protocol import make_request, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(write_tiny(tmp_path_factory.mktemp("protocol") / "tiny"))


def chat(llm, **fields):
    return make_request(parse_chat({"messages": HELLO, **fields}), llm)


def complete(llm, **fields):
    return make_request(parse_completion({"prompt": "abc", **fields}), llm)


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("temperature", 0.3, "temperature", 0.3),
        ("top_p", 0.4, "top_p", 0.4),
        ("top_k", 7, "top_k", 7),
        ("min_p", 0.1, "min_p", 0.1),
        ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
        ("repeat_penalty", 1.2, "repetition_penalty", 1.2),
        ("presence_penalty", 0.5, "presence_penalty", 0.5),
        ("frequency_penalty", -0.5, "frequency_penalty", -0.5),
        ("logit_bias", {"5": -100}, "logit_bias", {5: -100}),
        ("seed", 7, "seed", 7),
        ("max_tokens", 9, "max_tokens", 9),
        ("stop", "x", "stop", ("x",)),
        ("stop", ["x", "yz"], "stop", ("x", "yz")),
        ("logit_bias_type", "input_ids", "top_k", 0),
        ("mirostat_tau", 3, "top_k", 0),  # without influence while mirostat is off
        ("user", "anna", "top_k", 0),
        ("an_extra", {"of": "a client"}, "top_k", 0),
    ],
)
def test_fields_are_honoured(llm, field, value, name, expected):
    for make in (chat, complete):
        assert getattr(make(llm, **{field: value}).shared, name) == expected


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "has"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '"object"'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", '"a"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "json_schema",
            '"a"',
        ),
        ({"regex": "[ab]+"}, "regex", "[ab]+"),
        ({"grammar": 'start: "a" | "b"'}, "grammar", "start"),
    ],
)
def test_constraints_are_honoured(llm, fields, kind, has):
    found, text = chat(llm, **fields).shared.constraint
    assert found == kind and has in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}),
        ("regex", "(a"),
        ("grammar", "begin: a"),
        ("regex", 5),
    ],
)
def test_wrong_constraints_are_named(llm, field, value):
    with pytest.raises(ApiError) as error:
        chat(llm, **{field: value})
    assert error.value.param == field


def test_text_is_no_constraint(llm):
    assert chat(llm, response_format={"type": "text"}).shared.constraint is None


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_fields_without_support_are_refused_by_name_unless_neutral(llm, field):
    for neutral in UNSUPPORTED[field]:
        assert chat(llm, **{field: neutral})
    with pytest.raises(ApiError, match=f"^{field}=") as error:
        chat(llm, **{field: [1]})
    assert error.value.param == field


def test_null_is_as_if_absent(llm):
    names = ("temperature", "max_tokens", "stop", "n", "logit_bias", "stream", "logprobs", "tools")
    fields = dict.fromkeys(names)
    assert chat(llm, seed=1, **fields) == chat(llm, seed=1)


def test_what_is_absent_is_as_the_model_recommends(llm, monkeypatch):
    monkeypatch.setattr(llm, "generation", {"temperature": 0.2, "top_k": 5})
    params = chat(llm, top_k=9).shared
    assert (params.temperature, params.top_k, params.top_p) == (0.2, 9, SamplingParams().top_p)


def test_seeds_of_any_size_are_taken_and_absent_ones_differ(llm):
    for seed in (-1, 2**63 - 1, 2**40):
        assert 0 <= chat(llm, seed=seed, n=4).params[3].seed < 2**32
    assert chat(llm).shared.seed != chat(llm).shared.seed


def test_limits_without_max_tokens(llm):
    answer, text = chat(llm), complete(llm)
    assert answer.shared.max_tokens == llm.context_length - len(answer.prompts[0])
    assert text.shared.max_tokens == 16


def test_aliases_that_differ_are_refused(llm):
    with pytest.raises(ApiError, match="repeat_penalty and repetition_penalty differ"):
        chat(llm, repeat_penalty=1.1, repetition_penalty=1.2)


def test_prompts_with_n_are_in_order(llm):
    request = complete(llm, prompt=["a", "b"], n=2, seed=4)
    assert request.prompts[0] == request.prompts[1] != request.prompts[2]
    assert [params.seed for params in request.params] == [4, 5, 4, 5]


def test_too_many_sequences_are_refused(llm):
    for fields, param in (
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
        ({"best_of": 65}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ):
        with pytest.raises(ApiError) as error:
            complete(llm, **fields)
        assert error.value.param == param


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [1.5], [True], {"a": 1}, 5])
def test_wrong_prompts_are_named(llm, prompt):
    with pytest.raises(ApiError) as error:
        complete(llm, prompt=prompt)
    assert error.value.param == "prompt"


def test_30_the_system_message_is_a_part_of_llama_2s_first_exchange(llm, monkeypatch):
    monkeypatch.setattr(llm, "_template", "llama2")
    [ids] = chat(llm, messages=[{"role": "developer", "content": "brief"}, *HELLO]).prompts
    text = llm.tokenizer.decode(ids)
    assert text == "[INST] <<SYS>>\nbrief\n<</SYS>>\n\nhello [/INST]"


def test_a_model_without_a_chat_format_refuses_chats(llm, monkeypatch):
    monkeypatch.setattr(llm, "_template", "none")
    with pytest.raises(ApiError, match="no chat format") as error:
        chat(llm)
    assert error.value.param == "messages"


def test_what_a_user_writes_is_no_control_token(llm):
    ids = chat(llm, messages=[{"role": "user", "content": "</s><s>"}]).prompts[0]
    assert llm.tokenizer.bos_id not in ids[1:] and llm.tokenizer.eos_id not in ids


def test_errors_are_in_openais_form():
    body = ApiError("no\nroom", "n", status=429, code="full", retry_after="2")
    error = {"message": "no room", "type": "rate_limit_error", "param": "n", "code": "full"}
    assert body.body() == {"error": error} and body.headers == {"retry-after": "2"}


def test_json_is_strict():
    assert parse_json(b'{"a": [1, null]}') == {"a": [1, None]}
    deep = ("[" * 10**5 + "]" * 10**5).encode()
    for body in (b"", b"[]", b"1", b'{"a": Infinity}', b'{"a": {"b": 1, "b": 2}}', deep):
        with pytest.raises(ApiError):
            parse_json(body)
    numeral = json.dumps({"a": 1}).replace("1", "9" * 5000)
    with pytest.raises(ApiError):
        parse_json(numeral.encode())
