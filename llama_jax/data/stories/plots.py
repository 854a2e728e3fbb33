"""The plots of the stories, read from the text files beside this module.

A file has sections such as this one. A section has tables and beats as in `stories.grammar`, in the
order in which they are used, and the names of shared ones; a line may continue after a backslash.

    == the lost toy
    cast: Lily, Tim, Mom
    HOMES

    toy / look
    ball / red, blue

    OPENING

    - {He} had {a look} {toy}.
"""

from collections.abc import Iterator
from importlib import resources

from llama_jax.data.stories.grammar import Beat, Plot, Table, script, table

# fmt: off
GIRLS = (
    "Lily", "Mia", "Anna", "Sue", "Emma", "Nora", "Ella", "Amy", "Zoe", "Ruby", "Lucy", "Molly",
    "Clara", "Maya", "Ida", "Dot", "Hazel", "Penny", "Bella",
)
BOYS = (
    "Tim", "Ben", "Tom", "Max", "Sam", "Leo", "Jack", "Finn", "Noah", "Oliver", "Henry", "Theo",
    "Eli", "Oscar", "Hugo", "Pip", "Rusty", "Chip", "Otto",
)
# fmt: on


def cast(first: str, second: str, elder: str = "Mom") -> Table:
    """Return the characters of a plot: two children, either of whom may be the hero, and an adult.

    Each plot has its own children, with different pronouns, so that "he" and "she" are
    unambiguous; adults are referred to by name only.
    """

    def row(hero: str, friend: str) -> str:
        girl, boy = "she / her / her", "he / him / his"
        he, child, friend_he = (girl, "girl", boy) if hero in GIRLS else (boy, "boy", girl)
        return f"{hero} / {he} / {child} / {friend} / {friend_he} / {elder}"

    slots = "hero / he / him / his / child / friend / friend_he / friend_him / friend_his / elder"
    return table("\n".join([slots, row(first, second), row(second, first)]))


HOMES = table(
    """
    trait / home
    little, kind, happy, curious, cheerful, gentle, clever, lively, playful, sweet, young, good \
    / a small house, a cozy house, a quiet village, a little town, a big city, a tall house, \
    a red house, a farm house, a white house
    """
)

OPENING = script(
    """
    - Once upon a time, there was {a trait} {child} named {hero}.
    - Once upon a time, there lived {a trait} {child} named {hero}.
    - Once upon a time, {a trait} {child} named {hero} lived in {home}.
    - There once was {a trait} {child} named {hero}.
    - {hero} was {a trait} {child} who lived in {home}.
    """
)

FAIR_DAYS = table(
    """
    day
    sunny day, warm day, bright morning, warm afternoon, fine spring day, summer day, \
    lovely morning, quiet Sunday, cool autumn day, Saturday morning
    """
)

ANIMAL_OPENING = script(
    """
    - Once upon a time, when animals could talk, there was {a trait} {animal} named {hero}.
    - Once upon a time, when animals could talk, there lived {a trait} {animal} named {hero}.
    - Once upon a time, when animals could talk, {a trait} {animal} named {hero} lived {den}.
    - There once was {a trait} {animal} named {hero}.
    - {hero} was {a trait} {animal} who lived {den}.
    """
)

SHARED_TABLES = {"HOMES": HOMES, "FAIR_DAYS": FAIR_DAYS}
SHARED_BEATS = {"OPENING": OPENING, "ANIMAL_OPENING": ANIMAL_OPENING}


def parse_plots(text: str) -> Iterator[Plot]:
    """Yield the plots of a file.

    Raises:
      ValueError: for a malformed table or script, or a slot that no table fills.
    """
    for section in text.replace("\\\n", "").split("== ")[1:]:
        tables: list[Table] = []
        beats: tuple[Beat, ...] = ()
        _, body = section.split("\n", 1)
        for block in body.strip().split("\n\n"):
            for line in block.splitlines():
                if line.startswith("cast: "):
                    tables.append(cast(*line.removeprefix("cast: ").split(", ")))
                elif line in SHARED_TABLES:
                    tables.append(SHARED_TABLES[line])
                elif line in SHARED_BEATS:
                    beats += SHARED_BEATS[line]
                elif line.startswith("- "):
                    beats += script(block)
                    break
                else:
                    tables.append(table(block))
                    break
        yield Plot(tuple(tables), beats)


FOLDER = resources.files("llama_jax.data.stories")
FILES = ("outdoors.txt", "home.txt", "friends.txt")  # their order is part of the corpus
PLOTS = tuple(plot for name in FILES for plot in parse_plots((FOLDER / name).read_text("utf-8")))
