"""The corpora that have a name: one that the project makes itself, two from the internet."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

from llama_jax.data.corpus import HELD_OUT, Assigned, Corpus, corpus_from_files
from llama_jax.data.documents import Passage
from llama_jax.data.downloads import cache_folder, download, unpack
from llama_jax.data.new_folder import check_place
from llama_jax.data.prepare import TokenOptions, prepare
from llama_jax.data.text_files import Reading
from llama_jax.data.tokens import TokenFolder
from llama_jax.errors import UserError, nearest

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
        raise UserError(f"corpus {name!r} is unknown{nearest(name, NAMES) or expected}")
    return dataclasses.replace(corpus, source=f"corpus {name}")


def embedded_stories(count: int) -> Corpus:
    """`count` stories for training and a twentieth of that for validation, made on the spot.

    Some of those for training begin at a later word. A model that has only met openings where a
    text begins cannot go on from "One day", which is what a user may well type.
    """
    held_out = max(1, count // STORIES_PER_HELD_OUT)

    def read(reading: Reading) -> Iterator[Assigned]:
        from llama_jax.stories import stories

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
    check_place(Path(output))
    corpus = named_corpus(name, validation=validation, stories=stories)
    return prepare(corpus, Path(output), options or default_options(name))
