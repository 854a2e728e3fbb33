"""The README's examples as shown, LangChain, lm-evaluation-harness, and wild requests."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from servers import SCRIPT, Server, write_scripted, write_tiny

from llama_jax.serving.fields import ALIASES, NUMBERS, UNSUPPORTED

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.serve
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SECTION = README.split("## Serve\n", 1)[1].split("\n## ", 1)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("clients")
    flags = [f"--model=smollm2={write_scripted(place / 'script')}"]
    flags += [f"--model=tiny={write_tiny(place / 'tiny')}"]
    made = Server(*flags, env={"LLAMA_JAX_CACHE": str(place / "cache")})
    yield made
    made.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def examples(language):
    """The code blocks of the README's section that are of a language, "" for a shell's."""
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)


def test_the_curl_example_runs(server):
    [command] = [each for each in examples("") if each.startswith("curl")]
    words = shlex.split(command.replace("\\\n", "").replace("http://127.0.0.1:8000", server.url))
    done = subprocess.run([*words, "-sS"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == SCRIPT


@pytest.mark.parametrize("example", examples("python"), ids=["openai", "LangChain"])
def test_the_python_examples_run(server, example):
    source = example.replace("http://127.0.0.1:8000", server.url)
    command = [sys.executable, "-W", "ignore", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, SCRIPT), done.stderr


def test_langchain_streams_and_counts(server):
    langchain = pytest.importorskip("langchain_openai")
    url = f"{server.url}/v1"
    llm = langchain.ChatOpenAI(base_url=url, api_key="none", model="smollm2", stream_usage=True)
    chunks = list(llm.stream("hello"))
    assert "".join(chunk.text for chunk in chunks) == SCRIPT
    counts = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert counts[-1]["output_tokens"] == len(SCRIPT.encode())
    vectors = langchain.OpenAIEmbeddings(
        base_url=url, api_key="none", model="tiny", check_embedding_ctx_length=False
    ).embed_documents(["abc", "cab"])
    assert [len(vector) for vector in vectors] == [24, 24]
    llm.root_client.close()


def test_lm_evaluation_harness_reads_log_probabilities(server, http):
    models = pytest.importorskip("lm_eval.models.openai_completions")
    llm = server.client()
    ids = http.post("/tokenize", json={"model": "tiny", "content": "abc cab"}).json()["tokens"]
    options = {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
    made = llm.completions.create(model="tiny", prompt=[[1, *ids]], **options).to_dict()
    read = models.LocalCompletionsAPI.parse_logprobs
    [(total, is_greedy)] = read(made, tokens=[[1, *ids]], ctxlens=[3])
    logprobs = made["choices"][0]["logprobs"]["token_logprobs"]
    assert total == sum(logprobs[3 : 1 + len(ids)]) and is_greedy is False


# ---- wild requests ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
SMALL = st.sampled_from([0, 1, 2, -1, 0.5, 1.5, 10**20, True, None, "", "x", [], ["x"], {}])
NAMES = ["stop", "n", "best_of", "logit_bias", "seed", "stream", "logprobs", "top_logprobs"]
NAMES += ["top_k", "echo", "stream_options", "user", "continue_final_message", "tools"]
NAMES += ["response_format", "tool_choice", "grammar", "regex"]
FIELDS = st.dictionaries(
    st.sampled_from([*NAMES, *NUMBERS, *ALIASES, *UNSUPPORTED]), SMALL | JSON, max_size=3
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer", "tool"])},
    optional={"content": st.text(max_size=9) | JSON, "name": JSON},
)
IDS = st.lists(st.integers(-1, 300), max_size=5)
BODIES = {
    "/v1/chat/completions": {"messages": st.lists(MESSAGE, max_size=4) | JSON},
    "/v1/completions": {"prompt": st.text(max_size=9) | IDS | st.lists(IDS, max_size=3) | JSON},
    "/v1/embeddings": {"input": st.text(max_size=9) | IDS | JSON, "encoding_format": SMALL},
    "/tokenize": {"content": st.text() | JSON},
    "/detokenize": {"tokens": IDS | JSON},
    "/extras/tokenize": {"input": JSON},
}
MODELS = st.sampled_from(["tiny", "smollm2", "tiny", "other", "", 5, None])
WILD = settings(
    max_examples=60 * int(os.environ.get("FAULTS", "1")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_answered(answer):
    """Assert that an answer is a success, or a refusal in OpenAI's form."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize("path", BODIES)
@WILD
@given(data=st.data())
def test_no_body_makes_the_server_fail(http, path, data):
    body = data.draw(st.fixed_dictionaries({"model": MODELS, **BODIES[path]}))
    extras = data.draw(FIELDS)
    limit = {"max_tokens": 2} if "completions" in path else {}
    content = json.dumps(limit | extras | body)
    headers = {"content-type": "application/json"}
    assert_answered(http.post(path, content=content, headers=headers))


@WILD
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"]),
    path=st.sampled_from([*BODIES, "/v1/models", "/metrics", "/health", "/", "/v1/models/x"])
    | st.text(max_size=9).map(lambda text: "/" + urllib.parse.quote(text, safe="")),
    content=st.binary(max_size=40),
    kind=st.sampled_from(["application/json", "text/plain", "", "application/json; charset=x"]),
)
def test_no_request_makes_the_server_fail(http, method, path, content, kind):
    answer = http.request(method, path, content=content, headers={"content-type": kind})
    assert answer.status_code < 500
    assert answer.headers["x-request-id"]
