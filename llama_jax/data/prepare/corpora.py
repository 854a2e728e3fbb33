"""Corpora: documents assigned to the training or the validation split.

Text files of the user, the embedded stories, and named downloads, which are kept in
`$LLAMA_JAX_CACHE` (by default `~/.cache/llama_jax`).
"""

import array
import dataclasses
import hashlib
import http.client
import itertools
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from llama_jax.data.prepare.documents import (
    TEXT_FILES,
    Chunk,
    ReadOptions,
    ReadProgress,
    find_text_files,
    read_documents,
)
from llama_jax.errors import UserError, did_you_mean
from llama_jax.files import cache_folder, new_folder, progress

VALIDATION_FRACTION = 0.05  # of the text, unless set otherwise
HELD_OUT_SEED = 0  # of the choice of documents for validation; changing it changes everyone's data
SHORTEST_END = 50  # characters of a long document that are worth holding out
MOST_NAMES_SHOWN = 5  # of files, in a notice
DOWNLOAD_BLOCK = 2**18  # bytes between two updates of the progress bar
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
AssignedChunk = tuple[str, Chunk]  # "train" or "validation", and the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that can be read repeatedly, the training split first."""

    source: str  # description of where it comes from
    read: Callable[[ReadProgress], Iterator[AssignedChunk]]
    size: int  # value of `ReadProgress.done` at the end
    unit: str = "B"  # of that size
    characters: int  # approximate total
    validation: float = 0  # fraction of the text that should be held out; 0: as the corpus has it
    notices: tuple[str, ...] = ()  # what the user should know about the files and the split

    def training_sample(self, characters: int) -> Iterator[str]:
        """Yield text spread evenly over the training split, about so many characters in total."""
        every = -(-self.characters // characters)
        state = ReadProgress()
        training = (chunk for split, chunk in self.read(state) if split == "train")
        with progress("sampling text", self.size, self.unit) as show:
            for index, chunk in enumerate(training):
                if index % every == 0:
                    show(state.done)
                    yield chunk.text


# ---- text files ----


def corpus_from_files(
    *paths: str | os.PathLike[str],
    options: ReadOptions | None = None,
    validation: float = VALIDATION_FRACTION,
) -> Corpus:
    """Return the documents of text files and folders, some of them held out for validation.

    Reads all files once to measure the documents; see `choose_held_out` for the split.

    Args:
      paths: see `find_text_files`.
      options: how to read them.
      validation: fraction of the text that is held out, in [0, 1).

    Raises:
      UserError: if there is no text, or a file cannot be read.
    """
    options = options or ReadOptions()
    files, skipped = find_text_files(paths)
    size, counting = sum(file.stat().st_size for file in files), ReadProgress()
    lengths = array.array("q")  # 8 bytes a document, however many there are
    with progress("counting documents", size) as show:
        for file in files:
            before = len(lengths)
            for chunk in read_documents(file, options, counting):
                if chunk.is_first:
                    lengths.append(0)
                lengths[-1] += len(chunk.text)
                show(counting.done)
            if len(lengths) == before:
                skipped.append(file)
    name = _name_some(paths)
    if not lengths:
        raise UserError(f"{name} has only whitespace; expected at least one document")
    held_out, kept = choose_held_out(np.asarray(lengths), validation, is_one_file=len(files) == 1)

    def read(state: ReadProgress) -> Iterator[AssignedChunk]:
        documents = (read_documents(file, options, state) for file in files)
        return assign_splits(itertools.chain.from_iterable(documents), held_out, kept)

    ending = f"last {100 * validation:.3g}% is validation"
    notices = []
    if skipped:
        notices.append(f"skipped {_name_some(skipped)}: no text, or not {TEXT_FILES}")
    if counting.replaced:
        notices.append(f"{counting.replaced:,} invalid characters were replaced by U+FFFD")
    if len(lengths) == 1 and kept:
        split_at = options.split_at
        unsplit = "" if split_at in ("auto", "none") else f", not split at {split_at!r}"
        notices.append(f"there is one document{unsplit}; its {ending}")
    elif kept:
        which = f"documents with more than {200 * validation:.3g}% of the text each: {len(kept)}"
        notices.append(f"{which}; their {ending}")
    return Corpus(
        source=f"text of {name}",
        read=read,
        size=size,
        characters=sum(lengths),
        validation=validation,
        notices=tuple(notices),
    )


def _name_some(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Return the first few paths, and how many more there are."""
    more = len(paths) - MOST_NAMES_SHOWN
    names = ", ".join(os.fspath(path) for path in paths[:MOST_NAMES_SHOWN])
    return f"{names} and {more} more" if more > 0 else names


def choose_held_out(
    lengths: np.ndarray, validation: float, is_one_file: bool
) -> tuple[np.ndarray, dict[int, int]]:
    """Choose the documents that are held out for validation.

    Of one file these are the last ones. Of several files, one of every 1 / validation consecutive
    documents is chosen at random, always the same one, so that every file contributes. A document
    with more than twice the text to hold out is never chosen; its end is held out instead. Unless
    `validation` is 0, each split gets at least one document.

    Args:
      lengths: integers, the characters of each document.
      validation: fraction of the text to hold out, in [0, 1).

    Returns:
      (held_out, kept): booleans, whether each document is held out, and for each document whose
      end is held out, by its index, the characters kept for training.
    """
    held_out = np.zeros(len(lengths), bool)
    if not validation:
        return held_out, {}
    is_long = (lengths > 2 * validation * lengths.sum()) & (lengths * validation >= SHORTEST_END)
    is_long |= len(lengths) == 1
    kept = {int(i): round(int(lengths[i]) * (1 - validation)) for i in np.flatnonzero(is_long)}
    candidates = np.flatnonzero(~is_long)
    count = round(len(candidates) * validation)
    if not kept:
        count = min(max(1, count), len(candidates) - 1)
    edges = [len(candidates) * index // count for index in range(count + 1)] if count else []
    random = Random(HELD_OUT_SEED)
    chosen = [a + int(random.random() * (b - a)) for a, b in itertools.pairwise(edges)]
    held_out[candidates[-count:] if is_one_file and count else candidates[chosen]] = True
    return held_out, kept


def assign_splits(
    chunks: Iterable[Chunk], held_out: np.ndarray, kept: dict[int, int]
) -> Iterator[AssignedChunk]:
    """Yield the chunks of documents with their split, as `choose_held_out` returns it."""
    index = -1

    def document_index(chunk: Chunk) -> int:
        nonlocal index
        index += chunk.is_first
        return index

    for document, parts in itertools.groupby(chunks, document_index):
        if document == len(held_out):
            raise UserError("text was added to the files while they were read; prepare them again")
        if document in kept:
            yield from hold_out_end(parts, kept[document])
        else:
            split = "validation" if held_out[document] else "train"
            yield from ((split, part) for part in parts)


def hold_out_end(chunks: Iterable[Chunk], kept: int) -> Iterator[AssignedChunk]:
    """Yield the chunks of one document with their split, cut at a line end near `kept`."""
    split, position, is_first = "train", 0, True  # is_first: this split has no chunk yet
    for chunk in chunks:
        text, room = chunk.text, kept - position
        position += len(text)
        if split == "validation" or (room > len(text) and not chunk.is_last):
            yield split, dataclasses.replace(chunk, is_first=is_first)
            is_first = False
            continue
        cut = _line_end(text, max(1, room))
        yield "train", Chunk(text[:cut].rstrip(), is_first, is_last=True)
        split, rest, is_first = "validation", text[cut:].lstrip(), True
        if rest:
            yield split, Chunk(rest, is_first, chunk.is_last)
            is_first = False


def _line_end(text: str, near: int) -> int:
    """Return the first line end from `near` on; else the last before, else a space, else `near`."""
    positions = (text.find("\n", near), text.rfind("\n", 0, near), text.find(" ", near))
    return next((position for position in positions if position > 0), near)


# ---- named corpora ----

NAMES = ("stories", "shakespeare", "tinystories")
STORIES = 20_000  # training stories
TRAINING_PER_VALIDATION = 20  # training stories for each validation story
STORY_LENGTH = 500  # characters, approximately
TRUNCATE_EVERY = 6  # one training story in so many is truncated at its start

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES_URL = (
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
    "TinyStories_all_data.tar.gz"
)


def named_corpus(
    name: str, *, validation: float = VALIDATION_FRACTION, stories: int = STORIES
) -> Corpus:
    """Return the corpus of a name, downloaded if necessary.

    Args:
      name: one of `NAMES`.
      validation: fraction that is held out; not used by "stories".
      stories: number of training stories of "stories".

    Raises:
      UserError: for an unknown name, or if a download fails.
    """
    if name == "stories":
        return embedded_stories(stories)
    if name == "shakespeare":
        path = download(SHAKESPEARE_URL, "shakespeare.txt", SHAKESPEARE_SHA256)
        corpus = corpus_from_files(
            path, options=ReadOptions(split_at="none"), validation=validation
        )
    elif name == "tinystories":
        archive = download(TINYSTORIES_URL, "TinyStories_all_data.tar.gz")
        folder = unpack(archive, cache_folder() / "tinystories")
        corpus = corpus_from_files(folder, validation=validation)
    else:
        expected = f"; expected one of {', '.join(NAMES)}"
        raise UserError(f"corpus {name!r} is unknown{did_you_mean(name, NAMES) or expected}")
    return dataclasses.replace(corpus, source=f"corpus {name}")


def embedded_stories(count: int) -> Corpus:
    """Return `count` generated training stories and a twentieth as many for validation.

    Some training stories are truncated at their start: a model that has only seen complete stories
    cannot continue a prompt from the middle of one, such as "One day".
    """
    held_out = max(1, count // TRAINING_PER_VALIDATION)

    def read(state: ReadProgress) -> Iterator[AssignedChunk]:
        from llama_jax.data.stories import stories

        for number, story in enumerate(stories("train", count)):
            state.done += 1
            text = truncate_start(story, number) if number % TRUNCATE_EVERY == 0 else story
            yield "train", Chunk(text, is_first=True, is_last=True)
        for story in stories("validation", held_out):
            state.done += 1
            yield "validation", Chunk(story, is_first=True, is_last=True)

    return Corpus(
        source=f"corpus stories, {count} for training and {held_out} for validation",
        read=read,
        size=count + held_out,
        unit=" stories",
        characters=count * STORY_LENGTH,
    )


def truncate_start(story: str, seed: int) -> str:
    """Return a story from a random word in its first three quarters on, except the very first."""
    words = story.split(" ")
    return " ".join(words[1 + int(Random(seed).random() * 0.75 * len(words)) :])


# ---- downloads ----


def download(url: str, name: str, sha256: str = "") -> Path:
    """Return the path of a downloaded file, from the cache if it is there.

    Args:
      url: to download from.
      name: of the file in the cache folder.
      sha256: expected hash; empty: not checked.

    Raises:
      UserError: if the download fails, with the path to put the file at.
    """
    path = cache_folder() / name
    if path.is_file():
        return path
    partial = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial)
        if sha256 and found != sha256:
            raise UserError(f"{url} has another sha256 than expected, {found}")
        partial.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        message = f"cannot download {url}: {reason}; get it by other means and put it at {path}"
        raise UserError(message) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path) -> str:
    """Download a URL to a file and return its sha256."""
    digest, done = hashlib.sha256(), 0
    with (
        urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response,
        partial.open("wb") as stream,
    ):
        size = int(response.headers.get("Content-Length") or 0)
        with progress(f"downloading {url.rsplit('/', 1)[-1]}", size) as show:
            while block := response.read(DOWNLOAD_BLOCK):
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
    """Return the folder with the contents of a `.tar.gz` archive, unpacked if it is missing.

    Extracts only plain files that stay inside.

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
                        _extract(tar, member, partial)
                        show(raw.tell())
        except (tarfile.TarError, EOFError, OSError) as error:
            reason = f"{archive} cannot be unpacked: {error}"
            raise UserError(f"{reason}; delete it, and it is downloaded again") from error
    return folder


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Extract a plain file that stays inside `folder`; raise `TarError` for a link or any other.

    The filters of `tarfile` do this too, but the first releases of Python 3.11 lack them.
    """
    target = (folder / member.name).resolve()
    is_inside = target.is_relative_to(folder.resolve())
    if not is_inside or not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name!r} is not a plain file inside it")
    if source := tar.extractfile(member):
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
