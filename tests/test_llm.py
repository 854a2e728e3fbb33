"""The library object: completions, chat, scores and embeddings of a small checkpoint."""

import dataclasses
import inspect
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_weights import tiny_weights

from llama_jax.errors import UsageError, UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.inference.completions import Completion
from llama_jax.inference.request import Delta, SamplingParams
from llama_jax.llm import LLM
from llama_jax.text.chat import TruncationWarning
from llama_jax.text.sentencepiece import train_tokenizer

TEXTS = [f"Tim saw {n} red boats on the blue sea and Anna was glad." for n in range(60)]
GREEDY = {"temperature": 0, "max_tokens": 12}
ONE_TOKEN = {"temperature": 0, "max_tokens": 1}
DIALOGUE = [{"role": "user", "content": "Tim saw"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llm")
    tokenizer = train_tokenizer(TEXTS, 320, place / "t.model")
    weights = tiny_weights(
        tokenizer=tokenizer.path.read_bytes(), vocab_size=320, num_layers=1, context_length=160
    )
    checkpoint_folder.write(weights, place / "ckpt")
    return place / "ckpt"


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def test_one_prompt_gives_one_completion(llm):
    made = llm.complete("Tim saw", **GREEDY)
    assert isinstance(made, Completion)
    assert made.finish_reason == "length"
    assert made.usage.completion_tokens == len(made.token_ids) == 12
    prompt = llm.tokenizer.encode("Tim saw", bos=True, eos=False)
    assert made.usage.prompt_tokens == len(prompt)
    assert made.usage.total_tokens == len(prompt) + 12
    whole = llm.tokenizer.decode([*prompt, *made.token_ids])
    assert whole == "Tim saw" + made.text
    assert made.logprobs is None


def test_a_list_gives_a_list_with_n_completions_each(llm):
    [one] = llm.complete(["Tim saw"], **GREEDY)
    assert one == llm.complete("Tim saw", **GREEDY)
    sampled = {"max_tokens": 9, "temperature": 1.5}
    both = llm.complete(["Tim", "Anna was"], n=2, seed=3, **sampled)
    assert len(both) == 4
    assert both[0] != both[1]
    for made, prompt, seed in ((both[1], "Tim", 4), (both[2], "Anna was", 3)):
        alone = llm.complete(prompt, seed=seed, **sampled)
        assert alone.token_ids == made.token_ids, "completion j has seed + j"


def test_a_completion_or_an_answer_may_be_constrained(llm):
    options = {"temperature": 1.0, "max_tokens": 30, "regex": " ?(red|blue) boats"}
    texts = ("red boats", "blue boats", " red boats", " blue boats")
    for prompt in ("", "Tim saw"):
        for seed in range(3):
            made = llm.complete(prompt, seed=seed, echo=True, **options)
            assert made.text in [prompt + text for text in texts]
    answers = [llm.chat(DIALOGUE, seed=seed, **options).text for seed in range(6)]
    assert set(answers) <= set(texts)
    assert any(answer.startswith(" ") for answer in answers), "a space of the text is kept"
    schema = {"enum": ["red", "blue"]}
    parts = llm.complete("Tim saw", json_schema=schema, stream=True)
    assert json.loads("".join(part.text for part in parts)) in ("red", "blue")


def test_an_empty_prompt_starts_from_nothing(llm):
    assert llm.complete("", **GREEDY).usage.prompt_tokens == 1


def test_deltas_add_up(llm):
    options = {"max_tokens": 20, "temperature": 1.5, "n": 2, "seed": 1}
    whole = llm.complete(["Tim", "Anna"], echo=True, **options)
    texts, ends = [""] * 4, [""] * 4
    for delta in llm.complete(["Tim", "Anna"], echo=True, stream=True, **options):
        assert isinstance(delta, Delta)
        assert not ends[delta.index]
        texts[delta.index] += delta.text
        ends[delta.index] = delta.finish_reason
    assert texts == [made.text for made in whole]
    assert ends == [made.finish_reason for made in whole]
    assert texts[0].startswith("Tim") and texts[3].startswith("Anna")


def test_a_stop_string_ends_a_text_and_is_excluded(llm):
    free = llm.complete("Tim saw", **GREEDY).text
    stop = free[5:8]
    at = free.index(stop)
    made = llm.complete("Tim saw", stop=stop, **GREEDY)
    assert (made.text, made.finish_reason) == (free[:at], "stop")
    assert made.usage.completion_tokens < 12
    shown = "".join(p.text for p in llm.complete("Tim saw", stop=[stop], stream=True, **GREEDY))
    assert shown == free[:at]


def test_log_probabilities_belong_to_the_tokens(llm):
    made = llm.complete("Tim saw", logprobs=2, **GREEDY)
    assert len(made.logprobs) == 12
    for each in made.logprobs:
        assert each.top[0].id == each.id, "greedy takes the most likely"
        assert each.top[0].logprob == each.logprob >= each.top[1].logprob
        assert each.text == llm.tokenizer.piece_text(each.id)
    assert llm.complete("Tim saw", logprobs=0, **GREEDY).logprobs[0].top == ()


def test_log_probabilities_agree_with_the_score(llm):
    words = {token for text in TEXTS for token in llm.tokenizer.encode(text, bos=False, eos=False)}
    words = {token for token in words if llm.tokenizer.piece_text(token).startswith(" ")}
    only_words = dict.fromkeys(words, 100.0)  # whole ones: their text has no other spelling
    options = {"logit_bias": only_words, "temperature": 1.5, "max_tokens": 12}
    made = llm.complete("Tim saw", logprobs=0, **options)
    ids = (*llm.tokenizer.encode("Tim saw", bos=True, eos=False), *made.token_ids)
    score = llm.score(llm.tokenizer.decode(ids))
    assert score.token_ids == ids and len(set(made.token_ids)) > 3
    logprobs = [each.logprob for each in made.logprobs]
    np.testing.assert_allclose(score.logprobs[-12:], logprobs, atol=1e-4)


def test_scores(llm):
    scores = llm.score([*TEXTS[:20], ""])
    assert len(scores) == 21
    alone = llm.score(TEXTS[7])
    np.testing.assert_allclose(scores[7].logprobs, alone.logprobs, atol=1e-5)
    assert len(alone.logprobs) == len(alone.token_ids) - 1
    assert alone.total == pytest.approx(sum(alone.logprobs))
    assert alone.perplexity == pytest.approx(math.exp(-alone.total / len(alone.logprobs)))
    assert (scores[20].logprobs, scores[20].total, scores[20].perplexity) == ((), 0.0, 1.0)


def test_embeddings(llm):
    both = llm.embed(["Tim saw boats", "Anna"])
    assert both.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(llm.embed("Anna"), both[1], atol=1e-5)
    assert np.linalg.norm(llm.embed("Anna", normalize=False)) != pytest.approx(1)


def test_chat_uses_its_template(llm):
    answer = llm.chat(DIALOGUE, **GREEDY)
    ids = llm.tokenizer.encode("[INST] Tim saw [/INST]", bos=True, eos=False)
    assert answer.usage.prompt_tokens == len(ids)
    plain = llm.complete("[INST] Tim saw [/INST]", **GREEDY)
    assert answer.text == plain.text.lstrip()
    shown = "".join(piece.text for piece in llm.chat(DIALOGUE, stream=True, **GREEDY))
    assert shown == answer.text
    assert llm.chat(DIALOGUE, template="alpaca", **ONE_TOKEN).usage.prompt_tokens > 30


def test_a_dialogue_that_outgrows_the_context_is_refused_or_truncated_with_a_warning(folder):
    llm = LLM(folder, max_context=60)
    turns = [{"role": role, "content": "Tim saw"} for role in ("user", "assistant")] * 4
    with pytest.raises(UserError, match="tokens, but the context has room for 48; shorten"):
        llm.chat([*turns, *DIALOGUE], **GREEDY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # as in a program that sets no filters
        warnings.simplefilter("always", TruncationWarning, append=True)
        for _ in range(2):
            answer = llm.chat([*turns, *DIALOGUE], truncate=True, **GREEDY)
    assert ["left out" in str(warning.message) for warning in caught] == [True, True]
    assert answer.usage.total_tokens <= 60
    assert answer.dropped in range(1, 5)
    assert llm.chat(DIALOGUE, truncate=True, **GREEDY).dropped == 0


def test_an_answer_has_at_least_a_quarter_of_the_context(folder):
    llm = LLM(folder, max_context=60)
    answer = llm.chat(DIALOGUE, temperature=0, max_tokens=50)
    assert answer.usage.prompt_tokens > 60 - 50
    turns = [{"role": role, "content": "Tim saw"} for role in ("user", "assistant")] * 4
    with pytest.raises(UserError, match="tokens, but the context has room for 45; shorten"):
        llm.chat([*turns, *DIALOGUE], temperature=0, max_tokens=50)


def test_a_smaller_context_ends_earlier(folder):
    llm = LLM(folder, max_context=20)
    made = llm.complete("Tim", temperature=0, max_tokens=50)
    assert (made.usage.total_tokens, made.finish_reason) == (20, "length")


def test_a_quantized_model_generates_and_scores(folder, llm):
    small = LLM(folder, quantize="int8")
    assert small.complete("Tim saw", **GREEDY).usage.completion_tokens == 12
    exact, near = llm.score(TEXTS[0]).total, small.score(TEXTS[0]).total
    assert near == pytest.approx(exact, rel=0.1) and near != exact


def test_a_checkpoint_chooses_its_chat_format(folder, llm, tmp_path):
    def loaded(chat_template, **options):
        tree = json.loads((folder / "config.json").read_text()) | {"chat_template": chat_template}
        (copy / "config.json").write_text(json.dumps(tree))
        return LLM(copy, **options)

    copy = shutil.copytree(folder, tmp_path / "ckpt")
    [short, long] = [
        llm.chat(DIALOGUE, template=name, **ONE_TOKEN).usage.prompt_tokens
        for name in ("llama2", "alpaca")
    ]
    assert short < long
    for chat_template, options, expected in [
        ("", {}, short),
        ("", {"template": "alpaca"}, long),
        ("alpaca", {}, long),
        ("alpaca", {"template": "llama2"}, short),
        ("none", {"template": "alpaca"}, long),
    ]:
        made = loaded(chat_template, **options).chat(DIALOGUE, **ONE_TOKEN)
        assert made.usage.prompt_tokens == expected
    none = loaded("none")
    assert none.chat(DIALOGUE, template="alpaca", **ONE_TOKEN).usage.prompt_tokens == long
    with pytest.raises(UserError, match="trained on no chat format; choose a template"):
        none.chat(DIALOGUE)
    with pytest.raises(UsageError, match="template='chatm' is unknown"):
        loaded("chatm").chat(DIALOGUE)


@pytest.mark.slow
def test_eight_devices_give_the_same_as_one(folder, tmp_path):
    tokenizer = (folder / "tokenizer.model").read_bytes()
    sizes = {"vocab_size": 320, "dim": 48, "num_heads": 8, "num_kv_heads": 8, "hidden_dim": 64}
    weights = tiny_weights(tokenizer=tokenizer, num_layers=2, context_length=160, **sizes)
    checkpoint_folder.write(weights, tmp_path / "ckpt")
    one, eight = LLM(tmp_path / "ckpt"), LLM(tmp_path / "ckpt", tensor=8)
    kernel = eight.engine.model.blocks[1].ffn.gate.kernel[...]
    assert len(kernel.addressable_shards) == 8
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    ours, theirs = (llm.complete(["Tim", "Anna was"], **GREEDY) for llm in (one, eight))
    assert ours == theirs and len(set(ours[0].token_ids)) > 2
    dialogue, answers = list(DIALOGUE), []
    for _ in range(2):  # the second turn goes on with the first's cache
        both = [llm.chat(dialogue, max_tokens=6, temperature=0) for llm in (one, eight)]
        assert both[0] == both[1]
        answers.append(both[0].text)
        answer = {"role": "assistant", "content": both[0].text}
        dialogue = [*dialogue, answer, {"role": "user", "content": "And?"}]
    layer = jax.tree.leaves(eight.engine._kept[1].layers)[0]
    assert layer.addressable_shards[0].data.size == layer.size // 8
    totals = [llm.score(TEXTS[0]).total for llm in (one, eight)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"top_p": 0}, "top_p=0 is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0 is out of range"),
        ({"n": 0}, "n=0 is out of range"),
        ({"n": 10**9}, "n=1000000000 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"logprobs": -1}, "logprobs=-1 is out of range"),
        ({"logprobs": 321}, "logprobs=321 is out of range"),
        ({"stop": [3]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {320: 1.0}}, "logit_bias has the token id 320; expected 0 to 319"),
        ({"speculate": True}, "speculate"),
        ({"rng": "xorshift", "seed": 1, "top_k": 3}, "top_k=3 does not go with rng='xorshift'"),
    ],
)
def test_an_argument_out_of_range_is_named(llm, options, message):
    with pytest.raises(ValueError, match=message) as error:
        llm.complete("Tim", **options)
    assert "\n" not in str(error.value)


def test_a_stream_refuses_at_the_call(llm):
    for prompt, options in (("boats " * 200, {}), ("Tim", {"logit_bias": {320: 1}})):
        with pytest.raises(UserError):
            llm.complete(prompt, stream=True, echo=True, **options)


def test_arguments_by_name(llm):
    nothing = dict.fromkeys(["stop", "logit_bias", "logprobs"])
    assert llm.complete("Tim", **GREEDY, **nothing) == llm.complete("Tim", **GREEDY)
    with pytest.raises(UsageError, match=r"'temprature' is an .*; did you mean 'temperature'"):
        llm.complete("Tim", temprature=1)
    with pytest.raises(UsageError, match=r"'top_q' is an unknown argument; did you mean 'top_[pk]"):
        llm.chat(DIALOGUE, top_q=1)
    with pytest.raises(UsageError, match="a chat has one answer; leave n out, or use complete"):
        llm.chat(DIALOGUE, n=2)


@pytest.mark.parametrize("method", [LLM.complete, LLM.chat])
def test_signatures_show_the_sampling_parameters_with_their_defaults(method):
    shown = inspect.signature(method).parameters
    for name, parameter in inspect.signature(SamplingParams).parameters.items():
        assert (shown[name].default, shown[name].kind) == (parameter.default, parameter.kind)
    assert "params" not in shown


def test_the_repr_says_what_is_loaded(folder, llm):
    assert repr(llm) == f"LLM('{folder}': 1 layer of dim 24, float32, context 160)"


def test_a_chat_takes_as_many_stops_as_a_completion(llm):
    stops = [f"{n}%" for n in range(32)]
    assert llm.chat(DIALOGUE, stop=stops, **GREEDY) == llm.chat(DIALOGUE, **GREEDY)
    with pytest.raises(UsageError, match="stop has 33 texts; expected at most 32"):
        llm.chat(DIALOGUE, stop=[*stops, "!"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 1}, r"max_context=1 is out of range; expected 2 to 160, the model's"),
        ({"max_context": 161}, "max_context=161 is out of range"),
        ({"max_context": 50.5}, "max_context=50.5 is not an integer"),
        ({"max_context": "50"}, "max_context='50' is not an integer"),
        ({"template": 5}, "template=5 is not text; expected one of llama2, alpaca"),
        ({"template": "chatm"}, "template='chatm' is unknown"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' is unknown"),
        ({"quantize": "int2"}, "quantize='int2' is unknown"),
        ({"tensor": 9}, "tensor=9 is out of range"),
    ],
)
def test_an_invalid_setting_is_named(folder, options, message):
    with pytest.raises(UsageError, match=message):
        LLM(folder, **options)


