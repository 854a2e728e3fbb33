"""The doors convert.py and convert_meta.py as a user meets them."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compilation import xla_flags
from tiny_run import make_config, make_tokens
from tiny_weights import same, tiny_weights

from llama_jax.checkpoints.metadata import read_description
from llama_jax.checkpoints.run_folder import claimed
from llama_jax.cli import main as cli
from llama_jax.formats import verify as verification
from llama_jax.formats.convert import FORMATS, Options
from llama_jax.formats.weights import Tensor
from llama_jax.quantization import QuantizationConfig

REPOSITORY = Path(__file__).resolve().parents[2]
WRITTEN = re.compile(r"(\S+): 2[0-9],[0-9]{3} parameters, [0-9.]+ kB in [0-9.]+ s")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model in every format: in.ckpt, in.meta, …, in.bin, in.gguf."""
    folder = tmp_path_factory.mktemp("place")
    weights = tiny_weights()
    for form in FORMATS:
        path = folder / f"in.{'bin' if form == 'llama2c' else form}"
        FORMATS[form].write(weights, path, Options(), lambda done: None)
    (folder / "t.model").write_bytes(weights.tokenizer)
    bad = weights.tensors["norm.scale"].read().copy()
    bad[3] = np.nan
    tensor = Tensor(bad.shape, bad.dtype, lambda: bad)
    damaged = type(weights)(
        **vars(weights) | {"tensors": dict(weights.tensors) | {"norm.scale": tensor}}
    )
    FORMATS["ckpt"].write(damaged, folder / "nan.ckpt", Options(), lambda done: None)
    (folder / "soup").mkdir()
    (folder / "file").write_text("mine")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Run a door in this process, without others' libraries; returns exit code, stdout, stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(verification, "missing", lambda *libraries: list(libraries))
    monkeypatch.setattr("llama_jax.files.SECONDS_BETWEEN_LINES", 1e9)

    def run(line, door="convert"):
        module = importlib.import_module(f"llama_jax.cli.{door}")
        monkeypatch.setattr(sys, "argv", [f"{door}.py", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("source", ["ckpt", "meta", "hf", "bin", "gguf"])
def test_every_format_converts_to_a_checkpoint(run, source):
    code, stdout, stderr = run(f"--input in.{source} --output of-{source} --tokenizer t.model")
    assert (code, stderr) == (0, "")
    written, verified, then = stdout.splitlines()
    assert WRITTEN.fullmatch(written)[1] == f"of-{source}"
    assert verified.startswith("verified: ") and "|Δlogit| 0 where" in verified
    assert then == f"sample with: python sample.py --ckpt of-{source}"
    read = FORMATS["ckpt"].read(Path(f"of-{source}"), None)
    expected = tiny_weights(tied_embeddings=source != "meta")
    for name, tensor in tiny_weights().tensors.items():
        assert read.tensors[name].read().tobytes() == tensor.read().tobytes()
    assert read.tensors.keys() == expected.tensors.keys()


@pytest.mark.parametrize("target", FORMATS)
def test_a_checkpoint_converts_to_every_format(run, target):
    line = f"--input in.ckpt/0 --to {target} --output to/x.{target} --no_verify"
    code, stdout, stderr = run(line)
    assert (code, stderr) == (0, "") and "verified" not in stdout
    weights = FORMATS[target].read(Path(f"to/x.{target}"), None)
    numbers = weights.tensors["norm.scale"].read()
    np.testing.assert_array_equal(numbers, tiny_weights().tensors["norm.scale"].read())


def test_convert_meta(run):
    code, stdout, _ = run("--input in.meta --output mine --dtype bfloat16", door="convert_meta")
    assert code == 0 and "verified: " in stdout
    read = FORMATS["ckpt"].read(Path("mine"), None)
    assert (read.dtype.name, read.config.compute_dtype) == ("bfloat16", "bfloat16")
    code, _, stderr = run("--input in.hf --output other", door="convert_meta")
    assert code == 1 and stderr.count("\n") == 1 and "error: in.hf" in stderr


def test_last_line_is_a_command_that_works(run):
    words = "--input in.ckpt --no_verify --to"
    ends = {
        "llama2c --output m0.bin": "run with: ./run m0.bin",
        "llama2c --output my$x/m0.bin": "run with: ./run 'my$x/m0.bin' -z 'my$x/tokenizer.bin'",
        "llama2c --llama2c_version 2 --output m2.bin --group_size 4": "run with: ./runq m2.bin",
        "llama2c --llama2c_version 1 --output m1.bin": "m1.bin: 2",  # nothing reads version 1
        "gguf --output my$x.gguf": "run with: llama-cli -m 'my$x.gguf'",
    }
    for flags, end in ends.items():
        assert run(f"{words} {flags}")[1].splitlines()[-1].startswith(end)


def test_flags_reach_the_format(run):
    run("--input in.ckpt --to llama2c --llama2c_version 2 --group_size 4 --output v2/m.bin")
    content = Path("v2/m.bin").read_bytes()
    assert content[4:8] == b"\2\0\0\0" and content[37] == 4
    assert run("--input in.ckpt --to gguf --dtype q8_0 --output q.gguf")[0] == 0
    assert Path("q.gguf").stat().st_size < Path("in.gguf").stat().st_size
    code, _, stderr = run("--input in.ckpt --to meta --shards 2 --output shards")
    assert code == 1 and "vocab_size=283 does not divide into 2 shards" in stderr


@pytest.mark.slow  # `test_quantized_checkpoint` has the library's side
def test_a_quantised_checkpoint_has_its_kind_and_template(run):
    flags = "--quantize int4 --group_size 64 --template none --no_verify"
    assert run(f"--input in.hf --output q {flags}")[::2] == (0, "")
    description = read_description(Path("q"))
    assert description.quantization == QuantizationConfig("int4", 64)
    assert description.chat_template == "none"
    code, stdout, stderr = run("--input q --to hf --output q.hf")
    assert (code, stderr) == (0, "") and "|Δlogit| 0 where" in stdout, "its floats are what it is"


def test_nan_warns_or_is_refused(run):
    code, stdout, stderr = run("--input nan.ckpt --to hf --output nan.hf")
    assert code == 0 and stderr.startswith("warning: norm.scale of nan.ckpt holds NaN or infinity")
    assert "not verified: llama_jax on ckpt computes logits that are NaN or infinite" in stdout
    code, stdout, stderr = run("--input nan.ckpt --to hf --output nan2.hf --strict")
    assert (code, stdout) == (1, "") and stderr.startswith(
        "error: norm.scale of nan.ckpt holds NaN"
    )
    assert not Path("nan2.hf").exists()


def test_a_large_model_is_verified_only_on_request(run, monkeypatch):
    monkeypatch.setattr("llama_jax.formats.verify.is_cheap", lambda source: False)
    _, stdout, _ = run("--input in.ckpt --output large")
    assert "not verified: that takes 0 GB of memory and a while; --verify does it" in stdout
    _, stdout, _ = run("--input in.ckpt --output large2 --verify")
    assert "\nverified: " in stdout


def test_a_wrong_result_is_an_error(run, monkeypatch):
    monkeypatch.setattr(verification, "TOLERANCE", -1.0)
    code, stdout, stderr = run("--input in.ckpt --output wrong")
    assert code == 1 and "verified" not in stdout
    assert (
        stderr.startswith("error: ")
        and "no number was rounded" in stderr
        and stderr.count("\n") == 1
    )


MISTAKES = {
    "": (2, "--input"),
    "--input in.ckpt": (2, "--output"),
    "--input in.ckpt --output x --to onnx": (2, "invalid choice: 'onnx'"),
    "--input in.ckpt --output x --from onnx": (2, "invalid choice: 'onnx'"),
    "--input in.ckpt --output x --dtype int3": (2, "invalid choice: 'int3'"),
    "--input in.ckpt --output x --dtype q8_0": (2, "ckpt is written as one of float32"),
    "--input in.ckpt --output x --to llama2c --dtype float16": (2, "llama2c is written as"),
    "--input in.ckpt --output x --shards two": (2, "invalid int value: 'two'"),
    "--input in.ckpt --output x --tokeniser t.model": (2, "did you mean '--tokenizer'?"),
    "--input in.ckpt --output x stray": (2, "'stray' is not understood"),
    "--input nothing --output x": (1, "nothing does not exist"),
    "--input nothing --from hf --output x": (1, "nothing does not exist"),
    "--input soup --output x": (1, "the format of soup is not recognised; give --from"),
    "--input soup --from ckpt --output x": (1, "soup holds no run"),
    "--input in.hf --from ckpt --output x": (1, "in.hf has Hugging Face's format"),
    "--input in.ckpt --from hf --output x": (1, "in.ckpt/config.json"),
    "--input in.gguf --from llama2c --output x": (1, "in.gguf"),
    "--input in.bin --from gguf --output x": (1, "in.bin"),
    "--input file --from meta --output x": (1, "file"),
    "--input in.bin --output x": (1, "in.bin has no tokenizer"),
    "--input in.bin --output x --tokenizer nothing": (1, "tokenizer nothing does not exist"),
    "--input in.ckpt --output x --tokenizer in.gguf": (1, "tokenizer in.gguf"),
    "--input in.ckpt --output file": (1, "file exists already"),
    "--input in.ckpt --output soup": (1, "soup exists already"),
    "--input in.ckpt --output file/x": (1, "file is not a folder"),
    "--input in.ckpt --to llama2c --llama2c_version 2 --group_size 0 --output x": (1, "group_size"),
    "--input in.ckpt --output x --quantize int5": (2, "invalid choice: 'int5'"),
    "--input in.ckpt --output x --quantize int4 --group_size 48": (2, "group_size=48 is not"),
    "--input in.ckpt --output x --quantize int8 --dtype float32": (2, "does not go with quantize"),
    "--input in.ckpt --to hf --output x --quantize int8": (2, "quantize is for checkpoints alone"),
    "--input in.ckpt --to meta --output x --template none": (2, "meta holds no chat template"),
    "--input in.ckpt --output x --template lama": (
        2,
        "template='lama' is unknown; expected one of",
    ),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_an_error_is_one_line_and_leaves_nothing(run, place, line):
    before = sorted(place.rglob("*"))
    code, stdout, stderr = run(line)
    expected, says = MISTAKES[line]
    assert (code, stdout) == (expected, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and says in stderr
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "mine"


def test_help_needs_no_jax():
    script = "import sys, convert, convert_meta; assert 'jax' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


@pytest.mark.slow
def test_a_converted_model_is_sampled_and_not_trained_in(place, tmp_path):
    """The whole way in processes of their own: convert, sample, refuse to train."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags()}
    environment |= {"LLAMA_JAX_CACHE": str(tmp_path / "cache")}

    def door(*words):
        words = [sys.executable, str(REPOSITORY / words[0]), *words[1:]]
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    made = door("convert.py", "--input", str(place / "in.gguf"), "--output", "ckpt/tiny")
    assert made.returncode == 0 and "\nverified: " in made.stdout
    assert not re.search("warn|error|Traceback", made.stderr, re.IGNORECASE)
    sampled = door("sample.py", "--ckpt", "ckpt/tiny", "--prompt=ab", "--max_tokens=3")
    assert sampled.returncode == 0 and sampled.stdout.startswith("ab"), sampled.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ckpt").rglob("*")}
    tokens = make_tokens(tmp_path / "tokens").path
    (tmp_path / "tiny.py").write_text(
        "from llama_jax.config import *\nfrom llama_jax.config import as_config_dict\n"
        f"def get_config():\n    return as_config_dict({make_config(tokens, 'ckpt/tiny')!r})\n"
    )
    trained = door("train.py", "--config=tiny.py")
    assert trained.returncode == 1 and trained.stderr.count("\n") == 1
    assert "ckpt/tiny holds a converted model, not a run; choose another" in trained.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ckpt").rglob("*")} == before
    same(tiny_weights(), FORMATS["ckpt"].read(tmp_path / "ckpt" / "tiny", None))
    with pytest.raises(ValueError, match="converted"), claimed(tmp_path / "ckpt" / "tiny"):
        pass
