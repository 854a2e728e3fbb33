"""Write docs/config.md, the table of all settings: python docs/make_config_page.py

Types, ranges and defaults are those of the dataclasses, meanings the comments on their fields.
"""

import ast
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, get_type_hints

from llama_jax.config import MAX_INT, Choice, Config
from llama_jax.config_parsing import TYPE_NAMES

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Settings of a run

Made by `python docs/make_config_page.py` from `llama_jax/config.py`; do not edit it. A config file,
such as `configs/demo.py`, sets them, and a flag overrides one of them:
`python train.py --config.optimizer.learning_rate=3e-4`.
"""


def comments(cls: type) -> dict[str, str]:
    """Return the comment of each field, at the end of its line and on the lines below it."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parts = [lines[node.end_lineno - 1].partition("  # ")[2]]  # type: ignore[operator]
            for line in lines[node.end_lineno :]:
                if not line.strip().startswith("# "):
                    break
                parts.append(line.strip()[2:])
            found[node.target.id] = " ".join(filter(None, parts))
    return found


def type_and_range(hint: Any) -> str:
    """Format the type of a field, and its range or choices."""
    text = TYPE_NAMES[getattr(hint, "__origin__", hint)]
    for constraint in getattr(hint, "__metadata__", ()):
        if isinstance(constraint, Choice):
            return ", ".join(f'`"{choice}"`' for choice in constraint.choices)
        high = "" if constraint.high in (MAX_INT, math.inf) else f" to {constraint.high:,g}"
        text += f", from {constraint.low:g}{high}" if high else f", {constraint.low:g} or more"
    return text


def rows(cls: type, prefix: str) -> list[str]:
    """Return the rows of a section, and of the sections in it."""
    hints, meanings, out = get_type_hints(cls, include_extras=True), comments(cls), []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            out += rows(hint, f"{key}.")  # type: ignore[arg-type]
            continue
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        meaning = meanings[field.name].replace("|", "\\|")
        out.append(f"| `{key}` | {type_and_range(hint)} | {default} | {meaning} |")
    return out


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for name, cls in get_type_hints(Config).items():
        summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows(cls, f"{name}.")]
        parts.append(f"## {name}\n\n{summary}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