def described(folder, place, **changes):
    """Load a copy of a checkpoint with another description."""
    copy = shutil.copytree(folder, place)
    tree = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(tree))
    return LLM(copy)


def test_prompts_of_token_ids(llm):
    ids = llm.tokenizer.encode("Tim saw", bos=True)
    text = llm.complete("Tim saw", **GREEDY)
    both = llm.complete([ids, "Tim saw"], echo=True, **GREEDY)
    assert both[0] == both[1] and both[0].text == "Tim saw" + text.text
    assert llm.complete([ids[1:]], **ONE_TOKEN)[0].usage.prompt_tokens == len(ids) - 1
    assert llm.score([ids]) == [llm.score("Tim saw")]
    for wrong in (320, -1):
        with pytest.raises(UserError, match=rf"the token id {wrong}; expected 0 to 319"):
            llm.complete([[1, wrong]])


def test_bos_is_put_before_texts_only_where_the_model_wants_it(folder, llm, tmp_path):
    without = described(folder, tmp_path / "ckpt", bos=False)
    ids = llm.tokenizer.encode("Tim saw")
    assert without.complete("Tim saw", **ONE_TOKEN).usage.prompt_tokens == len(ids)
    assert without.score("Tim saw").token_ids == tuple(ids)
    assert llm.score("Tim saw").token_ids == (llm.tokenizer.bos_id, *ids)
    assert without.score("").token_ids == (llm.tokenizer.eos_id,)
    assert not np.allclose(without.embed("Tim saw"), llm.embed("Tim saw"))


