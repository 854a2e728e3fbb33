"""Recognises files that lie where another was expected, by how they begin.

Does not know what was expected.
"""

REASONS = {
    b"version https://git-lfs": "only a git-LFS pointer; run `git lfs pull` there",
    b"pk\x03\x04": "a zip archive, as PyTorch's files are",
    b"gguf": "a GGUF file",
}
WEB = (b"<!doctype", b"<html", b"<head", b"<?xml")  # "<" alone may as well be the number 60


def stand_in(head: bytes) -> str:
    """What a file that begins so is instead, with advice; empty for one that is not recognised."""
    if not head:
        return "empty; copy it again"
    start = head.lstrip().lower()
    if start.startswith(WEB):
        return "a web page; download the file itself"
    return next((why for known, why in REASONS.items() if start.startswith(known)), "")
