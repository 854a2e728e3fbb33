"""Files from the internet, fetched once into a cache folder, each whole or not at all.

`$LLAMA_JAX_CACHE` names that folder; by default it is `~/.cache/llama_jax`.
"""

import dataclasses
import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random

from llama_jax.data.prepare.corpus import HELD_OUT, Assigned, Corpus, corpus_from_files
from llama_jax.data.prepare.documents import Passage, Reading
from llama_jax.data.prepare.tokenize import TokenOptions, prepare
from llama_jax.data.token_folder import TokenFolder
from llama_jax.errors import UserError, did_you_mean
from llama_jax.files import check_new_path, new_folder, progress

BLOCK = 2**18  # bytes between two looks at the progress bar
PATIENCE = 30  # seconds without a byte


def cache_folder() -> Path:
    """Where downloads are kept."""
    default = Path.home() / ".cache" / "llama_jax"
    return Path(os.environ.get("LLAMA_JAX_CACHE") or default)


def download(url: str, name: str, sha256: str = "") -> Path:
    """The file of a URL in the cache folder, fetched if it is not there.

    Args:
      url: where it is.
      name: what it is called in the cache folder.
      sha256: what its hash must be; empty: whatever comes.

    Raises:
      UserError: if it cannot be had; says where to put it by hand.
    """
    path = cache_folder() / name
    if path.is_file():
        return path
    partial = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial)
        if sha256 and found != sha256:
            raise UserError(f"{url} gave another file than expected (sha256 {found})")
        partial.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it keeps the connection
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        message = f"cannot download {url}: {reason}; get it by other means and put it at {path}"
        raise UserError(message) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path) -> str:
    """Write what a URL gives to a file; its hash."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=PATIENCE) as response, partial.open("wb") as stream:
        size = int(response.headers.get("Content-Length") or 0)
        with progress(f"downloading {url.rsplit('/', 1)[-1]}", size) as show:
            while block := response.read(BLOCK):
                stream.write(block)
                digest.update(block)
                done += len(block)
                show(done)
        stream.flush()
        os.fsync(stream.fileno())
    if size and done != size:
        raise UserError(f"the connection broke after {done:,} of {size:,} bytes")
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> Path:
    """The folder with what a `.tar.gz` archive holds, unpacked if it is not there.

    Only plain files and folders that stay inside are taken out.

    Raises:
      UserError: if the archive is damaged.
    """
    if folder.is_dir():
        return folder
    with new_folder(folder) as partial:
        try:
            with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
                size = archive.stat().st_size
                with progress(f"unpacking {archive.name}", size) as show:
                    for member in tar:
                        tar.extract(member, partial, filter="data")
                        show(raw.tell())
        except (tarfile.TarError, EOFError, OSError) as error:
            reason = f"{archive} cannot be unpacked: {error}"
            raise UserError(f"{reason}; delete it, and it is downloaded anew") from error
    return folder


# The corpora that have a name: one that the project makes itself, two from the internet.

NAMES = ("stories", "shakespeare", "tinystories")
VOCAB_SIZES = {"stories": 2048, "shakespeare": 2048, "tinystories": 4096}  # unless asked for
STORIES = 20_000  # made for training
STORIES_PER_HELD_OUT = 20  # and one for validation with every so many
STORY_LENGTH = 500  # characters, about
CUT_EVERY = 6  # one story for training in so many has lost its beginning

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES_URL = (
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
    "TinyStories_all_data.tar.gz"
)


def named_corpus(name: str, *, validation: float = HELD_OUT, stories: int = STORIES) -> Corpus:
    """The corpus of a name, downloaded if need be.

    Args:
      name: one of `NAMES`.
      validation: fraction that is held out; "stories" has its own stories for validation.
      stories: how many stories "stories" has for training.

    Raises:
      UserError: for an unknown name, or if a download fails.
    """
    if name == "stories":
        return embedded_stories(stories)
    if name == "shakespeare":
        path = download(SHAKESPEARE_URL, "shakespeare.txt", SHAKESPEARE_SHA256)
        corpus = corpus_from_files(path, split_at="none", validation=validation)
    elif name == "tinystories":
        archive = download(TINYSTORIES_URL, "TinyStories_all_data.tar.gz")
        folder = unpack(archive, cache_folder() / "tinystories")
        corpus = corpus_from_files(folder, validation=validation)
    else:
        expected = f"; expected one of {', '.join(NAMES)}"
        raise UserError(f"corpus {name!r} is unknown{did_you_mean(name, NAMES) or expected}")
    return dataclasses.replace(corpus, source=f"corpus {name}")


def embedded_stories(count: int) -> Corpus:
    """`count` stories for training and a twentieth of that for validation, made on the spot.

    Some of those for training begin at a later word. A model that has only met openings where a
    text begins cannot go on from "One day", which is what a user may well type.
    """
    held_out = max(1, count // STORIES_PER_HELD_OUT)

    def read(reading: Reading) -> Iterator[Assigned]:
        from llama_jax.data.stories import stories

        for number, story in enumerate(stories("train", count)):
            reading.done += 1
            text = without_beginning(story, number) if number % CUT_EVERY == 0 else story
            yield "train", Passage(text, is_first=True, is_last=True)
        for story in stories("validation", held_out):
            reading.done += 1
            yield "validation", Passage(story, is_first=True, is_last=True)

    return Corpus(
        source=f"corpus stories, {count} for training and {held_out} for validation",
        read=read,
        size=count + held_out,
        unit=" stories",
        characters=count * STORY_LENGTH,
    )


def without_beginning(story: str, seed: int) -> str:
    """The story from some word in its first three quarters on, but not the very first."""
    words = story.split(" ")
    return " ".join(words[1 + int(Random(seed).random() * 0.75 * len(words)) :])


def default_options(name: str) -> TokenOptions:
    """How a corpus is tokenized unless asked otherwise; any name will do."""
    return TokenOptions(vocab_size=VOCAB_SIZES.get(name, TokenOptions.vocab_size))


def prepare_corpus(
    name: str,
    output: str | os.PathLike[str],
    options: TokenOptions | None = None,
    *,
    validation: float = HELD_OUT,
    stories: int = STORIES,
) -> TokenFolder:
    """A named corpus as a new token folder; see `named_corpus` and `prepare`."""
    check_new_path(Path(output))
    corpus = named_corpus(name, validation=validation, stories=stories)
    return prepare(corpus, Path(output), options or default_options(name))