def test_stop_ids_are_those_of_the_description(folder, llm, tmp_path):
    ids = llm.complete("Tim saw", **GREEDY).token_ids
    stop = ids[3]
    made = described(folder, tmp_path / "ckpt", stop_ids=[stop]).complete("Tim saw", **GREEDY)
    assert made.token_ids == ids[: ids.index(stop)] and made.finish_reason == "stop"


def test_a_stop_can_name_a_control_token(llm):
    request = llm.request("Tim", SamplingParams(stop=["</s>", "x"]))
    assert llm.tokenizer.special_ids["</s>"] in request.stop_ids
    bare = llm.request("Tim", SamplingParams(stop="<s>")).stop_ids
    assert bare[-1] == llm.tokenizer.bos_id


def test_recommended_sampling_applies_where_nothing_is_set(folder, tmp_path):
    recommended = {"temperature": 0, "repetition_penalty": 1.3}
    llm = described(folder, tmp_path / "ckpt", generation=recommended)
    options = {"max_tokens": 12}
    assert llm.complete("Tim saw", **options) == llm.complete("Tim saw", **options, **recommended)
    params = llm.sampling_params(temperature=0.5, top_k=None)
    assert (params.temperature, params.repetition_penalty, params.top_k) == (0.5, 1.3, 0)
    assert llm.sampling_params(rng="xorshift", seed=1).repetition_penalty == 1
    assert llm.chat(DIALOGUE, **options) == llm.chat(DIALOGUE, **options, **recommended)


