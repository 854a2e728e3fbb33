"""The 44 checks of an OpenAI server, by number, with the openai client and a server process."""

import asyncio
import contextlib
import json
import signal
import socket
import time

import numpy as np
import pytest
from servers import SCRIPT, Server, write_scripted, write_tiny

from llama_jax.llm import LLM

httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")
pytestmark = pytest.mark.serve
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "tiny", "temperature": 0}
CHAT = {"model": "script", "messages": HELLO}
TEXT = {"model": "script", "prompt": ""}
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("serving")
    write_tiny(place / "tiny")
    write_scripted(place / "script")
    return place


@pytest.fixture(scope="module")
def serve(folder):
    """A function that starts a server of the scripted model, and of others by their flags."""
    servers = []

    def start(*flags, **options):
        cache = {"LLAMA_JAX_CACHE": str(folder / "cache")}
        options["env"] = {**cache, **options.get("env", {})}
        servers.append(Server(f"--model={folder / 'script'}", *flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(serve, folder):
    return serve(f"--model={folder / 'tiny'}")


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder / "tiny")


def chat(client, **fields):
    return client.chat.completions.create(**{**CHAT, **fields})


def complete(client, **fields):
    return client.completions.create(**{**TEXT, **fields})


def post(server, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)


def assert_refused(answer, status, param=None, code=None):
    error = answer.json()["error"]
    assert answer.status_code == status
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"] and "\n" not in error["message"]
    assert answer.headers["x-request-id"]


# ---- models ----


def test_01_models_are_listed(client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["script", "tiny"]
    assert all(model.object == "model" and model.created > 0 for model in found.values())
    assert found["tiny"].context_length == 512
    assert found["tiny"].chat_format == "chatml"
    assert found["tiny"].sampling["temperature"] == 1.0


def test_02_a_model_is_retrieved(client):
    assert client.models.retrieve("tiny").id == "tiny"


def test_03_an_unknown_model_is_not_found(client):
    for call in (lambda: client.models.retrieve("tony"), lambda: chat(client, model="tony")):
        with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'") as error:
            call()
        assert error.value.code == "model_not_found"


# ---- whole and streamed ----


def test_04_a_chat_is_parsed(client):
    made = chat(client)
    [choice] = made.choices
    assert made.object == "chat.completion"
    assert made.model == "script"
    assert abs(made.created - time.time()) < 60
    assert (choice.message.role, choice.message.content) == ("assistant", SCRIPT)
    assert choice.index == 0 and choice.logprobs is None


def test_05_a_completion_is_parsed(client):
    made = complete(client)
    assert made.object == "text_completion"
    assert made.choices[0].text == SCRIPT


def test_06_chunks_of_a_chat_are_the_whole(client):
    options = {"messages": HELLO, "max_tokens": 40, **GREEDY}
    chunks = list(chat(client, stream=True, **options))
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert joined == chat(client, **options).choices[0].message.content != ""


def test_07_chunks_of_a_completion_are_the_whole(client, llm):
    options = {"prompt": "abc", "max_tokens": 40, **GREEDY}
    joined = "".join(chunk.choices[0].text for chunk in complete(client, stream=True, **options))
    assert joined == complete(client, **options).choices[0].text
    assert joined == llm.complete("abc", temperature=0, max_tokens=40).text


def test_08_ids_are_unique_and_those_of_all_chunks(client):
    streams = [list(chat(client, stream=True)) for _ in range(2)]
    shared = [{(chunk.id, chunk.created, chunk.model) for chunk in stream} for stream in streams]
    assert [len(each) for each in shared] == [1, 1] and shared[0] != shared[1]
    assert chat(client).id.startswith("chatcmpl-") and complete(client).id.startswith("cmpl-")


def test_09_the_first_chunk_has_the_role(client):
    first, *others = chat(client, stream=True)
    assert first.object == "chat.completion.chunk"
    assert first.choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in others)


def test_10_the_last_chunk_has_the_finish_reason(client):
    *others, last = chat(client, stream=True)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert all(chunk.choices[0].finish_reason is None for chunk in others)


def test_the_stream_has_the_format_of_events(server):
    answer = post(server, "/v1/chat/completions", {**CHAT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason": null' in events[0]


# ---- ends ----


def test_11_the_limit_is_a_length(client):
    made = chat(client, max_tokens=3)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 3


def test_12_eos_is_a_stop(client):
    assert chat(client).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_13_14_a_stop_string_over_tokens_is_cut(client, stream):
    made = complete(client, stop=["zzz", "y 本"], stream=stream)  # a byte is a token
    choices = [each.choices[0] for each in made] if stream else made.choices
    assert "".join(each.text for each in choices) == "on🙂l"
    assert choices[-1].finish_reason == "stop"


def test_a_stop_string_frees_the_slot(server, client):
    before = generated(server)
    first = complete(client, max_tokens=400, prompt="abc", **GREEDY).choices[0].text[:3]
    middle = generated(server)
    made = complete(client, max_tokens=400, prompt="abc", stop=first, **GREEDY)
    time.sleep(0.5)
    after = generated(server)
    assert made.choices[0].text == ""
    assert middle - before == 400 and after - middle < 100


# ---- counts ----


def test_15_usage_adds_up(client, llm):
    usage = complete(client, prompt="abc", n=2, max_tokens=7, **GREEDY).usage
    assert usage.prompt_tokens == len(llm.tokenizer.encode("abc", bos=True))
    assert usage.completion_tokens == 14
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("create", [chat, complete])
def test_16_usage_of_a_stream_comes_once(client, create):
    *others, last = create(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == len(SCRIPT.encode())
    assert all(chunk.usage is None and chunk.choices for chunk in others)
    assert last.timings["first_token_seconds"] > 0 and last.timings["tokens_per_second"] > 0


def test_17_usage_of_a_stream_only_if_requested(client):
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_18_n_choices_have_their_index(client, llm, stream):
    options = {"model": "tiny", "prompt": "abc", "n": 2, "seed": 5, "max_tokens": 12}
    texts = {0: "", 1: ""}
    made = complete(client, stream=stream, **options)
    for each in made if stream else [made]:
        for choice in each.choices:
            texts[choice.index] += choice.text
    expected = llm.complete("abc", n=2, seed=5, max_tokens=12)
    assert list(texts.values()) == [each.text for each in expected]


# ---- sampling ----


def test_19_a_seed_repeats(client):
    options = {"model": "tiny", "max_tokens": 12}
    texts = [
        chat(client, seed=seed, **options).choices[0].message.content for seed in (1, 1, 2, None)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_20_temperature_0_repeats(client):
    texts = {chat(client, max_tokens=20, **GREEDY).choices[0].message.content for _ in range(2)}
    assert len(texts) == 1


def test_21_neutral_sampling_is_accepted(client):
    assert chat(client, top_p=1, temperature=1).choices[0].message.content == SCRIPT


def test_22_max_completion_tokens_is_max_tokens(client):
    assert chat(client, max_completion_tokens=4).usage.completion_tokens == 4


def test_best_of_returns_the_most_likely(client):
    options = {"model": "tiny", "prompt": "abc", "seed": 3, "max_tokens": 5, "logprobs": 0}
    every = complete(client, n=4, **options).choices
    [best] = complete(client, best_of=4, **options).choices
    means = [np.mean(each.logprobs.token_logprobs) for each in every]
    assert best.text == every[int(np.argmax(means))].text


def test_a_bias_changes_the_choice(client, llm):
    [token] = llm.tokenizer.encode("q")[-1:]
    made = complete(client, prompt="abc", max_tokens=3, logit_bias={str(token): 100}, **GREEDY)
    assert made.choices[0].text == "qqq"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_to(client, stream):
    properties = {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = chat(client, model="tiny", response_format=form, stream=stream, max_tokens=300)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in made)
    else:
        text = made.choices[0].message.content
    found = json.loads(text)
    assert found.keys() == {"a", "b"} and found["a"] in (1, 2) and found["b"] in (True, False)


def test_a_regex_and_a_grammar_are_kept_to(client):
    for extra in ({"regex": "[0-9]{3}"}, {"grammar": "start: /[0-9]{3}/"}):
        made = chat(client, model="tiny", extra_body=extra)
        assert made.choices[0].message.content.isdigit() and made.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body={"regex": "(a"})
    assert error.value.param == "regex"


# ---- log-probabilities ----


def test_23_logprobs_of_a_chat(client):
    made = chat(client, logprobs=True, top_logprobs=2, max_tokens=3)
    first, _, emoji = made.choices[0].logprobs.content
    assert (first.token, first.bytes) == ("o", [111])
    assert len(first.top_logprobs) == 2 and first.top_logprobs[0].logprob == first.logprob
    assert (emoji.token, emoji.bytes) == ("bytes:\\xf0", [0xF0])
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_24_25_logprobs_of_a_text_with_echo(client, llm, stream):
    options = {"model": "tiny", "prompt": "abc b", "logprobs": 2, "echo": True, "temperature": 0}
    score = llm.score("abc b")
    for limit in (0, 1):
        made = complete(client, max_tokens=limit, stream=stream, **options)
        choices = [each.choices[0] for each in made] if stream else made.choices
        text = "".join(each.text for each in choices)
        parts = [each.logprobs.to_dict() for each in choices if each.logprobs]
        found = {name: [each for part in parts for each in part[name]] for name in parts[0]}
        assert text.startswith("abc b") and (len(text) > 5) == bool(limit)
        count = len(score.token_ids)
        assert {len(column) for column in found.values()} == {count + limit}
        tokens, values, tops, offsets = (found[name][1:] for name in COLUMNS)
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        np.testing.assert_allclose(values[: count - 1], score.logprobs, rtol=1e-4)
        for token, value, top, offset in zip(tokens, values, tops, offsets):
            assert top[token] == value <= max(top.values()) and len(top) in (2, 3)
            assert text[offset:].startswith((token, token.lstrip())) or token.startswith("bytes:")


# ---- prompts ----


def test_26_a_prompt_of_token_ids(client, llm):
    ids = llm.tokenizer.encode("abc", bos=True)
    options = {"max_tokens": 9, **GREEDY}
    expected = complete(client, prompt="abc", **options).choices[0].text
    assert complete(client, prompt=ids, **options).choices[0].text == expected
    assert complete(client, prompt=[ids], **options).choices[0].text == expected


def test_27_prompts_keep_their_order(client):
    options = {"max_tokens": 9, **GREEDY}
    prompts = ["abc", "b", "the cab"]
    made = complete(client, prompt=prompts, **options).choices
    alone = [complete(client, prompt=each, **options).choices[0].text for each in prompts]
    assert [each.index for each in made] == [0, 1, 2]
    assert [each.text for each in made] == alone and len(set(alone)) == 3


def test_28_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    options = {"max_tokens": 20, **GREEDY}
    made = chat(client, messages=[{"role": "user", "content": parts}], **options)
    assert made.choices[0].message == chat(client, **options).choices[0].message


def test_29_a_developer_is_the_system(client):
    options = {"max_tokens": 20, **GREEDY}
    first, second = (
        chat(client, messages=[{"role": role, "content": "be brief"}, *HELLO], **options)
        for role in ("developer", "system")
    )
    assert first.choices == second.choices and first.usage == second.usage
    assert first.usage.prompt_tokens > chat(client, **options).usage.prompt_tokens


def test_31_characters_come_whole(client):
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert "".join(pieces) == SCRIPT
    assert "🙂" in SCRIPT and not any("\ufffd" in piece for piece in pieces)


def test_32_an_empty_prompt_starts_from_nothing(client):
    assert complete(client, prompt="").usage.prompt_tokens == 1


def test_an_answer_is_continued(client, llm):
    begun = [*HELLO, {"role": "assistant", "content": "on🙂"}]
    made = chat(client, messages=begun, extra_body={"continue_final_message": True})
    assert made.choices[0].message.content == "ly 本."
    with pytest.raises(openai.BadRequestError, match="last") as error:
        chat(client, messages=begun)
    assert error.value.param == "messages"


# ---- limits ----


def test_33_34_prompts_and_limits_beyond_the_context(server, client):
    for fields, param in (
        ({"prompt": "a b " * 300}, "prompt"),
        ({"prompt": "abc", "max_tokens": 510}, "max_tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match="512") as error:
            complete(client, **fields)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", param)
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, max_completion_tokens=500)
    assert error.value.param == "max_completion_tokens"
    ids = [1, *[9] * 504]  # the default limit of 16 is what is left
    assert complete(client, prompt=ids, model="tiny").usage.completion_tokens == 7


WRONG = [
    ({"messages": "hello"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "<|im_end|> [x"}]}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"repeat_penalty": -2}, "repeat_penalty"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"model": 5}, "model"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"stream_options": 1}, "stream_options"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda each: str(each)[:40])
def test_35_wrong_fields_are_named(server, fields, param):
    assert_refused(post(server, "/v1/chat/completions", {**CHAT, **fields}), 400, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 10**5, b"\xff\xfe"]
)
def test_36_bad_json_is_refused(server, body):
    assert_refused(post(server, "/v1/chat/completions", body), 400)


