"""Which rooms of the package may import which, and which libraries each may import."""

import ast
import graphlib
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # what each may import, in an order in which rooms import only earlier ones
    "errors": "",
    "config": "errors",
    "config_parsing": "config errors",
    "presets": "config",
    "files": "errors",
    "text": "errors",
    "hardware": "errors config",
    "kernels": "errors",
    "model": "kernels config errors",
    "distributed": "config errors",
    "quantization": "model kernels config errors",
    "data": "text distributed config errors files",
    "checkpoints": "model quantization text distributed config_parsing config errors files",
    "inference": "model quantization kernels text distributed config errors",
    "training": "model data checkpoints distributed hardware quantization kernels inference text"
    " config errors files",
    "formats": "checkpoints quantization model text config_parsing config errors files",
    "planning": "training inference data distributed hardware quantization kernels model config"
    " errors",
    "study": "training inference data checkpoints distributed model text config errors files",
    "llm": "inference checkpoints formats distributed text config errors",
    "evaluation": "llm inference data distributed text errors files",
    "serving": "llm inference checkpoints formats distributed model text config errors files",
    "cli": "serving evaluation study llm inference checkpoints training data formats planning"
    " quantization model hardware distributed text config_parsing config errors files",
}
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"]
ONLY_IN = {  # libraries that one room, or a few modules, may import
    "orbax": {"checkpoints"},
    "tensorstore": {"checkpoints"},
    "grain": {"data"},
    "pyarrow": {"data"},
    "optax": {"training"},
    "sentencepiece": {"text", "formats"},
    "tokenizers": {"text"},
    "gguf": {"formats"},
    "jinja2": {"text.jinja_sandbox"},
    "safetensors": set(),
    "absl": {"config", "cli.config_flags", "configs"},
    "ml_collections": {"config", "cli.config_flags", "configs"},
    "matplotlib": {"training.plot"},
    "packaging": {"cli.doctor"},
    "tensorboardX": {"training.trackers"},
    "wandb": {"training.trackers"},
    "lm_eval": {"evaluation.harness"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "sse_starlette": {"serving"},
    "llguidance": {"inference.constraints"},
    "torch": {"formats.verify"},
    "transformers": {"formats.verify"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "llama_jax").rglob("*.py"))}
OUTSIDE = {module_name(path): path for path in sorted((ROOT / "configs").glob("*.py"))}
OUTSIDE |= {script: ROOT / f"{script}.py" for script in SCRIPTS}
EVERYTHING = FILES | OUTSIDE


def imports(source, name, is_package=False):
    """Every module that a source imports, anywhere in it, by its full name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = name.split(".")
            home = home[: len(home) - node.level + is_package] if node.level else []
            base = ".".join([*home, *filter(None, [node.module])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            found += [module if module in FILES else base for module in inside]
    return sorted(set(found))


def imports_of(name):
    path = EVERYTHING[name]
    return imports(path.read_text(), name, path.name == "__init__.py")


def unit(name):
    """The part of the package that a module belongs to, or the script or folder outside it."""
    parts = name.split(".")
    return parts[1] if parts[0] == "llama_jax" and len(parts) > 1 else parts[0]


def ours(names):
    return [name for name in names if name.split(".")[0] == "llama_jax"]


def test_the_table_lists_every_room():
    assert {unit(name) for name in FILES} - {"llama_jax"} == set(ROOMS)


def test_rooms_import_only_earlier_rooms():
    for index, (room, allowed) in enumerate(ROOMS.items()):
        assert set(allowed.split()) <= set(list(ROOMS)[:index]), room


def test_the_picture_shows_the_table():
    picture = (ROOT / "docs" / "pictures" / "imports.svg").read_text()
    table = re.search("<dc:description>(.*)</dc:description>", picture)[1]
    expected = {room: allowed.split() for room, allowed in ROOMS.items()}
    assert json.loads(html.unescape(table)) == expected, "run python docs/draw_imports.py"


@pytest.mark.parametrize("name", FILES)
def test_rooms_import_only_what_the_table_lists(name):
    room = unit(name)
    for imported in {unit(imported) for imported in ours(imports_of(name))} - {room, "llama_jax"}:
        allowed = imported in ROOMS[room].split()
        assert allowed, f"{name} imports {imported}"


def test_there_is_no_import_cycle():
    graph = {name: {i for i in imports_of(name) if i != name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("name", FILES)
def test_the_package_imports_no_script(name):
    assert not set(SCRIPTS) & {imported.split(".")[0] for imported in imports_of(name)}


@pytest.mark.parametrize("name", EVERYTHING)
def test_libraries_are_imported_in_one_room(name):
    for imported in imports_of(name):
        places = ONLY_IN.get(imported.split(".")[0])
        allowed = places is None or {unit(name), name.removeprefix("llama_jax.")} & places
        assert allowed, f"{name} imports {imported}"


def test_config_and_command_line_import_no_jax():
    for name in ("config", "cli.config_flags", "cli.main"):
        libraries = {imported.split(".")[0] for imported in imports_of(f"llama_jax.{name}")}
        assert not libraries & {"jax", "flax", "numpy"}


@pytest.mark.parametrize("module", ["llama_jax", "llama_jax.cli.main", "llama_jax.config"])
def test_importing_the_package_loads_no_jax(module):
    script = f"import sys, {module}; print(sorted({{'jax', 'flax', 'torch'}} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn as nn", ["torch.nn"]),
        ("def f():\n    from llama_jax import errors", ["llama_jax.errors"]),
        ("from llama_jax.errors import UserError", ["llama_jax.errors"]),
        ("from .errors import UserError", ["llama_jax.errors"]),
        ("from . import errors", ["llama_jax.errors"]),
    ],
)
def test_imports_are_found_however_they_are_written(source, found):
    assert imports(source, "llama_jax.llm") == found
