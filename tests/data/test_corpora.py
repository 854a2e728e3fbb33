"""Named corpora: the embedded stories, and downloads from a local server with faults."""

import hashlib
import http.server
import io
import json
import tarfile
import threading

import pytest

from llama_jax.data.prepare import corpora
from llama_jax.data.prepare.corpora import (
    download,
    named_corpus,
    unpack,
)
from llama_jax.data.prepare.documents import ReadProgress
from llama_jax.data.prepare.tokenize import TokenOptions, default_options, prepare_corpus
from llama_jax.data.stories import stories
from llama_jax.errors import UserError

PLAY = "\n".join(f"Speaker {n}:\nWhat of the {n} boats, my lord?\n" for n in range(60)).encode()


def archive(stories, name="data00.json", kind=tarfile.REGTYPE):
    """Return a .tar.gz with one file of stories."""
    data = json.dumps([{"story": story} for story in stories]).encode()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(data), kind, "../../evil.json"
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


FILES = {
    "/play.txt": PLAY,
    "/stories.tar.gz": archive([f"A story of boat {n} with a red sail." for n in range(40)]),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `FILES`; below `/broken` only the first half of each."""

    def do_GET(self):
        is_broken = self.path.startswith("/broken")
        data = FILES.get(self.path.removeprefix("/broken"))
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.server.served += 1  # before the response, so that the client sees the count
        self.wfile.write(data[: len(data) // 2] if is_broken else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.served = 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_file_is_downloaded_once(server, cache):
    for _ in range(2):
        path = download(f"{server.url}/play.txt", "play.txt", hashlib.sha256(PLAY).hexdigest())
        assert path.read_bytes() == PLAY
    assert server.served == 1
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/missing.txt", "", "Not Found"),
        ("/broken/play.txt", "", "the connection broke after"),
        ("/play.txt", "0" * 64, "another sha256 than expected"),
    ],
)
def test_failed_download_message_has_url_and_path(server, cache, path, sha256, message):
    with pytest.raises(UserError, match=message) as caught:
        download(server.url + path, "play.txt", sha256)
    assert server.url + path in str(caught.value)
    assert f"put it at {cache / 'play.txt'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def test_missing_network_is_one_line(server, cache):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot download .*: .*refused; get it by other means"):
        download(f"{server.url}/play.txt", "play.txt")
    assert not list(cache.iterdir())


def test_shakespeare_is_one_document(server, monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"{server.url}/play.txt")
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    options = TokenOptions(vocab_size=300)
    folder = prepare_corpus("shakespeare", tmp_path / "out", options, validation=0.1)
    assert [split.documents for split in folder.splits.values()] == [1, 1]
    assert folder.source == "corpus shakespeare"


def test_tinystories_is_unpacked_once(server, monkeypatch, cache):
    monkeypatch.setattr(corpora, "TINYSTORIES_URL", f"{server.url}/stories.tar.gz")
    for _ in range(2):
        splits = [split for split, _ in named_corpus("tinystories").read(ReadProgress())]
        assert splits == ["train"] * 38 + ["validation"] * 2  # one file: its last documents
    assert server.served == 1
    assert (cache / "tinystories" / "data00.json").is_file()


DAMAGED = {"a page": b"<html>", "cut off": archive(["x"] * 999)[:90], "empty": b""}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_archive_leaves_no_folder(cache, content):
    cache.mkdir()
    (cache / "a.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar\.gz cannot be unpacked.*delete it"):
        unpack(cache / "a.tar.gz", cache / "a")
    assert [path.name for path in cache.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("entry", [{"name": "../../evil.json"}, {"kind": tarfile.SYMTYPE}], ids=str)
def test_archive_cannot_write_outside_the_folder(cache, tmp_path, entry):
    cache.mkdir()
    (cache / "a.tar.gz").write_bytes(archive(["x"], **entry))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(cache / "a.tar.gz", cache / "a")
    assert not list(tmp_path.rglob("evil.json"))


def test_stories_have_validation_stories(tmp_path):
    folder = prepare_corpus("stories", tmp_path / "out", TokenOptions(vocab_size=400), stories=100)
    assert [split.documents for split in folder.splits.values()] == [100, 5]
    assert folder.vocab_size == 400


def test_some_training_stories_are_truncated_at_the_start():
    complete = {"train": list(stories("train", 64)), "validation": list(stories("validation", 3))}
    read = {"train": [], "validation": []}
    for split, chunk in corpora.embedded_stories(64).read(ReadProgress()):
        read[split].append(chunk.text)
    assert read["validation"] == complete["validation"]
    cut = [(text, story) for text, story in zip(read["train"], complete["train"]) if text != story]
    assert len(cut) == 11
    for text, story in cut:
        assert story.endswith(f" {text}")
        assert len(story.split()) / 4 - 1 <= len(text.split()) < len(story.split())
    assert len({len(story.split()) - len(text.split()) for text, story in cut}) > 6


def test_unknown_corpus_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        named_corpus("shakespear")


def test_existing_output_is_refused_before_any_download(tmp_path, cache):
    with pytest.raises(UserError, match="exists already"):
        prepare_corpus("tinystories", tmp_path)
    assert not cache.exists()


def test_default_vocabulary_sizes():
    assert {name: default_options(name).vocab_size for name in (*corpora.NAMES, "book.txt")} == {
        "stories": 2048,
        "shakespeare": 2048,
        "tinystories": 4096,
        "book.txt": 4096,
    }
