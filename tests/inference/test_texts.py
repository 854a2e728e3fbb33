"""Texts as they grow: pieces add up, characters stay whole, rows say why they ended."""

import pytest
from tiny_model import make_model

from llama_jax.inference.completions import stop_ids, stream
from llama_jax.inference.decode import Chunk
from llama_jax.inference.engine import Engine
from llama_jax.inference.sampler import make_sampler
from llama_jax.model.unstacked import unstack
from llama_jax.text.tokenizer import train_tokenizer

STORIES = [f"Tim had {n} red sails. The sea was blue and the sun was warm." for n in range(50)]
SAMPLED = make_sampler(temperature=2.0)
PROMPTS = ["Tim had", "", "The sea was blue. Tim"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(STORIES, 290, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="module")
def model(tokenizer):
    return unstack(make_model(vocab_size=tokenizer.vocab_size, num_layers=1))


def test_pieces_add_up_to_the_decoded_ids(model, tokenizer):
    options = {"max_tokens": 20, "seeds": [1, 2, 3], "stop_ids": [tokenizer.eos_id]}
    encoded = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    texts, tokens, ends = [""] * 3, [0] * 3, [[], [], []]
    for piece in stream(Engine(model), tokenizer, encoded, SAMPLED, **options):
        texts[piece.row] += piece.text
        tokens[piece.row] += piece.tokens
        ends[piece.row].append(piece.finished)
    rows = [[], [], []]
    for chunk in Engine(model).generate(encoded, SAMPLED, **options):
        rows = [row + new for row, new in zip(rows, chunk.rows)]
    for row, ids in enumerate(rows):
        assert tokens[row] == len(ids) > 0
        whole = tokenizer.decode(encoded[row] + ids)
        assert whole == tokenizer.decode(encoded[row]) + texts[row]
        assert all(ends[row][-1:]) and not any(ends[row][:-1]), "a row ends once, and is last"


def scripted(monkeypatch, rows, finished):
    """Let the model say given ids, one to a chunk, and end for given reasons."""
    longest = max(map(len, rows))
    chunks = [
        Chunk(
            [row[i : i + 1] for row in rows],
            [end if i + 1 >= len(row) else "" for row, end in zip(rows, finished)],
            [[] for _ in rows],
        )
        for i in range(longest)
    ]
    monkeypatch.setattr(Engine, "generate", lambda *arguments, **options: iter(chunks))


def pieces(model, tokenizer, prompts, max_tokens=9, **more):
    seeds = [0] * len(prompts)
    options = {"max_tokens": max_tokens, "seeds": seeds, "stop_ids": []} | more
    encoded = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    return list(stream(Engine(model), tokenizer, encoded, SAMPLED, **options))


def test_a_character_is_held_back_until_it_is_whole(monkeypatch, model, tokenizer):
    ids = tokenizer.encode("é€😀", bos=False, eos=False)
    bytes_of = [token for token in ids if len(tokenizer.decode([token])) == 1]
    assert len(bytes_of) >= 9, "none of these characters is in the vocabulary"
    scripted(monkeypatch, [bytes_of], ["length"])
    shown = [piece.text for piece in pieces(model, tokenizer, ["Tim"])]
    assert shown == ["", "é", "", "", "€", "", "", "", "😀"]

    scripted(monkeypatch, [bytes_of[:-1]], ["length"])
    assert pieces(model, tokenizer, ["Tim"])[-1].text == "\ufffd" * 3


def test_the_reasons_for_ending(monkeypatch, model, tokenizer):
    tim = tokenizer.encode("Tim", bos=False, eos=False)[:1]
    scripted(monkeypatch, [tim * 2, tim, tim * 3], ["stop", "length", "length"])
    found = pieces(model, tokenizer, ["Tim", "", "Tim had " * 3], max_tokens=20)
    ends = {piece.row: piece.finished for piece in found if piece.finished}
    # the third prompt and 20 tokens more would not fit in the context of 32
    assert ends == {0: "stop", 1: "length", 2: "context"}
    assert [piece.row for piece in found] == [0, 1, 2, 0, 2, 2]


def test_a_limit_that_is_both_is_the_one_asked_for(model, tokenizer):
    room = model.config.context_length - len(tokenizer.encode("Tim", bos=True, eos=False))
    for max_tokens, reason in ((room, "length"), (room + 1, "context")):
        found = pieces(model, tokenizer, ["Tim"], max_tokens=max_tokens)
        assert sum(piece.tokens for piece in found) == room
        assert found[-1].finished == reason


def test_a_stop_string_cuts_across_tokens_and_ends_its_row_alone(monkeypatch, model, tokenizer):
    said = [tokenizer.encode(text, bos=False, eos=False) for text in ("blue sea.", "red sails red")]
    scripted(monkeypatch, said, ["length", "length"])
    found = pieces(model, tokenizer, ["Tim", ""], stops=["e se", "sailor"])
    texts = ["".join(piece.text for piece in found if piece.row == row) for row in (0, 1)]
    ends = {piece.row: piece.finished for piece in found if piece.finished}
    assert [text.strip() for text in texts] == ["blu", "red sails red"]
    assert ends == {0: "stop", 1: "length"}
    ids = sum((piece.ids for piece in found if piece.row == 0), ())
    assert tokenizer.decode(ids).endswith("e se") or "e se" in tokenizer.decode(ids)
    assert len(ids) < len(said[0])


def test_no_more_is_generated_once_all_rows_have_stopped(monkeypatch, model, tokenizer):
    tim = tokenizer.encode("Tim", bos=False, eos=False)

    def endless(*arguments, **options):
        yield Chunk([tim], [""], [[]])
        raise AssertionError("asked for more")

    monkeypatch.setattr(Engine, "generate", endless)
    assert pieces(model, tokenizer, [""], stops=["Tim"])[-1].finished == "stop"


def test_what_ends_a_text(tokenizer):
    assert stop_ids(tokenizer, starts_with_bos=False) == (tokenizer.eos_id,)
    assert set(stop_ids(tokenizer, starts_with_bos=True)) == {tokenizer.eos_id, tokenizer.bos_id}
