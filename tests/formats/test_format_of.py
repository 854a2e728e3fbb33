"""Detection of a path's format, and estimates of what is written."""

import pytest
from tiny_weights import tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.convert import FORMATS, Options, bytes_written, format_of, written_dtype

WAYS = [(form, Options()) for form in FORMATS]
WAYS += [("llama2c", Options(llama2c_version=2, group_size=8)), ("gguf", Options(dtype="q8_0"))]
WAYS += [("gguf", Options(dtype="bfloat16"))]
SUFFIXES = {"gguf": ".gguf", "llama2c": ".bin"}


def write(weights, form, folder, options=None):
    path = folder / f"{form}{SUFFIXES.get(form, '')}"
    FORMATS[form].write(weights, path, options or Options(), lambda done: None)
    return path


def test_the_format_of_a_path(tmp_path):
    for form in FORMATS:
        assert format_of(write(tiny_weights(), form, tmp_path)) == form
    assert format_of(tmp_path / "ckpt" / "0") == "ckpt"
    assert format_of(tmp_path / "meta" / "consolidated.00.pth") == "meta"


def test_unknown_formats_of_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"format of .* is not recognised; give --from \(ckpt: a"):
        format_of(tmp_path)
    with pytest.raises(UserError, match=r"none\.bin does not exist"):
        format_of(tmp_path / "none.bin")
    (tmp_path / "config.json").write_text("[" * 10**5)
    assert format_of(tmp_path) == "ckpt"  # whose reader says what is wrong with it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("form", "options"), WAYS, ids=str)
def test_the_bytes_written_are_estimated(tmp_path, form, options, dtype):
    weights = tiny_weights(dtype, dim=240, hidden_dim=416)  # large beside headers
    path = write(weights, form, tmp_path, options)
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    asked = bytes_written(form, weights, options)
    assert size <= asked <= 1.2 * size + 2**20


def test_the_written_dtype(tmp_path):
    half = tiny_weights("bfloat16")
    found = {form: written_dtype(form, half, Options()) for form in FORMATS}
    assert found == {
        "ckpt": "bfloat16",
        "meta": "bfloat16",
        "hf": "bfloat16",
        "llama2c": "float32",
        "gguf": "bfloat16",
    }
    assert FORMATS["gguf"].read(write(half, "gguf", tmp_path), None).dtype == "bfloat16"
    assert written_dtype("llama2c", half, Options(llama2c_version=2)) == "int8"
    assert written_dtype("gguf", half, Options(dtype="q8_0")) == "q8_0"
