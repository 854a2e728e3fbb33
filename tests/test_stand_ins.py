"""Files that are something else, told by their first bytes."""

import pytest

from llama_jax.errors import describe_file


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "only a git-LFS pointer"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"<html><head>", "a web page"),
        (b"PK\x03\x04\0\0", "a zip archive"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
    ],
)
def test_what_is_known_is_named(head, reason):
    assert describe_file(head).startswith(reason)


@pytest.mark.parametrize("head", [b"<\0\0\0", b" <\0\0\x01", b"24ka", b"\x0a\x0e", b"versio", b"P"])
def test_what_is_not_known_is_not(head):
    assert describe_file(head) == ""
