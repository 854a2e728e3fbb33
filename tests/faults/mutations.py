"""Random damage to the content of files, reproducible from a seed."""

import contextlib
import copy
import json
from random import Random

WORDS = [0, 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
TOKENS = [b"-", b"e999", b"9" * 30, b"\xff", b"\x00", b"[", b"{", b'"', b"\\", b"null", b"NaN"]
TOKENS += [b"\xef\xbb\xbf", b"\x80\x02", b"R", b"\n", b"version https://git-lfs"]
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -1e-308]
VALUES += [0.5, float("nan"), float("inf"), "", "0", "x", "\0", "\ud800", "x" * 5000, [], {}, [[]]]
VALUES += [{"": None}, [1, "a", None], "<|x|>", "../../etc/passwd"]
DEEP = 100_000  # brackets within each other


def mutate(random: Random, content: bytes) -> bytes:
    """Return a content with one to three changes; JSON is changed as text or as a value."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        is_json = content[:1] in (b"{", b"[") and random.random() < 0.7
        content = (is_json and _mutate_json(random, content)) or _mutate_bytes(random, content)
    return content


def flip(random: Random, content: bytes) -> bytes:
    """Return a content with one bit flipped."""
    at = _place(random, len(content)) if content else 0
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def _place(random: Random, size: int) -> int:
    """Return an index, often near an end, where headers and directories are."""
    near = min(size, random.choice((8, 64, 512)))
    at = random.choice((random.randrange(size), random.randrange(near)))
    return random.choice((at, at, size - 1 - at))


def _mutate_bytes(random: Random, content: bytes) -> bytes:
    if not content:
        return random.randbytes(random.randrange(1, 64))
    at, other = _place(random, len(content)), _place(random, len(content))
    length = random.choice((1, 2, 4, 8, random.randrange(1, 200)))
    match random.randrange(9):
        case 0:
            return flip(random, content)
        case 1:
            return content[:at] + random.randbytes(1) + content[at + 1 :]
        case 2:
            width = random.choice((4, 8))
            word = (random.choice(WORDS) % 2 ** (8 * width)).to_bytes(width, "little")
            return content[:at] + word + content[at + width :]
        case 3:
            return content[:at] + random.randbytes(length) + content[at:]
        case 4:
            return content[:at] + content[at + length :]
        case 5:
            return content[:at]
        case 6:
            return content[:at] + content[other : other + length] + content[at + length :]
        case 7:
            return content[:at] + bytes(length) + content[at + length :]
        case _:
            return content[:at] + random.choice(TOKENS) + content[at:]


def _mutate_json(random: Random, content: bytes) -> bytes:
    """Return JSON with a value, key or line replaced; empty if the content is not JSON."""
    lines = content.split(b"\n")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # JSON lines, or damaged before
        number = random.randrange(len(lines))
        try:
            json.loads(lines[number])
        except (ValueError, RecursionError):
            return b""
        lines[number] = _mutate_json(random, lines[number])
        return b"\n".join(lines)
    places = list(_places(tree)) if isinstance(tree, dict | list) else []
    if not places:
        return b""
    parent, key = random.choice(places)
    other_parent, other_key = random.choice(places)
    match random.randrange(8):
        case 0:
            del parent[key]
        case 1:
            parent[key] = copy.deepcopy(other_parent[other_key])
        case 2 if isinstance(parent, dict):
            parent[random.choice(["", "x", other_key, f"{key} "])] = parent.pop(key)
        case 3 if isinstance(parent[key], int | float):
            with contextlib.suppress(OverflowError):  # an integer of many digits and a half
                parent[key] += random.choice((-1, 1, 0.5, 2**32))
        case 4:
            mark = "@deep@"
            parent[key] = mark
            deep = b"[" * DEEP + b"]" * DEEP
            return json.dumps(tree).encode().replace(b'"%s"' % mark.encode(), deep)
        case _:
            parent[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(tree).encode()


def _places(tree):
    """Yield (container, key) of every value of a JSON tree, but few of each long list."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for number, (key, value) in enumerate(list(children)):
        if number < 100:
            yield tree, key
            if isinstance(value, dict | list):
                yield from _places(value)