def test_a_chat_in_the_checkpoints_own_jinja_template(folder, llm, tmp_path):
    source = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    own = described(folder, tmp_path / "ckpt", chat_template=source + "{% endfor %}")
    assert (own.chat_format, llm.chat_format) == ("jinja", "")
    assert own.chat(DIALOGUE, **GREEDY) == llm.chat(DIALOGUE, **GREEDY)
    with pytest.raises(UserError, match="the chat template does not parse"):
        llm.chat(DIALOGUE, template=source)


@pytest.mark.parametrize("prompt", [3, [], [3], None, ["a", None], [["a"]], [[]]])
def test_a_prompt_that_is_not_text_is_refused(llm, prompt):
    with pytest.raises(UsageError, match="prompt="):
        llm.complete(prompt)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(llm):
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens; expected 1 to 159"):
        llm.complete("boats " * 200)
    with pytest.raises(UserError, match=r"a text has \d+ tokens; expected at most 160"):
        llm.embed("boats " * 200)
    assert len(llm.score("boats " * 200).logprobs) > llm.context_length


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [{"role": "robot", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "[INST]"}],
    ],
)
def test_a_malformed_dialogue_is_one_line(llm, messages):
    with pytest.raises(UserError) as error:
        llm.chat(messages)
    assert "\n" not in str(error.value)


def test_results_are_plain_data(llm):
    made = llm.complete("Tim", logprobs=1, **GREEDY)
    assert json.loads(json.dumps(dataclasses.asdict(made)))["text"] == made.text


def test_the_readmes_example_runs(folder, capsys):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    example, *_ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(example.replace("ckpt/", str(folder)), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("(24,)") and "length 20" in lines[-2]