def test_errors_of_http_have_the_same_form(server):
    assert_refused(httpx.get(f"{server.url}/v2/models"), 404)
    assert_refused(httpx.get(f"{server.url}/v1/chat/completions"), 405)
    assert_refused(post(server, "/tokenize", b"a", headers={"content-type": "text/plain"}), 415)
    answer = httpx.get(f"{server.url}/health", headers={"x": "y" * 10**6})
    assert answer.status_code == 400 and "error" in answer.json()


def test_39_a_large_body_is_refused(server):
    assert_refused(post(server, "/v1/completions", {**TEXT, "prompt": "a" * 2**20}), 413)


# ---- keys ----


@pytest.fixture(scope="module")
def locked(serve):
    """A server with a key, which logs prompts."""
    flags = ("--allow_origin=https://a.example", "--log_prompts")
    return serve(*flags, env={"LLAMA_JAX_API_KEY": "secret"})


def test_37_a_wrong_key_is_refused(locked):
    for key in ("wrong", "secret2", ""):
        with pytest.raises(openai.AuthenticationError) as error:
            chat(locked.client(key or "x"))
        assert error.value.code == "invalid_api_key"
    answer = httpx.get(f"{locked.url}/v1/models", headers={"authorization": "Basic secret"})
    assert answer.status_code == 401
    assert chat(locked.client("secret")).choices[0].message.content == SCRIPT


