"""The token folders that a run trains on, and how often it draws from each."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from llama_jax.config import DataConfig
from llama_jax.data.token_folder import PREFERENCES, TokenFolder
from llama_jax.errors import UsageError, UserError, require, shown

LARGEST_RATIO = 10**6  # of a weight to 1, and of 1 to a weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Opened token folders of one tokenizer, with their weights."""

    folders: tuple[TokenFolder, ...]
    weights: tuple[int, ...]  # in proportion to how often examples are drawn; without common factor

    @property
    def first(self) -> TokenFolder:
        """The folder that stands for all: its tokenizer, its chat format, BOS before a prompt."""
        return self.folders[0]

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and weights; of one folder, its own."""
        if len(self.folders) == 1:
            return self.folders[0].fingerprint
        parts = [(each.fingerprint, weight) for each, weight in zip(self.folders, self.weights)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def validation(self) -> dict[str, TokenFolder]:
        """The folders that have text for validation, by their paths; all if none has."""
        found = [each for each in self.folders if each.splits["validation"].tokens]
        return {str(folder.path): folder for folder in found or self.folders}


def parse_sources(text: str) -> dict[str, Fraction]:
    """Return the weight of each folder in a text such as "data/a:0.7,data/b:0.3"; their sum is 1.

    Raises:
      UsageError: for a folder that occurs twice, and a weight that is not a number above 0.
    """
    weights: dict[str, Fraction] = {}
    for item in text.split(","):
        path, _, number = (part.strip() for part in item.rpartition(":"))
        expected = "expected folder:weight, such as data/a:0.7"
        require(bool(path), f"data.sources has {shown(item)}; {expected}")
        require(path not in weights, f"data.sources has {path} twice; add up its weights")
        try:
            weights[path] = Fraction(number)
        except (ValueError, ZeroDivisionError):
            message = f"data.sources has the weight {shown(number)} for {path}"
            raise UsageError(f"{message}; expected a number, such as 0.7") from None
        is_within = Fraction(1, LARGEST_RATIO) <= weights[path] <= LARGEST_RATIO
        require(is_within, f"data.sources has the weight {number} for {path}; expected 1e-6 to 1e6")
    return {path: weight / sum(weights.values()) for path, weight in weights.items()}


def open_sources(config: DataConfig) -> Sources:
    """Open the folders of `data.sources`, or the one of `data.path`.

    Raises:
      UsageError: as `parse_sources`.
      UserError: if one is missing or damaged, has another tokenizer than the first, or only some
        have preference pairs.
    """
    shares = parse_sources(config.sources) if config.sources else {}
    folders = [TokenFolder.open(Path(path).expanduser()) for path in shares or [config.path]]
    first = folders[0]
    for folder in folders[1:]:
        if folder.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"{folder.path} and {first.path} have different tokenizers; prepare one again with"
                f" --tokenizer {first.tokenizer_path}"
            )
        if (folder.kind == PREFERENCES) != (first.kind == PREFERENCES):
            raise UserError(
                f"{folder.path} has {folder.kind} and {first.path} has {first.kind}; preferences"
                " are trained on by themselves"
            )
    whole = math.lcm(*(share.denominator for share in shares.values()))
    weights = tuple(int(share * whole) for share in shares.values())
    return Sources(folders=tuple(folders), weights=weights or (1,))


def source_of(index: int, weights: Sequence[int]) -> tuple[int, int]:
    """Return the source of the example at an index, and how many of that source precede it.

    Sources take turns as evenly as possible: of the first n examples, the first source has
    n * weight / sum(weights), rounded up, and so on among the others.

    Args:
      index: of the example, from 0.
      weights: positive integers.
    """
    total, begin, end = sum(weights), index, index + 1  # examples that sources left over share
    for source, weight in enumerate(weights[:-1]):
        rest = [count * (total - weight) // total for count in (begin, end)]
        if begin - rest[0] != end - rest[1]:
            return source, begin - rest[0]
        total, (begin, end) = total - weight, rest
    return len(weights) - 1, begin
