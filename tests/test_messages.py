"""The messages that users can cause, as `docs/list_messages.py` lists them."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def messages():
    script = runpy.run_path(str(ROOT / "docs" / "list_messages.py"))
    return dict(script["list_messages"](ROOT / "llama_jax"))


def test_errors_and_warnings_are_listed(messages):
    texts = "\n".join(messages.values())
    assert len(messages) > 300
    for reported in (
        "--target is missing; expected devices",  # as `UsageError`
        "exclude each other; choose one",  # by `require`
        "--timeout; seconds above 0",  # by `finite_number`
    ):
        assert reported in texts


def test_messages_are_one_line_in_one_style(messages):
    for place, text in messages.items():
        assert "\n" not in text, place
        assert not text.endswith((".", "!")), place
        assert "please" not in text.lower().replace("please report it", ""), place
