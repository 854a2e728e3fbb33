"""Text added to deltas: it adds up, characters stay complete, stop strings end it."""

import pytest
from tiny_model import make_model

from llama_jax.inference.completions import add_text, collect, encode_prompt, stop_ids
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request, SamplingParams, TokenLogprob
from llama_jax.model.transformer import unstack
from llama_jax.text.sentencepiece import train_tokenizer

STORIES = [f"Tim had {n} red sails. The sea was blue and the sun was warm." for n in range(50)]
PROMPTS = ["Tim had", "", "The sea was blue. Tim"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(STORIES, 290, tmp_path_factory.mktemp("tokenizer") / "t.model")


def request_for(tokenizer, prompts, **others):
    settings = {name: others.pop(name) for name in ("stop", "logprobs") if name in others}
    encoded = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    params = SamplingParams(temperature=2.0, max_tokens=20, seed=1, **settings)
    return Request.same_params(encoded, params, **others)


def scripted(rows, reasons):
    """Deltas of one id each, sequences in turn, the last with the reason for ending."""
    for place in range(max(map(len, rows))):
        for index, (ids, reason) in enumerate(zip(rows, reasons)):
            if place < len(ids):
                is_last = place + 1 == len(ids)
                yield Delta(index, (ids[place],), finish_reason=reason if is_last else "")


def test_deltas_add_up_to_the_decoded_ids(tokenizer):
    engine = Engine(unstack(make_model(vocab_size=tokenizer.vocab_size, num_layers=1)))
    request = request_for(tokenizer, PROMPTS, stop_ids=[tokenizer.eos_id], echo=PROMPTS)
    plain, deltas = list(engine.generate(request)), []
    deltas += add_text(engine.generate(request), request, tokenizer)
    assert [delta.ids for delta in deltas] == [delta.ids for delta in plain]
    for index, (prompt, completion) in enumerate(zip(PROMPTS, collect(deltas, request))):
        reasons = [delta.finish_reason for delta in deltas if delta.index == index]
        assert reasons[-1] == completion.finish_reason and not any(reasons[:-1])
        ids = [*request.prompts[index], *completion.token_ids]
        assert completion.text == tokenizer.decode(ids)
        assert completion.text.startswith(prompt) and completion.token_ids
        assert completion.usage.total_tokens == len(ids)


def test_a_character_is_held_back_until_it_is_complete(tokenizer):
    ids = tokenizer.encode("é€😀", bos=False, eos=False)
    ids_of_bytes = [token for token in ids if len(tokenizer.decode([token])) == 1]
    assert len(ids_of_bytes) >= 9, "none of these characters is in the vocabulary"
    request = request_for(tokenizer, ["Tim"])
    deltas = add_text(scripted([ids_of_bytes], ["length"]), request, tokenizer)
    assert [delta.text for delta in deltas] == ["", "é", "", "", "€", "", "", "", "😀"]
    *_, last = add_text(scripted([ids_of_bytes[:-1]], ["length"]), request, tokenizer)
    assert last.text == "\ufffd" * 3


def test_a_stop_string_spans_tokens_and_ends_its_own_sequence(tokenizer):
    rows = [tokenizer.encode(text, bos=False, eos=False) for text in ("blue sea.", "red sails red")]
    request = request_for(tokenizer, ["Tim", ""], stop=["e se"], stop_strings=("sailor",))
    first, second = collect(
        add_text(scripted(rows, ["length", "length"]), request, tokenizer), request
    )
    assert (first.text.strip(), first.finish_reason) == ("blu", "stop")
    assert (second.text.strip(), second.finish_reason) == ("red sails red", "length")
    assert "e se" in tokenizer.decode(first.token_ids) and len(first.token_ids) < len(rows[0])


def test_no_more_is_drawn_once_all_sequences_have_stopped(tokenizer):
    def endless():
        yield Delta(0, tuple(tokenizer.encode("Tim", bos=False, eos=False)))
        raise AssertionError("drew another delta")

    request = request_for(tokenizer, [""], stop="Tim")
    *_, last = add_text(endless(), request, tokenizer)
    assert last.finish_reason == "stop"


def test_leading_whitespace_is_stripped_on_request(tokenizer):
    ids = tokenizer.encode("\n\n Tim had \n", bos=False, eos=False)
    request = request_for(tokenizer, ["Tim"], strip=True)
    texts = [delta.text for delta in add_text(scripted([ids], ["stop"]), request, tokenizer)]
    assert "".join(texts) == "Tim had \n"


def test_log_probabilities_are_cut_with_their_ids_and_get_text(tokenizer):
    ids = tuple(tokenizer.encode("blue sea.", bos=False, eos=False))
    logprobs = tuple(TokenLogprob(token, -1.0, (TokenLogprob(ids[0], -0.5),)) for token in ids)
    request = request_for(tokenizer, ["Tim"], stop="u", logprobs=1)
    [completion] = collect(
        add_text([Delta(0, ids, logprobs, "length")], request, tokenizer), request
    )
    assert len(completion.logprobs) == len(completion.token_ids) < len(ids)
    for token, each in zip(completion.token_ids, completion.logprobs):
        assert (each.id, each.text) == (token, tokenizer.piece_text(token))
        assert each.top[0].text == tokenizer.piece_text(ids[0])


def test_the_ids_that_end_a_text(tokenizer):
    assert stop_ids(tokenizer, bos=False) == (tokenizer.eos_id,)
    assert set(stop_ids(tokenizer, bos=True)) == {tokenizer.eos_id, tokenizer.bos_id}
    assert stop_ids(tokenizer, bos=True, listed=(7, 9)) == (7, 9, tokenizer.bos_id)


def test_a_prompt_has_bos_only_if_the_model_wants_it(tokenizer):
    ids = tokenizer.encode("Tim")
    assert encode_prompt(tokenizer, "Tim", bos=True) == [tokenizer.bos_id, *ids]
    assert encode_prompt(tokenizer, "Tim", bos=False) == ids
    assert encode_prompt(tokenizer, "", bos=True) == [tokenizer.bos_id]
    assert encode_prompt(tokenizer, "", bos=False) == [tokenizer.eos_id]
