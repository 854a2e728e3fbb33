"""Conversions against the programs they come from and go to, and mistakes that only these see."""

import dataclasses

import numpy as np
import pytest
from tiny_weights import tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats import verify as verification
from llama_jax.formats.convert import FORMATS, Conversion, Options, convert
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.formats.meta import model as meta
from llama_jax.formats.rules import INTERLEAVED, MATRIX
from llama_jax.formats.verify import verify

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CHANGES = {
    "tied": {},
    "untied": {"tied_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-6},
    "one kv head": {"num_kv_heads": 1},
    "as many kv heads": {"num_kv_heads": 6},
}
PROGRAMS = {"hf": ("torch", "transformers"), "meta": ("torch",)}


def lines(source, target, tmp_path, weights, **options):
    """What verifying a conversion between two formats says."""
    for library in {*PROGRAMS.get(source, ()), *PROGRAMS.get(target, ())}:
        pytest.importorskip(library)
    FORMATS[source].write(weights, tmp_path / "in", Options(), lambda done: None)
    (tmp_path / "t.model").write_bytes(weights.tokenizer)
    job = Conversion(
        source=source,
        input=tmp_path / "in",
        target=target,
        output=tmp_path / "out",
        tokenizer=tmp_path / "t.model",
        options=Options(**options),
    )
    return list(verify(job, convert(job)))


def differences(said):
    return [float(line.split("|Δlogit| ")[1].split()[0]) for line in said]


@pytest.mark.parametrize("changes", CHANGES)
def test_hugging_face_agrees_in_both_directions(tmp_path, changes):
    weights = tiny_weights(**CHANGES[changes])
    (line,) = lines("hf", "ckpt", tmp_path, weights)
    assert line.startswith("verified: llama_jax on the output against transformers: ")
    assert line.endswith("16 of 16 greedy tokens agree")
    assert 0 < max(differences([line])) <= 1e-4
    (tmp_path / "back").mkdir()
    ours, theirs = lines("ckpt", "hf", tmp_path / "back", weights)
    assert theirs.startswith("verified: transformers on the output against llama_jax on ckpt")
    assert theirs.endswith("16 of 16 greedy tokens agree")
    assert differences([ours]) == [0] and 0 < max(differences([theirs])) <= 1e-4


@pytest.mark.parametrize("changes", CHANGES)
def test_metas_forward_pass_agrees(tmp_path, changes):
    (line,) = lines("meta", "ckpt", tmp_path, tiny_weights(**CHANGES[changes]))
    assert "llama_jax on the output against Meta's forward pass in torch: " in line
    assert line.endswith("16 of 16 greedy tokens agree")
    assert 0 < max(differences([line])) <= 1e-4


def test_half_precision_is_compared_in_float32(tmp_path):
    for source in ("meta", "hf"):
        (tmp_path / source).mkdir()
        (line,) = lines(source, "ckpt", tmp_path / source, tiny_weights("bfloat16"))
        assert 0 < max(differences([line])) <= 1e-4


def test_scaled_positions_agree(tmp_path):
    scaling = RopeScaling(kind="linear", factor=4.0)
    said = lines("ckpt", "hf", tmp_path, tiny_weights(rope_scaling=scaling))
    assert max(differences(said)) <= 1e-4


@pytest.mark.parametrize("form", ["meta", "hf"])
def test_a_layout_that_is_wrong_both_ways_is_found(tmp_path, monkeypatch, form):
    """Read and written with the same mistake, our own tensors are the same; the program differs."""
    module, wrong = {"meta": (meta, MATRIX), "hf": (hugging_face, INTERLEAVED)}[form]
    weights = tiny_weights()
    right = tmp_path / "right"
    FORMATS[form].write(weights, right, Options(), lambda done: None)
    table = tuple(
        dataclasses.replace(rule, layout=wrong) if "wq" in rule.ours else rule
        for rule in module.TABLE
    )
    monkeypatch.setattr(module, "TABLE", table)
    pytest.importorskip("transformers")
    job = Conversion(source=form, input=right, target="ckpt", output=tmp_path / "out")
    source = convert(job)
    with pytest.raises(UserError, match="although no number was rounded"):
        list(verify(job, source))
    monkeypatch.setattr(verification, "missing", lambda *libraries: list(libraries))
    assert differences(verify(job, source)) == [0]


def test_an_export_that_transformers_cannot_open_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    job = Conversion(source="hf", input=tmp_path / "in", target="hf", output=tmp_path / "out")
    FORMATS["hf"].write(tiny_weights(), job.input, Options(), lambda done: None)
    source = convert(job)
    said = verify(job, source)
    assert "against transformers" in next(said)
    (job.output / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot open") as error:
        next(said)
    assert "\n" not in str(error.value)


def test_a_source_that_transformers_cannot_open_is_not_verified(tmp_path):
    pytest.importorskip("transformers")
    job = Conversion(source="hf", input=tmp_path / "in", target="ckpt", output=tmp_path / "out")
    FORMATS["hf"].write(tiny_weights(), job.input, Options(), lambda done: None)
    source = convert(job)
    (job.input / "model.safetensors").unlink()
    (line,) = verify(job, source)
    assert line.startswith(f"not verified: transformers cannot open {job.input}: ")


def test_numbers_are_not_all_alike(tmp_path):
    """The logits that agree are of a model in which every part matters."""
    weights = tiny_weights()
    logits = verification.our_logits(weights)
    tokens = np.random.default_rng(0).integers(0, 283, 12)
    assert np.ptp(logits(tokens), axis=0).min() > 0.1
