"""Documents: file types and separators, damaged files, and bounded memory."""

import json
import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama_jax.data.prepare.documents import (
    END_OF_TEXT,
    Chunk,
    ReadOptions,
    ReadProgress,
    find_text_files,
    read_documents,
    split_documents,
)
from llama_jax.errors import UserError

words = st.text(st.sampled_from("ab é\t\n."), max_size=20)


def read(path, split_at="auto", **options):
    """Return the documents of a path as strings, and the number of characters replaced."""
    progress = ReadProgress()
    documents = []
    for file in find_text_files([path])[0]:
        for chunk in read_documents(file, ReadOptions(split_at=split_at, **options), progress):
            if chunk.is_first:
                documents.append("")
            documents[-1] += chunk.text
    return documents, progress.replaced


@pytest.mark.parametrize(
    ("text", "split_at", "documents"),
    [
        ("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n", "auto", ["one", "two\nlines"]),
        ("one\r\n<|endoftext|> \r\ntwo", "auto", ["one", "two"]),
        ("one <|endoftext|>\n two", "auto", ["one <|endoftext|>\n two"]),
        ("one\n\n \t\n\ntwo\nlines\n\n", "blank", ["one", "two\nlines"]),
        ("one\n\ntwo\n", "none", ["one\n\ntwo"]),
        ("one\n\ntwo\n", "auto", ["one\n\ntwo"]),
        ("one\n***\n***\ntwo", "***", ["one", "two"]),
        ("***\none\n***", "***", ["one"]),
        (" \n\t ", "auto", []),
        ("", "blank", []),
        ("\ufeffone", "none", ["one"]),
        ("\ufeff<|endoftext|>\none", "auto", ["one"]),
        ("\ufeff", "none", []),
        ("a\0b", "none", ["a\0b"]),
    ],
)
def test_text_is_split_at_separators(tmp_path, text, split_at, documents):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert read(path, split_at)[0] == documents


def test_folder_of_all_file_types_is_read_in_order(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": " one "}\n\n{"text": "two\\nlines", "x": 1}\n')
    (tmp_path / "a.txt").write_text("zero")
    (tmp_path / "c" / "d.json").write_text(json.dumps([{"story": "three"}, {"story": ""}]))
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "linked").symlink_to(tmp_path / "c")
    assert read(tmp_path)[0] == ["zero", "one", "two\nlines", "three"]
    assert find_text_files([tmp_path])[1] == [tmp_path / "linked", tmp_path / "notes.md"]


def test_paths_are_read_in_order_and_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    files, skipped = find_text_files([tmp_path / "b.txt", tmp_path, tmp_path / "a.txt"])
    assert [file.name for file in files] == ["b.txt", "a.txt", "c.txt"]
    assert skipped == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_key_of_the_text_in_json(tmp_path, name):
    text = '{"body": "one", "text": "two", "story": "three", "n": %s}' % ("9" * 5000)
    (tmp_path / name).write_text(f"[{text}]" if name == "a.json" else text)
    assert read(tmp_path / name)[0] == ["two"]
    assert read(tmp_path / name, text_keys=("body",))[0] == ["one"]


@given(stories=st.lists(words | st.text(max_size=20), max_size=8), block=st.integers(1, 40))
def test_json_list_does_not_depend_on_block_size(tmp_path_factory, stories, block):
    path = tmp_path_factory.mktemp("json") / "stories.json"
    path.write_text(json.dumps([{"story": story, "n": [1, {"]": "}"}]} for story in stories]))
    found, _ = read(path, block_bytes=block)
    assert found == [story.strip() for story in stories if story.strip()]


@given(documents=st.lists(words, max_size=6), block=st.integers(1, 40))
def test_split_text_does_not_depend_on_block_size(tmp_path_factory, documents, block):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(f"\n{END_OF_TEXT}\n".join(documents).encode())
    found, _ = read(path, END_OF_TEXT, block_bytes=block)
    assert found == [text.strip() for text in documents if text.strip()]


@given(fragments=st.lists(words | st.none(), max_size=12), longest=st.integers(2, 9))
def test_concatenated_chunks_are_the_document(fragments, longest):
    found, first = [], True
    for chunk in split_documents([*fragments, None], longest):
        assert chunk.is_first == first
        assert len(chunk.text) <= longest
        if chunk.is_first:
            found.append("")
        found[-1] += chunk.text
        first = chunk.is_last
    joined = "".join("|" if fragment is None else fragment for fragment in fragments).split("|")
    assert [text.rstrip() for text in found] == [text.strip() for text in joined if text.strip()]


def test_long_documents_are_split_between_words():
    cut = list(split_documents(["the boat was very red", None], longest=10))
    assert cut == [
        Chunk("the boat", True, False),
        Chunk(" was very", False, False),
        Chunk(" red", False, True),
    ]
    assert [len(chunk.text) for chunk in split_documents(["x" * 25, None], longest=10)] == [
        10,
        10,
        5,
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a.txt is not UTF-8: byte 0xff at position 5"),
        ("a.txt", b"\xef\xbb\xbfgood \xff", r"byte 0xff at position 8"),
        ("a.txt", b"cut \xe6\x97", r"byte 0xe6 at position 4"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', r'a.jsonl:1 has no text; .* "text" or "story"'),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1 has no text"),
        ("a.jsonl", b'{"a": "x", "n": 1, "b": ""}\n', r'"story", or --text_key with one of a, b$'),
        ("a.jsonl", b'[\n{"text": "x"}\n]', r"a.jsonl:1 is not JSON .*; name the file .json"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', r"with an object on each line .jsonl"),
        ("a.txt", "one".encode("utf-16"), r"a.txt is UTF-16; expected UTF-8: convert it"),
        ("a.jsonl", b"5\n", r"a.jsonl:1 has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"nested too deeply"),
        ("a.json", b'{"story": "x"}', r"not a JSON list"),
        ("a.json", b'[{"story": "x"}, 5]', r"not a JSON list of objects"),
        ("a.json", b'[{"story": "x"}, {"story": "y"', r"object 2 is not JSON"),
        ("a.json", b'[{"story": "x"},', r"truncated after 1 objects"),
        ("a.json", b"", r"truncated after 0 objects"),
        ("a.json", b'[{"story": x}' + b" " * 50, r"object 1 is not JSON"),
        ("a.json", b'[{"story":' * 50_000, r"object 1 is (not JSON|nested)"),
        ("a.csv", b"x", r"a.csv has an unknown type"),
    ],
)
def test_damaged_file_message_has_the_position(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path)


@given(data=st.binary(max_size=60), block=st.integers(1, 9))
def test_invalid_bytes_are_replaced_and_counted(tmp_path_factory, data, block):
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(b"." + data + b".")
    (text,), replaced = read(path, "none", errors="replace", block_bytes=block)
    assert text == (b"." + data + b".").decode(errors="replace")
    assert replaced == text.count("\ufffd") - data.count("\ufffd".encode())


def test_surrogate_escapes_are_replaced_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}')
    assert read(path, "none", errors="replace") == (["a\ufffdb 🙂"], 1)


@pytest.mark.parametrize("split_at", ["none", "blank", END_OF_TEXT])
def test_huge_line_takes_little_memory(tmp_path, split_at):
    path = tmp_path / "line.txt"
    path.write_text("0123456 " * 1_250_000)  # 10 MB
    tracemalloc.start()
    chunks = read_documents(path, ReadOptions(split_at=split_at), ReadProgress())
    length = sum(len(chunk.text) for chunk in chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 10_000_000 - 1
    assert peak < 8_000_000