def test_38_the_key_guards_every_route_but_health(locked):
    paths = ("/v1/models", "/v1/models/script", "/metrics", "/nowhere", "/v1/completions")
    assert {httpx.get(locked.url + path).status_code for path in paths} == {401}
    posts = (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
    )
    assert {post(locked, path, {}).status_code for path in posts} == {401}
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}


def test_other_origins_are_off_unless_named(locked, server):
    def allowed(url, origin):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        found = httpx.options(f"{url}/v1/chat/completions", headers=headers).headers
        return found.get("access-control-allow-origin")

    assert allowed(locked.url, "https://a.example") == "https://a.example"
    assert allowed(locked.url, "https://b.example") is None
    assert allowed(server.url, "https://a.example") is None


# ---- many clients ----


@pytest.fixture(scope="module")
def narrow(serve, folder):
    return serve(f"--model={folder / 'tiny'}", "--slots=1", "--max_waiting=1")


def test_40_a_full_queue_is_429_and_a_retry_works(narrow):
    client = narrow.client()
    long = {"prompt": "abc", "max_tokens": 500, **GREEDY}
    complete(client, **{**long, "max_tokens": 1})  # loads the model
    running = [complete(client, stream=True, **long) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as error:
        complete(client, **long)
    assert int(error.value.response.headers["retry-after"]) >= 1
    running[0].close()
    retried = complete(client.with_options(max_retries=5), prompt="b", max_tokens=3, **GREEDY)
    assert retried.usage.completion_tokens == 3
    running[1].close()


def is_idle(server, seconds):
    """Whether no slot is in use after at most so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        figures = server.figures()
        if not figures["llama_jax_active"] + figures["llama_jax_waiting"]:
            return True
        time.sleep(0.1)
    return False


def generated(server):
    return server.figures()["llama_jax_generated_tokens_total"]


@pytest.mark.parametrize("stream", [False, True])
def test_41_a_client_that_goes_frees_its_slot(server, stream):
    body = {"prompt": "abc", "max_tokens": 500, "n": 8, "stream": stream, **GREEDY}
    before = generated(server)
    url = f"{server.url}/v1/completions"
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", url, json=body, timeout=0.3) as answer,
    ):
        next(answer.iter_lines())
    assert is_idle(server, 2)
    assert generated(server) - before < 8 * 500


def test_42_twenty_clients_get_their_own_answers(server, llm):
    prompts = [f"abc {number} cab" for number in range(20)]
    options = {"max_tokens": 20, **GREEDY}

    async def all_at_once():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            calls = [client.completions.create(prompt=each, **options) for each in prompts]
            return [made.choices[0].text for made in await asyncio.gather(*calls)]

    expected = [each.text for each in llm.complete(prompts, temperature=0, max_tokens=20)]
    assert asyncio.run(all_at_once()) == expected


def test_a_client_that_never_reads_does_not_hold_up_others(server, client):
    body = json.dumps(
        {"prompt": "abc", "max_tokens": 500, "n": 8, "stream": True, **GREEDY}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert complete(client).choices[0].text == SCRIPT
    assert is_idle(server, 2)


def test_a_request_has_its_time(narrow, serve):
    quick = serve("--request_timeout=0.001")
    with pytest.raises(openai.APIStatusError) as error:
        complete(quick.client())
    assert error.value.status_code == 408
    assert error.value.response.headers["x-should-retry"] == "false"


# ---- faults and ends ----


def test_43_an_error_in_mid_stream_is_raised(serve):
    faulty = serve(script=__file__.replace("test_conformance", "faulty_server"))
    seen = []
    with pytest.raises(openai.APIError, match="server failed"):
        for chunk in chat(faulty.client(), stream=True):
            seen.append(chunk)
    assert len(seen) >= 2
    with pytest.raises(openai.InternalServerError, match="server failed"):
        chat(faulty.client())
    assert "Traceback" not in faulty.log and "device is lost" in faulty.log
    assert httpx.get(f"{faulty.url}/health").status_code == 200


def test_44_a_killed_server_starts_again_at_its_port_and_sigterm_drains_it(serve, folder):
    killed = serve(f"--model={folder / 'tiny'}")
    options = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 300}
    next(iter(complete(killed.client(), stream=True, n=8, **options)))
    killed.stop(signal.SIGKILL)
    server = serve(f"--model={folder / 'tiny'}", f"--port={killed.url.rpartition(':')[2]}")
    assert server.url == killed.url
    client = server.client()
    assert complete(client).choices[0].text == SCRIPT
    stream = complete(client, stream=True, **options)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log


def test_the_log_has_no_prompt_unless_asked(server, locked):
    for each, key in ((server, "none"), (locked, "secret")):
        complete(each.client(key), prompt="a secret wish")
    time.sleep(0.2)
    assert "secret wish" not in server.log and "secret wish" in locked.log


# ---- embeddings, token ids, metrics ----


def test_embeddings_are_those_of_the_library(client, llm):
    found = client.embeddings.create(model="tiny", input=["abc", "cab"])  # base64
    expected = llm.embed(["abc", "cab"])
    np.testing.assert_allclose([each.embedding for each in found.data], expected, rtol=1e-4)
    numbers = client.embeddings.create(model="tiny", input="abc", encoding_format="float")
    np.testing.assert_allclose(numbers.data[0].embedding, expected[0], rtol=1e-4)
    assert numbers.usage.prompt_tokens == len(llm.encode("texts", "abc")[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[99999]]}, "input"),
        ({"input": "a", "encoding_format": "x"}, "encoding_format"),
        ({"input": "a", "dimensions": 7}, "dimensions"),
    ],
)
def test_wrong_embeddings_are_named(server, fields, param):
    assert_refused(post(server, "/v1/embeddings", {"model": "tiny", **fields}), 400, param)


def test_token_ids_there_and_back(server, llm):
    found = post(server, "/tokenize", {"model": "tiny", "content": "abc 🙂"}).json()
    assert found == {"tokens": llm.tokenizer.encode("abc 🙂"), "count": len(found["tokens"])}
    back = post(server, "/detokenize", {"model": "tiny", "tokens": found["tokens"]})
    assert back.json() == {"content": "abc 🙂"}
    wrong = post(server, "/detokenize", {"model": "tiny", "tokens": [10**9]})
    assert_refused(wrong, 400, "tokens")
    theirs = post(server, "/extras/tokenize", {"model": "tiny", "input": "abc"}).json()["tokens"]
    assert theirs == llm.tokenizer.encode("abc", bos=True)
    count = post(server, "/extras/tokenize/count", {"model": "tiny", "input": "abc"}).json()
    assert count == {"count": len(theirs)}
    text = post(server, "/extras/detokenize", {"model": "tiny", "tokens": theirs}).json()
    assert text == {"text": "abc"}


def test_nothing_is_compiled_in_service(server):
    figures = server.figures()
    assert figures["llama_jax_requests_total"] > 50
    assert figures["llama_jax_compilations_total"] == 0
