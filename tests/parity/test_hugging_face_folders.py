"""Hugging Face folders against transformers: the same logits, tensors and token ids, both ways."""

import dataclasses
import json
import os
import random
import shutil

import jax
import numpy as np
import pytest
from tiny_tokenizer import TEXTS, keys_of, library_of
from tiny_weights import SIZES, built, same, tiny_vocabulary, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.formats.byte_level import bos_template
from llama_jax.formats.gguf.vocabulary import read_tokenizer
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.text.tokenizer import load_tokenizer, parse_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # the models are tiny; threads that wait for each other would cost more

B, T, V = 3, 31, SIZES["vocab_size"]
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 16}
THETA_AND_EPS = {"rope_theta": 5e5, "rms_norm_eps": 1e-6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
MODELS = {  # by name: their config where it differs, as config.json spelled it over the years
    "untied": {},
    "tied, no groups": {"tie_word_embeddings": True, "num_key_value_heads": 6} | THETA_AND_EPS,
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama 3.2": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {"rope_scaling": YARN},
    "yarn, by hand": {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_fast": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "wide heads": {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 48},
    "one more token": {"vocab_size": 32_001, "num_hidden_layers": 1},
    "mistral": {"sliding_window": 5},
}
OURS = {  # by name: our config where it differs
    "tied": {"rope_theta": 5e5, "norm_eps": 1e-6},
    "linear, no groups": {"rope_scaling": RopeScaling(kind="linear", factor=4), "num_kv_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True, "tied_embeddings": False},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context=8)},
    "yarn, by hand": {
        "rope_scaling": RopeScaling(
            kind="yarn", factor=3.0, original_context=9, attention_factor=1.3, truncate=False
        )
    },
    "dynamic": {"rope_scaling": RopeScaling(kind="dynamic", factor=3.0, original_context=10)},
    "wide heads": {"dim": 64, "num_heads": 2, "head_dim": 48},
    "mistral": {"sliding_window": 5},
    "llama3, untied": {
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=16),
        "tied_embeddings": False,
    },
    "one more token": {"vocab_size": 32_001, "num_layers": 1},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def their_model(seed=0, **changes):
    """A random model of theirs whose every tensor matters."""
    torch.manual_seed(seed)
    keys = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    keys |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32}
    is_mistral = "sliding_window" in changes
    config = transformers.MistralConfig if is_mistral else transformers.LlamaConfig
    model = transformers.AutoModelForCausalLM.from_config(config(**keys | changes))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def their_logits(model):
    return model.float()(torch.tensor(TOKENS_BT)).logits.detach().numpy()


def our_logits(weights):
    config = dataclasses.replace(weights.config, compute_dtype="float32")
    model = built(dataclasses.replace(weights, config=config))
    return np.asarray(jax.jit(lambda model: model(TOKENS_BT)[0])(model))


def assert_close(ours, theirs):
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_their_model_gives_their_logits_here(name, tmp_path):
    theirs = their_model(**MODELS[name])
    theirs.save_pretrained(tmp_path)
    weights = hugging_face.read(tmp_path)
    assert weights.config.hidden_dim == 40
    assert weights.config.compute_dtype == "float32"
    assert_close(our_logits(weights), their_logits(theirs))


@pytest.mark.parametrize("name", OURS)
def test_our_model_gives_our_logits_there(name, tmp_path):
    weights = tiny_weights(**OURS[name])
    hugging_face.write(weights, tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == torch.float32
    assert_close(our_logits(weights), their_logits(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_their_tensors_are_the_same(dtype, tied, tmp_path):
    theirs = their_model(tie_word_embeddings=tied).to(DTYPES[dtype])
    theirs.save_pretrained(tmp_path / "one", max_shard_size="4KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    weights = hugging_face.read(tmp_path / "one")
    assert weights.config.compute_dtype == ("float32" if dtype == "float32" else "bfloat16")
    hugging_face.write(weights, tmp_path / "two", max_shard_bytes=9e3)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, param in back.state_dict().items():
        assert param.dtype == DTYPES[dtype]
        assert torch.equal(param, expected[name]), name


def test_their_pickles_are_read_like_safetensors(tmp_path):
    theirs = their_model(attention_bias=True, tie_word_embeddings=True)
    for name in ("one", "two"):
        theirs.save_pretrained(tmp_path / name)
    torch.save(theirs.state_dict(), tmp_path / "two" / "pytorch_model.bin")
    (tmp_path / "two" / "model.safetensors").unlink()
    same(hugging_face.read(tmp_path / "two"), hugging_face.read(tmp_path / "one"))


def test_bfloat16_files_give_the_logits_of_their_rounded_numbers(tmp_path):
    their_model().to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(our_logits(hugging_face.read(tmp_path)), their_logits(theirs))


def test_several_stop_ids_are_kept_both_ways(tmp_path):
    """As in Llama 3.2, whose generation_config.json lists three."""
    stops, prompt_BT = [7, 5, 282], torch.tensor(TOKENS_BT[:1, :20])
    theirs = their_model(**MODELS["llama 3.2"], eos_token_id=stops)
    theirs.save_pretrained(tmp_path / "one")
    settings = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == stops
    weights = hugging_face.read(tmp_path / "one")
    assert weights.stop_ids == tuple(stops)
    continued = theirs.generate(prompt_BT, max_new_tokens=9, do_sample=False, eos_token_id=None)
    chosen = continued[0, 20:].tolist()
    own = (0, chosen[-1], chosen[5])  # of which greedy decoding meets the last first
    weights = dataclasses.replace(weights, tokenizer=tiny_vocabulary().to_model(), stop_ids=own)
    hugging_face.write(weights, tmp_path / "two")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert back.generation_config.eos_token_id == list(own)
    found = hugging_face.read(tmp_path / "two").stop_ids
    assert {*found} == {*own, 2}  # the tokenizer's own </s>
    assert_close(our_logits(weights), their_logits(back))
    ended = back.generate(prompt_BT, max_new_tokens=9, do_sample=False)[0, 20:].tolist()
    assert ended == chosen[: 1 + min(map(chosen.index, {*own} & {*chosen}))]


def test_their_config_comes_back_whole(tmp_path):
    rope = LLAMA3 | {"rope_theta": 5e5}
    theirs = their_model(rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "one")
    hugging_face.write(hugging_face.read(tmp_path / "one"), tmp_path / "two")
    one, two = (transformers.AutoConfig.from_pretrained(tmp_path / n) for n in ("one", "two"))
    assert two.to_dict() | {"_name_or_path": ""} == one.to_dict() | {"_name_or_path": ""}


def test_safetensors_of_the_reference_library_read_alike(tmp_path):
    from safetensors.numpy import load_file

    weights = tiny_weights("bfloat16")
    hugging_face.write(weights, tmp_path / "model")
    theirs = load_file(tmp_path / "model" / "model.safetensors")
    query = theirs["model.layers.1.self_attn.q_proj.weight"]
    ours = weights.tensors["blocks.1.attention.wq.kernel"].read()
    assert query.shape == (24, 24) and query.dtype == ours.dtype
    assert (query == ours.reshape(24, 24).T).all()


def texts(folder, accents="\u0301"):
    """Real texts, runs of spaces, and nonsense that is hard on a tokenizer."""
    vectors = (folder / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert len(vectors) == 47
    story = (folder / "tinystories.txt").read_text()[:30_000]
    chance = random.Random(0)
    letters = "   aab ▁\nthe?é你🦙\t012\0ﬁ" + accents
    nonsense = ["".join(chance.choices(letters, k=chance.randrange(40))) for _ in range(300)]
    spaces = ["a" * (n % 3) + " " * n + "b" * (n % 2) for n in range(70)]
    return [*vectors, *nonsense, *spaces, *(story[i : i + 999] for i in range(0, 30_000, 999))]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("name", "size"), [("tokenizer", 32_000), ("tok512", 512)])
def test_their_tokenizer_encodes_and_decodes_like_ours(name, size, bos, shared_data, tmp_path):
    ours = load_tokenizer(shared_data / f"{name}.model")
    model = (shared_data / f"{name}.model").read_bytes()
    weights = tiny_weights(vocab_size=size, tokenizer=model)
    hugging_face.write(dataclasses.replace(weights, bos=bos), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2) and len(theirs) == size
    assert theirs("a").keys() == {"input_ids", "attention_mask"}
    for text in texts(shared_data):
        ids = ours.encode(text, bos=bos, eos=False)
        assert theirs(text)["input_ids"] == ids, repr(text)
        if "▁" not in text:
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)


@pytest.mark.parametrize("name", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_byte_level_tokenizer_is_theirs_as_it_is(name, bos, shared_data, tmp_path):
    content = read_tokenizer(keys_of(library_of(name), name))
    tokenizer = parse_tokenizer(content, tmp_path)
    weights = tiny_weights(vocab_size=tokenizer.vocab_size, tokenizer=content)
    hugging_face.write(dataclasses.replace(weights, bos=bos), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert len(theirs) == tokenizer.vocab_size
    back = hugging_face.read(tmp_path / "model")
    assert back.bos is bos
    for text in [*texts(shared_data), *TEXTS]:
        ids = tokenizer.encode(text, bos=bos)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, repr(text)
        assert parse_tokenizer(back.tokenizer, tmp_path).encode(text, bos=bos) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_tokenizer_without_bos_and_eos_encodes_like_ours(shared_data, tmp_path):
    pieces = tiny_vocabulary(285).pieces
    own = Vocabulary(pieces=(pieces[0], *pieces[3:]), bos_id=-1, eos_id=-1).to_model()
    hugging_face.write(tiny_weights(tokenizer=own), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token, theirs.eos_token) == (None, None) and len(theirs) == V
    ours = parse_tokenizer(own, tmp_path)
    for text in texts(shared_data):
        ids = ours.encode(text, bos=True, eos=True)
        assert theirs(text)["input_ids"] == ids, repr(text)


def test_a_tokenizer_that_replaces_characters_encodes_like_ours(shared_data, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(shared_data / "tinyshakespeare.txt"),
        model_prefix=str(tmp_path / "own"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=3,
    )  # NFKC, no spaces kept: SentencePiece's defaults
    model = (tmp_path / "own.model").read_bytes()
    hugging_face.write(tiny_weights(vocab_size=400, tokenizer=model), tmp_path / "model")
    ours = load_tokenizer(tmp_path / "own.model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    (tmp_path / "back.model").write_bytes(hugging_face.read(tmp_path / "model").tokenizer)
    back = load_tokenizer(tmp_path / "back.model")
    assert ours.encode("ﬁ  x", bos=False, eos=False) == ours.encode("fi x", bos=False, eos=False)
    for text in texts(shared_data, accents=""):  # theirs composes none across other marks
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert back.encode(text, bos=True, eos=False) == ids, repr(text)


@pytest.mark.parametrize("added", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("processor", [True, False, None, "no tokenizer.json"])
def test_bos_is_put_where_they_put_it(processor, kind, added, tmp_path):
    """Also where add_bos_token contradicts the post-processor of tokenizer.json."""
    if (processor, kind, added) == ("no tokenizer.json", "LlamaTokenizerFast", None):
        pytest.skip("their documentation says yes, as we do; version 5 does not")
    hugging_face.write(tiny_weights(), tmp_path / "model")
    paths = [tmp_path / "model" / f"tokenizer{name}.json" for name in ("", "_config")]
    values, settings = (json.loads(path.read_text()) for path in paths)
    values["post_processor"] = bos_template("<s>", 1, processor) if processor is not None else None
    settings |= {"add_bos_token": added, "tokenizer_class": kind}
    for path, content in zip(paths, (values, settings)):
        path.write_text(json.dumps(content))
    if processor == "no tokenizer.json":
        paths[0].unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    adds_bos = theirs("ab")["input_ids"][0] == 1
    assert hugging_face.read(tmp_path / "model").bos is adds_bos


@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_tokenizer_json_alone_is_read_as_it_encodes(source, shared_data, tmp_path):
    folder = tmp_path / "model"
    model = (shared_data / "tokenizer.model").read_bytes()
    hugging_face.write(tiny_weights(vocab_size=32_000, tokenizer=model), folder)
    if source == "theirs":
        (folder / "tokenizer.json").unlink()
        theirs = transformers.LlamaTokenizer.from_pretrained(folder)
        theirs.save_pretrained(folder)
    else:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (tmp_path / "back.model").write_bytes(hugging_face.read(folder).tokenizer)
    back = load_tokenizer(tmp_path / "back.model")
    for text in texts(shared_data):
        if source == "ours" or not text.startswith((" ", "▁")):
            ids = back.encode(text, bos=True, eos=False)
            assert theirs(text)["input_ids"] == ids, repr(text)


def test_a_tokenizer_trained_by_their_library_is_read_as_it_encodes(shared_data, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    hugging_face.write(tiny_weights(), tmp_path / "model")
    values = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    empty = {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "merges": []}
    values["model"] |= empty | {"byte_fallback": False}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V + 200, special_tokens=special, show_progress=False
    )
    theirs.train_from_iterator(
        (shared_data / "tinyshakespeare.txt").read_text().split("\n"), trainer
    )
    values = json.loads(theirs.to_str())
    assert len(values["model"]["merges"]) > 100  # one for a piece, where ours has all
    values["model"]["byte_fallback"] = True
    values["added_tokens"] = values["added_tokens"][:3]
    folder = tmp_path / "model"
    hugging_face.write(tiny_weights(vocab_size=V + 200), tmp_path / "larger")
    shutil.copy(tmp_path / "larger" / "config.json", folder)
    shutil.copy(tmp_path / "larger" / "model.safetensors", folder)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer.model").unlink()
    (tmp_path / "back.model").write_bytes(hugging_face.read(folder).tokenizer)
    back = load_tokenizer(tmp_path / "back.model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts(shared_data):
        assert theirs(text)["input_ids"] == back.encode(text, bos=True, eos=False), repr(text)


def test_a_model_of_theirs_with_a_tokenizer_of_ours_makes_the_round_trip(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "one")
    model = tiny_vocabulary().to_model()
    (tmp_path / "one" / "tokenizer.model").write_bytes(model)
    weights = hugging_face.read(tmp_path / "one")
    assert weights.tokenizer == model
    hugging_face.write(weights, tmp_path / "two")
    same(weights, hugging_face.read(tmp_path / "two"))
