"""A corpus: documents that know whether they are for training or for validation.

Does not know tokens, nor where text files come from.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator

from llama_jax.data.prepare.documents import Passage, Reading, read_documents, total_bytes
from llama_jax.errors import UserError
from llama_jax.files import progress

HELD_OUT = 0.05  # fraction of the documents that is for validation
Assigned = tuple[str, Passage]  # the split that a passage belongs to, and the passage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that can be read again and again, all of the training split first."""

    source: str  # where it comes from, in words
    read: Callable[[Reading], Iterator[Assigned]]
    size: int  # what `Reading.done` comes to in the end
    unit: str = "B"  # of that size
    errors: str = "strict"  # see `Reading`
    characters: int  # about, in total
    notices: tuple[str, ...] = ()  # what the user should know about how it was split

    def training_sample(self, characters: int) -> Iterator[str]:
        """Texts spread evenly over the training split, about so many characters in all."""
        every = -(-self.characters // characters)
        reading = Reading(errors=self.errors)
        training = (passage for split, passage in self.read(reading) if split == "train")
        with progress("sampling text", self.size, self.unit) as show:
            for index, passage in enumerate(training):
                if index % every == 0:
                    show(reading.done)
                    yield passage.text


def corpus_from_files(
    path: str | os.PathLike[str],
    *,
    split_at: str = "auto",
    errors: str = "strict",
    validation: float = HELD_OUT,
) -> Corpus:
    """The documents of a text file or folder, the last of them held out for validation.

    Reads everything once to count. Of a single document, its last part is held out.

    Args:
      path: see `read_documents`, as for `split_at`.
      errors: "strict" or "replace", for what is no UTF-8.
      validation: fraction of the documents that is held out, in [0, 1).

    Raises:
      UserError: if there is nothing to read, or not enough to hold something out.
    """
    size, reading = total_bytes(path), Reading(errors=errors)
    documents = characters = 0
    with progress("counting documents", size) as show:
        for passage in read_documents(path, split_at, reading):
            documents += passage.is_first
            characters += len(passage.text)
            show(reading.done)
    if not documents:
        raise UserError(f"{path} holds no text but blanks; expected at least one document")

    def read(reading: Reading) -> Iterator[Assigned]:
        passages = read_documents(path, split_at, reading)
        if documents == 1 and validation > 0:
            return hold_out_end(passages, round(characters * (1 - validation)))
        return hold_out_documents(passages, documents, validation)

    notices = []
    if reading.replaced:
        notices.append(f"{reading.replaced:,} characters were no text and became U+FFFD")
    if documents == 1 and validation > 0:
        whole = "" if split_at in ("auto", "none") else f", not split at {split_at!r}"
        notices.append(f"there is one document{whole}; its last {validation:.0%} is for validation")
    return Corpus(
        source=f"text of {os.fspath(path)}",
        read=read,
        size=size,
        errors=errors,
        characters=characters,
        notices=tuple(notices),
    )


def hold_out_documents(
    passages: Iterable[Passage], documents: int, validation: float
) -> Iterator[Assigned]:
    """Passages of so many documents, assigned: the last fraction is for validation.

    As long as anything is held out, each split has at least one document.
    """
    held_out = min(max(1, round(documents * validation)), documents - 1) if validation else 0
    seen = 0
    for passage in passages:
        seen += passage.is_first
        yield "train" if seen <= documents - held_out else "validation", passage


def hold_out_end(passages: Iterable[Passage], kept: int) -> Iterator[Assigned]:
    """Passages of one document, assigned: it is cut in two at a line's end near `kept`."""
    split, position, is_first = "train", 0, True  # is_first: nothing of this split came yet
    for passage in passages:
        text, room = passage.text, kept - position
        position += len(text)
        if split == "validation" or (room > len(text) and not passage.is_last):
            yield split, dataclasses.replace(passage, is_first=is_first)
            is_first = False
            continue
        cut = _line_end(text, max(1, room))
        yield "train", Passage(text[:cut].rstrip(), is_first, is_last=True)
        split, rest, is_first = "validation", text[cut:].lstrip(), True
        if rest:
            yield split, Passage(rest, is_first, passage.is_last)
            is_first = False


def _line_end(text: str, near: int) -> int:
    """The first line end from `near` on; else the last one before, else a space, else `near`."""
    places = (text.find("\n", near), text.rfind("\n", 0, near), text.find(" ", near))
    return next((place for place in places if place > 0), near)
