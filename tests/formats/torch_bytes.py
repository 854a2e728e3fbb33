"""Torch files made byte by byte, right and wrong, and edits of them."""

import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.formats.torch import reader as torch_file

NUMBERS = np.arange(24, dtype=np.float32) * 1.5 - 7
STORED = NUMBERS.tobytes()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(shape=(4, 6), strides=(6, 1), offset=0, key="0", kind="Float", count=24, hooks=b"}"):
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    view = number(offset) + numbers(*shape) + numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89" + hooks + b"tR"


def a_dict(**items):
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in items.items()) + b"u."


def parts(pickled=None, data=STORED, root="r"):
    pickled = a_dict(a=tensor()) if pickled is None else pickled
    files = {"data.pkl": pickled, "byteorder": b"little", "data/0": data, "version": b"3\n"}
    return [(f"{root}/{name}", data, {}) for name, data in files.items()]


def zipped(parts, wide=False, **end):
    """A zip; what is said of an entry, and of them all at the end, can be made wrong."""
    body, directory = b"", b""
    for name, data, changes in parts:
        name = name if isinstance(name, bytes) else name.encode()
        about = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "stored": len(data)}
        about |= {"size": len(data), "offset": len(body), "extra": b"", "local": name} | changes
        middle = struct.pack("<2H", 0, 0) + struct.pack("<I", about["crc"])
        if wide:
            fields = (about["size"], about["stored"], about["offset"])
            about["extra"] = struct.pack("<4H3Q", 9, 4, 0, 0, *fields)
            about["extra"] = about["extra"][:8] + struct.pack("<2H", 1, 24) + about["extra"][8:]
            about |= dict.fromkeys(("size", "stored", "offset"), 0xFFFFFFFF)
        body += struct.pack("<4s3H", b"PK\3\4", 20, 0, about["method"]) + middle
        body += struct.pack("<2I2H", len(data), len(data), len(about["local"]), 7)
        body += about["local"] + b"padding" + data
        directory += struct.pack("<4s4H", b"PK\1\2", 20, 20, about["flags"], about["method"])
        directory += middle + struct.pack("<2I", about["stored"], about["size"])
        directory += struct.pack("<5H", len(name), len(about["extra"]), 0, 0, 0)
        directory += struct.pack("<2I", 0, about["offset"]) + name + about["extra"]
    said = {"count": len(parts), "size": len(directory), "start": len(body)} | end
    tail = b""
    if wide:
        tail = struct.pack("<4sQ2H2I", b"PK\6\6", 44, 45, 45, 0, 0)
        tail += struct.pack("<4Q", said["count"], said["count"], said["size"], said["start"])
        place = len(body) + len(directory)
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, said.get("place", place), 1)
        said = {"count": 0xFFFF, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}
    tail += struct.pack("<4s4H", b"PK\5\6", 0, 0, said["count"], said["count"])
    return body + directory + tail + struct.pack("<2IH", said["size"], said["start"], 0)


def save(path, data):
    """Write bytes, or a zip of parts."""
    path.write_bytes(data if isinstance(data, bytes) else zipped(data))
    return path


def refused(path, *words):
    """Assert that a file is refused in one line that names it and holds these words."""
    with pytest.raises(UserError) as caught:
        torch_file.read(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message and len(message) < 1200
    for word in words:
        assert word in message
    return message


edit = st.tuples(
    st.sampled_from(["set", "insert", "delete"]), st.integers(0, 2**16), st.binary(max_size=4)
)
edits = st.lists(edit, min_size=1, max_size=3)


def edited(data, edits):
    for kind, place, new in edits:
        place %= len(data) + 1
        rest = place + {"set": len(new), "insert": 0, "delete": 4}[kind]
        data = data[:place] + (b"" if kind == "delete" else new) + data[rest:]
    return data
