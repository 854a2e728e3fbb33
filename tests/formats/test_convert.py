"""From every format to every other: the same tensors and a tokenizer, or one line."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tqdm
from compilation import xla_flags
from tiny_weights import same, tiny_vocabulary, tiny_weights

from llama_jax.checkpoints import run_folder
from llama_jax.checkpoints.load import load
from llama_jax.errors import UsageError, UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats.convert import FORMATS, Conversion, Options, convert
from llama_jax.formats.llama2c import tokenizer as tokenizer_bin
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import Tensor
from llama_jax.text.tokenizer import parse_tokenizer

PAIRS = [(source, target) for source in FORMATS for target in FORMATS]
SUFFIXES = {"gguf": ".gguf", "llama2c": ".bin"}
INTERRUPTED = """
import sys, time
from pathlib import Path
from llama_jax.formats import convert as transfer

def slow(*_):
    print("begun", flush=True)
    time.sleep(60)

transfer.warn = slow
transfer.is_finite = lambda array: False
job = transfer.Conversion(
    source="ckpt", input=Path(sys.argv[1]), target=sys.argv[2], output=Path(sys.argv[3])
)
transfer.convert(job)
"""


def store(weights, form, folder):
    """Write a model in a format, without the help of `convert`."""
    path = folder / f"{form}{SUFFIXES.get(form, '')}"
    FORMATS[form].write(weights, path, Options(), lambda done: None)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same untied float32 model in every format, and a tokenizer's two files."""
    folder = tmp_path_factory.mktemp("sources")
    weights = tiny_weights(tied_embeddings=False)
    paths = {form: store(weights, form, folder) for form in FORMATS}
    (folder / "tokenizer.model").write_bytes(weights.tokenizer)
    tokenizer_bin.write(tiny_vocabulary(), folder / "tokenizer.bin")
    return paths


def job_of(sources, source, target, folder, **how):
    output = folder / f"out{SUFFIXES.get(target, '')}"
    if source == "llama2c":
        how.setdefault("tokenizer", sources[source].parent / "tokenizer.model")
    return Conversion(source=source, input=sources[source], target=target, output=output, **how)


def read(job):
    return FORMATS[job.target].read(job.output, None)


def pieces(weights):
    return [(piece.text, piece.kind) for piece in Vocabulary.from_model(weights.tokenizer).pieces]


def refused(job, says):
    with pytest.raises(UserError, match=says) as error:
        convert(job)
    assert "\n" not in str(error.value)
    return str(error.value)


