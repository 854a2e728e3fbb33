"""How a model is prompted and sampled: read from other formats, and written to them."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.gguf.header import Keys
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.formats.prompting import read_prompting, read_prompting_keys
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.chat_formats import TEMPLATES

PIECES = (*tiny_vocabulary(281).pieces, Piece("<|im_end|>", 0.0, Kind.CONTROL))
PIECES += (Piece("<|end|>", 0.0, Kind.CONTROL),)
MODEL = Vocabulary(pieces=PIECES).to_model()
IM_END, END = 281, 282
CONFIG = {"vocab_size": 283}
SOURCE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}


def read(folder, config=(), tokenizer=MODEL, **files):
    """Read a folder of JSON files, given by their names without the ending."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return read_prompting(folder, CONFIG | dict(config), tokenizer)


def test_an_empty_folder_says_nothing_but_bos(tmp_path):
    expected = {"bos": True, "stop_ids": (), "chat_template": "", "generation": {}}
    assert read(tmp_path) == expected == read(tmp_path, tokenizer=b"")


@pytest.mark.parametrize(
    ("config", "generation", "settings", "stop_ids"),
    [
        ({"eos_token_id": 2}, {}, {}, (2,)),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": [7, 2]}, {}, (7, 2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, {"eos_token": "<|im_end|>"}, (IM_END, 2)),
        ({}, {"eos_token_id": 2}, {"eos_token": {"content": "<|end|>"}}, (END, 2)),
        ({"eos_token_id": 283}, {"eos_token_id": [-1, "2", True]}, {"eos_token": "abc"}, ()),
    ],
)
def test_stop_ids_are_those_of_all_files(tmp_path, config, generation, settings, stop_ids):
    files = {"generation_config": generation, "tokenizer_config": settings}
    assert read(tmp_path, config, **files)["stop_ids"] == stop_ids


TEMPLATE = {"type": "TemplateProcessing"}
WITH_BOS = TEMPLATE | {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
WITHOUT = TEMPLATE | {"single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]}
BYTES = {"type": "ByteLevel"}


@pytest.mark.parametrize(
    ("settings", "processor", "bos"),
    [
        ({"add_bos_token": False}, WITH_BOS, True),
        ({"add_bos_token": True}, WITHOUT, False),
        ({}, WITH_BOS, True),
        ({}, WITHOUT, False),
        ({}, BYTES, False),
        ({}, {"type": "Sequence", "processors": [BYTES, WITH_BOS]}, True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, WITH_BOS, True),
        ({"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}, "no file", True),
        ({"add_bos_token": False}, "no file", False),
        ({"tokenizer_class": "GPT2Tokenizer"}, "no file", False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "no file", True),
    ],
)
def test_bos_is_as_the_tokenizer_files_say(tmp_path, settings, processor, bos):
    """By the post-processor of a tokenizer.json, if there is one."""
    if processor != "no file":
        (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    assert read(tmp_path, tokenizer_config=settings)["bos"] is bos


def test_chat_template_of_its_own_file_or_the_settings(tmp_path):
    assert read(tmp_path, tokenizer_config={"chat_template": SOURCE})["chat_template"] == SOURCE
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SOURCE}]
    assert read(tmp_path, tokenizer_config={"chat_template": named})["chat_template"] == SOURCE
    assert read(tmp_path, tokenizer_config={"chat_template": named[:1]})["chat_template"] == ""
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read(tmp_path)["chat_template"] == "{{ messages }}"


def test_a_template_that_is_one_of_ours_is_recorded_by_name(tmp_path):
    settings = {"chat_template": TEMPLATES["chatml"].source}
    assert read(tmp_path, tokenizer_config=settings)["chat_template"] == "chatml"


def test_a_template_that_does_not_parse_is_reported_and_kept(tmp_path, capsys):
    settings = {"chat_template": "{% if"}
    assert read(tmp_path, tokenizer_config=settings)["chat_template"] == "{% if"
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and error.count("\n") == 1
    assert "tokenizer_config.json: the chat template does not parse: line 1" in error


def test_a_template_that_is_no_text_is_one_line(tmp_path):
    with pytest.raises(UserError, match="chat_template is 3; expected a Jinja template"):
        read(tmp_path, tokenizer_config={"chat_template": 3})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja is not UTF-8 at byte 0"):
        read(tmp_path)


def test_recommended_sampling(tmp_path, capsys):
    assert read(tmp_path, generation_config=SAMPLING | {"x": 1})["generation"] == SAMPLING
    greedy = SAMPLING | {"do_sample": False}
    expected = {"temperature": 0, "repetition_penalty": 1.1}
    assert read(tmp_path, generation_config=greedy)["generation"] == expected
    wrong = {"temperature": -1, "top_k": 0.5, "top_p": "x", "repetition_penalty": None}
    assert read(tmp_path, generation_config=wrong)["generation"] == {}
    assert capsys.readouterr().err.count("out of range; ignored") == 3


def test_recommended_sampling_of_an_old_config(tmp_path):
    assert read(tmp_path, {"temperature": 0.7})["generation"] == {"temperature": 0.7}
    assert read(tmp_path, {"temperature": 0.7}, generation_config={})["generation"] == {}


@pytest.fixture
def weights():
    return dataclasses.replace(
        tiny_weights(tokenizer=MODEL),
        bos=False,
        stop_ids=(IM_END, 2),
        chat_template=SOURCE,
        generation=SAMPLING,
    )


def fields(weights):
    names = ("bos", "stop_ids", "chat_template", "generation")
    return {name: getattr(weights, name) for name in names}


def test_hugging_face_and_back(weights, tmp_path):
    hugging_face.write(weights, tmp_path / "hf")
    assert fields(hugging_face.read(tmp_path / "hf")) == fields(weights)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [IM_END, 2] and generation["do_sample"] is True
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["chat_template"]) == ("<|im_end|>", SOURCE)


@pytest.mark.parametrize("template", ["llama2", "none", ""])
def test_hugging_face_gets_the_source_of_a_named_template(weights, template, tmp_path):
    greedy = {"temperature": 0, "repetition_penalty": 1.1}
    changes = {"chat_template": template, "generation": greedy, "stop_ids": (2,)}
    hugging_face.write(dataclasses.replace(weights, **changes), tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    expected = TEMPLATES["llama2"].source if template == "llama2" else None
    assert settings.get("chat_template") == expected
    back = hugging_face.read(tmp_path / "hf")
    assert back.chat_template == template.replace("none", "")
    assert (back.stop_ids, back.generation) == ((2,), greedy)


def test_gguf_and_back(weights, tmp_path, capsys):
    gguf.write(weights, tmp_path / "a.gguf")
    back = gguf.read(tmp_path / "a.gguf")
    assert fields(back) == fields(weights) | {"generation": {}}
    gguf.write(dataclasses.replace(weights, stop_ids=(IM_END, END, 2, 1)), tmp_path / "b.gguf")
    assert "GGUF holds 3 stop tokens; 4 end" in capsys.readouterr().err
    assert gguf.read(tmp_path / "b.gguf").stop_ids == (IM_END, END, 2)


def test_gguf_stop_ids_may_be_absent(tmp_path):
    keys = Keys(tmp_path, {"tokenizer.ggml.eos_token_id": 2**32 - 1, "x": np.zeros(0)})
    assert read_prompting_keys(keys, 283) == {"stop_ids": (), "chat_template": ""}


def test_checkpoint_and_back(weights, tmp_path):
    checkpoint_folder.write(weights, tmp_path / "ckpt")
    assert fields(checkpoint_folder.read(tmp_path / "ckpt")) == fields(weights)
