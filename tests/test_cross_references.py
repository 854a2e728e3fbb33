"""What docstrings, comments and documentation name of the package exists."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from llama_jax.config import Config, RopeScaling

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llama_jax"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
REFERENCE = re.compile(r"`([a-z_]+(?:\.[A-Za-z_]\w*)+)`")
FOLDERS = ("llama_jax", "benchmarks", "configs")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FILES += sorted(ROOT.glob("docs/**/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
KEYS = {  # of a config, such as `data.path`, which look like modules
    f"{section}.{field.name}"
    for section, each in get_type_hints(Config).items()
    for field in dataclasses.fields(each)
}
KEYS |= {f"model.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
SUFFIXES = (".py", ".pkl", ".json")  # of files, such as Meta's `model.py`


def dead(text):
    """References to rooms in a text that lead nowhere."""
    found = []
    for reference in REFERENCE.findall(text):
        room, *parts = reference.split(".")
        if reference.endswith(SUFFIXES) or room not in ROOMS or reference in KEYS:
            continue
        if not exists(PACKAGE / room, parts):
            found.append(reference)
    return found


def exists(place, parts):
    """Whether names lead from a folder of the package to a module or to what one defines."""
    while parts and (place / parts[0]).is_dir():
        place, parts = place / parts[0], parts[1:]
    if not parts:
        return True
    module = place / f"{parts[0]}.py"
    if not module.is_file():
        return place != PACKAGE and defines(place / "__init__.py", parts[0])
    return len(parts) == 1 or defines(module, parts[1])


def defines(module, name):
    """Whether a module defines or imports a name at its top level."""
    return name in names_of(module)


@functools.cache
def names_of(module):
    """The names that a module defines or imports at its top level."""
    names = set()
    for node in ast.parse(module.read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        named = (each for target in targets if target for each in ast.walk(target))
        names |= {each.id for each in named if isinstance(each, ast.Name)}
        names |= {alias.name for alias in getattr(node, "names", ())}
        names.add(getattr(node, "name", ""))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_name_what_exists(path):
    assert dead(path.read_text()) == []


def imports_of_the_package(code):
    """Yield (module path parts, name) for each `from llama_jax… import name` in Python code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llama_jax":
            yield from ((node.module.split(".")[1:], alias.name) for alias in node.names)


def python_code(path):
    """Return the code of a script, or of a notebook's cells."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"^\s*[!%](?:.*\\\n)*.*$", "", code, flags=re.MULTILINE)


SCRIPTS = [
    path for folder in ("benchmarks", "docs", "configs") for path in ROOT.glob(f"{folder}/*.py")
]
SCRIPTS += [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.ipynb"), *PACKAGE.rglob("*.py")]


@pytest.mark.parametrize("path", sorted(SCRIPTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_functions_too_name_what_exists(path):
    public = ast.parse((PACKAGE / "__init__.py").read_text())
    names = {node.value for node in ast.walk(public) if isinstance(node, ast.Constant)}
    for parts, name in imports_of_the_package(python_code(path)):
        known = name in names if not parts else exists(PACKAGE, [*parts, name])
        assert known, f"llama_jax.{'.'.join(parts)} has no {name}"


def test_dead_references_are_found():
    text = "`model.cache.KVCache`, `model.caches`, `model.cache.Cash`, `jax.jit`"
    text += " `text.chat_formats.TEMPLATES` `model.py`"
    assert dead(text) == ["model.caches", "model.cache.Cash"]


def test_paths_in_the_documentation_exist():
    for page in PAGES:
        folders = "llama_jax|tests|docs|configs|benchmarks"
        for path in re.findall(
            rf"(?<![\w./])(?:{folders})/[a-z_0-9/]+(?:\.\w+)?", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    callers = [*PAGES, ROOT / ".pre-commit-config.yaml", ROOT / ".github/workflows/ci.yml"]
    for path in callers:
        text = re.sub(r"PYTHON=\S+ ", "", path.read_text())
        for target in re.findall(r"(?:^|`|: )make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{path.name} calls make {target}"


def test_modules_in_the_architecture_page_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = set(re.findall(r"`([a-z_0-9/]+\.py)`", page))
    assert len(modules) > 20
    for module in modules:
        assert any((place / module).is_file() for place in (PACKAGE, ROOT)), module