def known(config, target):
    """A config without what a format does not store."""
    unstored = {"hidden_dim": config.ffn_dim, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
    unstored |= {"context_length": 1} if target == "meta" else {}
    return dataclasses.replace(config, **unstored)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_format_converts_to_every_other(sources, tmp_path, source, target):
    job = job_of(sources, source, target, tmp_path)
    said = convert(job)
    same(tiny_weights(tied_embeddings=False), said)
    weights = read(job)
    same(tiny_weights(tied_embeddings=False), weights)
    assert known(weights.config, target) == known(said.config, target)
    files = {path.name for path in tmp_path.iterdir()}
    if target == "llama2c":
        assert files == {"out.bin", "tokenizer.bin"}
        written = tokenizer_bin.read(tmp_path / "tokenizer.bin")
        assert [piece.text for piece in written.pieces] == [text for text, _ in pieces(said)]
    else:
        assert files == {job.output.name}
        assert pieces(weights) == pieces(tiny_weights())


@pytest.mark.parametrize("target", FORMATS)
def test_tied_models_keep_their_numbers(tmp_path, target):
    sources = {"ckpt": store(tiny_weights("bfloat16"), "ckpt", tmp_path)}
    job = job_of(sources, "ckpt", target, tmp_path)
    convert(job)
    found, expected = read(job).tensors, tiny_weights("bfloat16").tensors
    for name, tensor in expected.items():
        numbers = tensor.read().astype(np.float32)
        np.testing.assert_array_equal(found[name].read().astype(np.float32), numbers)
    assert ("output" in found) == (target == "meta")  # whose models are never tied


@pytest.mark.parametrize("target", ["ckpt", "meta", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_requested_dtype_is_written(sources, tmp_path, target, dtype):
    job = job_of(sources, "gguf", target, tmp_path, options=Options(dtype=dtype))
    convert(job)
    weights = read(job)
    same(tiny_weights(dtype, tied_embeddings=False), weights)
    assert weights.config.compute_dtype == "bfloat16"
    back = dataclasses.replace(
        job, source=target, input=job.output, target="ckpt", output=tmp_path / "back"
    )
    convert(dataclasses.replace(back, options=Options(dtype="float32")))
    assert read(back).config.compute_dtype == "float32"
    assert {tensor.dtype for tensor in read(back).tensors.values()} == {np.dtype(np.float32)}


def test_gguf_and_llama2c_are_quantised_on_request(sources, tmp_path):
    sizes = []
    for options in (Options(), Options(dtype="q8_0")):
        job = job_of(sources, "ckpt", "gguf", tmp_path / f"{options.dtype}", options=options)
        convert(job)
        sizes.append(job.output.stat().st_size)
    for options in (Options(), Options(llama2c_version=2, group_size=8)):
        folder = tmp_path / str(options.llama2c_version)
        job = job_of(sources, "ckpt", "llama2c", folder, options=options)
        convert(job)
        sizes.append(job.output.stat().st_size)
    assert sizes[1] < sizes[0] and sizes[3] < sizes[2]


def test_the_requested_number_of_shards_is_written(tmp_path):
    sources = {"ckpt": store(tiny_weights(vocab_size=286), "ckpt", tmp_path)}
    job = job_of(sources, "ckpt", "meta", tmp_path, options=Options(shards=2))
    convert(job)
    assert len(list(job.output.glob("*.pth"))) == 2
    refused(dataclasses.replace(job, output=tmp_path / "b", options=Options(shards=3)), "shards=3")


def test_what_is_converted_can_be_loaded(sources, tmp_path):
    job = job_of(sources, "llama2c", "ckpt", tmp_path)
    convert(job)
    loaded = load(job.output)
    assert loaded.tokenizer.vocab_size == 283 and loaded.step == 0


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.bin"])
@pytest.mark.parametrize("source", FORMATS)
def test_a_given_tokenizer_replaces_the_sources(sources, tmp_path, source, name):
    tokenizer = sources["ckpt"].parent / name
    job = job_of(sources, source, "ckpt", tmp_path, tokenizer=tokenizer)
    convert(job)
    weights = read(job)
    assert pieces(weights) == pieces(tiny_weights())
    assert (weights.tokenizer == tokenizer.read_bytes()) == (name == "tokenizer.model")


@pytest.mark.parametrize("target", [form for form in FORMATS if form != "llama2c"])
def test_a_missing_tokenizer_is_an_error(sources, tmp_path, target):
    job = job_of(sources, "llama2c", target, tmp_path, tokenizer=None)
    refused(job, "has no tokenizer, and .* needs one; .* --tokenizer")
    assert not list(tmp_path.iterdir())


def test_llama2c_needs_no_tokenizer_and_keeps_its_own(sources, tmp_path):
    convert(job_of(sources, "llama2c", "llama2c", tmp_path, tokenizer=None))
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]
    assert (tmp_path / "out.bin").read_bytes() == sources["llama2c"].read_bytes()
    (tmp_path / "more").mkdir()
    beside, job = tmp_path / "more" / "tokenizer.bin", job_of(sources, "ckpt", "llama2c", tmp_path)
    job = dataclasses.replace(job, output=tmp_path / "more" / "out.bin")
    beside.write_text("mine")
    refused(job, "tokenizer.bin is another tokenizer than that of .*; convert into another folder")
    assert [path.read_text() for path in (tmp_path / "more").iterdir()] == ["mine"]
    beside.unlink()
    tokenizer_bin.write(tiny_vocabulary(), beside)
    written = beside.stat().st_ino  # writing it again would publish a new file
    convert(job)
    assert beside.stat().st_ino == written


WITHOUT_ENDS = Vocabulary(  # no <s>, no </s>
    pieces=(*tiny_vocabulary(285).pieces[:1], *tiny_vocabulary(285).pieces[3:]),
    bos_id=-1,
    eos_id=-1,
)


@pytest.mark.parametrize("target", ["ckpt", "hf", "meta"])
def test_a_tokenizer_without_bos_and_eos_is_kept(tmp_path, target):
    weights = tiny_weights(tokenizer=WITHOUT_ENDS.to_model())
    sources = {"ckpt": store(weights, "ckpt", tmp_path)}
    job = job_of(sources, "ckpt", target, tmp_path)
    assert not convert(job).bos
    found = read(job)
    assert found.tokenizer == weights.tokenizer
    if target == "hf":  # as which its tokenizer.json alone is read, too
        assert not found.bos
        (job.output / "tokenizer.model").unlink()
        found = read(job)
    tokenizer = parse_tokenizer(found.tokenizer, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, -1)
    expected = parse_tokenizer(weights.tokenizer, tmp_path)
    for text in ("ab abc", "<s> é"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == text


def test_formats_that_need_bos_or_eos_refuse_a_tokenizer_without(tmp_path):
    weights = tiny_weights(tokenizer=WITHOUT_ENDS.to_model())
    sources = {"ckpt": store(weights, "ckpt", tmp_path)}
    refused(job_of(sources, "ckpt", "gguf", tmp_path), "has no EOS.*; choose another format")
    refused(job_of(sources, "ckpt", "llama2c", tmp_path), "takes ids 0, 1 and 2 for <unk>, <s> and")
    (tmp_path / "more").mkdir()
    with_end = tiny_weights(tokenizer=dataclasses.replace(WITHOUT_ENDS, eos_id=258).to_model())
    found = Vocabulary.from_model(gguf_round_trip(with_end, tmp_path / "more").tokenizer)
    assert (found.bos_id, found.eos_id) == (-1, 258)


def gguf_round_trip(weights, folder):
    return FORMATS["gguf"].read(store(weights, "gguf", folder))


@pytest.mark.parametrize("target", ["llama2c", "meta"])
def test_stop_tokens_that_a_format_loses_are_said(target, tmp_path, capsys):
    weights = dataclasses.replace(tiny_weights(), stop_ids=(9, 2, 7))
    FORMATS["ckpt"].write(weights, tmp_path / "in", Options(), lambda done: None)
    job = Conversion(
        source="ckpt", input=tmp_path / "in", target=target, output=tmp_path / "out.bin"
    )
    convert(job)
    assert "ends texts at BOS and EOS alone, not at tokens 7, 9" in capsys.readouterr().err


@pytest.mark.parametrize("source", FORMATS)
def test_another_models_tokenizer_is_refused_with_both_sizes(sources, tmp_path, source):
    (tmp_path / "t.model").write_bytes(tiny_vocabulary(290).to_model())
    job = job_of(sources, source, "ckpt", tmp_path, tokenizer=tmp_path / "t.model")
    assert {"290", "283"} <= set(re.findall(r"\d+", refused(job, "t.model")))
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_a_source_with_another_models_tokenizer_is_refused(tmp_path):
    weights = tiny_weights(tokenizer=tiny_vocabulary(290).to_model())
    sources = {"ckpt": store(weights, "ckpt", tmp_path)}
    refused(job_of(sources, "ckpt", "hf", tmp_path), "has 290 pieces and the model 283")


def with_bad_value(value, name="blocks.1.ffn.up.kernel"):
    """A model with one number that is none."""
    weights = tiny_weights()
    array = weights.tensors[name].read().copy()
    array.flat[7] = value
    tensor = Tensor(array.shape, array.dtype, lambda: array)
    return dataclasses.replace(weights, tensors=dict(weights.tensors) | {name: tensor})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_warn_or_are_refused(tmp_path, capsys, value):
    sources = {"ckpt": store(with_bad_value(value), "ckpt", tmp_path)}
    job = job_of(sources, "ckpt", "hf", tmp_path)
    refused(dataclasses.replace(job, strict=True), "blocks.1.ffn.up.kernel of .* holds NaN or")
    assert not job.output.exists() and capsys.readouterr().err == ""
    convert(job)
    said = capsys.readouterr().err
    assert said.startswith("warning: blocks.1.ffn.up.kernel of ") and said.count("\n") == 1
    same(with_bad_value(value), read(job))


def test_overflow_of_the_dtype_warns(tmp_path, capsys):
    sources = {"ckpt": store(with_bad_value(1e6), "ckpt", tmp_path)}
    convert(job_of(sources, "ckpt", "meta", tmp_path, options=Options(dtype="float16")))
    assert "holds NaN or infinity as float16" in capsys.readouterr().err


@pytest.mark.parametrize("target", FORMATS)
def test_nothing_is_overwritten(sources, tmp_path, target):
    job = job_of(sources, "ckpt", target, tmp_path)
    job.output.write_text("mine")
    refused(job, "exists already")
    refused(
        dataclasses.replace(job, input=tmp_path / "missing"), "exists already"
    )  # reported first
    assert job.output.read_text() == "mine"


@pytest.mark.parametrize("target", FORMATS)
def test_a_full_disk_is_found_before_anything_is_written(sources, tmp_path, monkeypatch, target):
    usage = run_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage._replace(free=3000))
    job = job_of(sources, "ckpt", target, tmp_path / "new" / "place")
    refused(job, r"has 3\.0 kB free, and out.* takes [\d.]+ [kM]B; make room")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", FORMATS)
def test_a_failure_leaves_nothing(sources, tmp_path, target):
    damaged = checkpoint_folder.read(sources["ckpt"])
    calls = list(range(5))

    def failing(tensor):
        return dataclasses.replace(tensor, read=lambda: (calls.pop(), tensor.read())[1])

    tensors = {name: failing(tensor) for name, tensor in damaged.tensors.items()}
    broken = dataclasses.replace(damaged, tensors=tensors)
    job = job_of(sources, "ckpt", target, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.formats.convert.read_source", lambda job: broken)
        with pytest.raises(IndexError):
            convert(job)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_nothing(sources, tmp_path):
    """`tests/faults` has other formats and signals."""
    job = job_of(sources, "ckpt", "hf", tmp_path)
    words = [sys.executable, "-c", INTERRUPTED, str(job.input), "hf", str(job.output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": xla_flags()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    assert not list(tmp_path.iterdir())
    convert(job)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_progress_counts_tensors(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llama_jax.files.SECONDS_BETWEEN_LINES", 0)
    convert(job_of(sources, "ckpt", "gguf", tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("writing out.gguf: ") and "(tensor 1 of 30)" in lines[0]
    assert lines[-1] == "writing out.gguf: 100% (tensor 30 of 30)"


def test_a_terminal_shows_a_progress_bar(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(
        tqdm.tqdm, "update", lambda bar, n: (setattr(bar, "n", bar.n + n), bar.refresh())
    )
    convert(job_of(sources, "ckpt", "gguf", tmp_path))
    said = capsys.readouterr().err
    assert "writing out.gguf: 100%" in said and "B/s, tensor 30 of 30]" in said


@pytest.mark.parametrize("source", FORMATS)
def test_a_missing_source_is_named(tmp_path, source):
    job = Conversion(source=source, input=tmp_path / "no", target="ckpt", output=tmp_path / "out")
    refused(job, "no does not exist; expected a|no does not exist; expected Meta's")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "onnx"}, "format 'onnx' is unknown; expected one of ckpt, meta, hf"),
        ({"options": Options(dtype="q8_0")}, "dtype 'q8_0' does not fit: ckpt is written as one"),
        ({"target": "llama2c", "options": Options(dtype="float16")}, "llama2c is written as one"),
    ],
)
def test_unknown_formats_and_dtypes_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        Conversion(
            **{"source": "hf", "input": Path(), "target": "ckpt", "output": Path()} | changes
        )
