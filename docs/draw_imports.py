"""Draw which room of the package may import which: python docs/draw_imports.py

The table is `ROOMS` in `tests/test_imports.py`, which enforces it. The picture,
`docs/pictures/imports.svg`, carries the table in its metadata, so that a test can tell whether it
is up to date.
"""

import json
import runpy
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "imports.svg"
GRID, DOT, TEXT = "#dcdcdc", "#3465a4", "#222222"


def read_table() -> dict[str, list[str]]:
    """Return what each room may import."""
    rooms = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))["ROOMS"]
    return {room: allowed.split() for room, allowed in rooms.items()}


def draw(table: dict[str, list[str]], path: Path) -> None:
    """Draw a table as a matrix with a dot where the room of a row may import that of a column."""
    rooms = list(table)
    size = len(rooms)
    figure, axes = plt.subplots(figsize=(8.2, 6.4))
    for row, room in enumerate(rooms):
        axes.plot([-0.5, row], [row, row], color=GRID, linewidth=1, zorder=1)
        axes.plot([row, row], [row, size - 0.5], color=GRID, linewidth=1, zorder=1)
        columns = [rooms.index(imported) for imported in table[room]]
        axes.scatter(columns, [row] * len(columns), s=70, color=DOT, zorder=3)
        # The name of a column stands on the diagonal, where its line begins.
        axes.text(row + 0.1, row, room, color=TEXT, va="center", fontsize=11, weight="bold")
        axes.text(-0.8, row, room, color=TEXT, va="center", ha="right", fontsize=11)
    axes.set_xlim(-0.6, size + 1.5)
    axes.set_ylim(size - 0.3, -0.7)
    axes.axis("off")
    axes.set_title("● the room of the row may import the room of the column", fontsize=11)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "imports"}):
        description = {"Title": "Imports between rooms", "Description": json.dumps(table)}
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None, **description})
    plt.close(figure)


if __name__ == "__main__":
    draw(read_table(), PICTURE)
    print(PICTURE.relative_to(ROOT))
