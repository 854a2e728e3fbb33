"""Who may import whom: imports go down a floor or sideways, never up, and never in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # low to high
    "errors out_of_memory config config_parsing config_flags arguments stand_ins text",
    "platforms names packing products positions cache layers attention remat parallel",
    "model arrangement",
    "stories data processes instruments plot quantization checkpoints formats sampling"
    " compilation_cache huge_pages",
    "training generation conversion planning llm terminal",
    "cli",
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units.split()}
RUN_AS_MODULES = {"llama_jax.plot"}  # doors too, by `python -m`: they may import cli
DOORS = [path.stem for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"]
ONLY_IN = {  # libraries that few may know
    "orbax": {"checkpoints.reader", "checkpoints.writer"},
    "tensorstore": {"checkpoints.layout"},
    "grain": {"data"},
    "optax": {"training.optimizer", "training.run", "training.train_step"},
    "sentencepiece": {"text.tokenizer", "formats"},
    "gguf": {"formats"},
    "safetensors": set(),
    "absl": {"config_flags", "config_parsing", "configs"},
    "ml_collections": {"config_flags", "config_parsing", "configs"},
    "matplotlib": {"plot"},
    "tensorboardX": {"instruments.tensorboard"},
    "torch": {"conversion.references"},
    "transformers": {"conversion.references"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "llama_jax").rglob("*.py"))}
OUTSIDE = {module_name(path): path for path in sorted((ROOT / "configs").glob("*.py"))}
OUTSIDE |= {door: ROOT / f"{door}.py" for door in DOORS}
EVERYTHING = FILES | OUTSIDE


def imports(source, name, is_package=False):
    """Every module that a source imports, anywhere in it, by its whole name."""
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


def test_every_part_has_a_floor():
    parts = {unit(name) for name in FILES} - {"llama_jax"}
    assert parts <= FLOOR_OF.keys(), f"give a floor to {sorted(parts - FLOOR_OF.keys())}"


@pytest.mark.parametrize("name", FILES)
def test_imports_never_go_up(name):
    for imported in ours(imports_of(name)):
        if imported == "llama_jax.cli" and name in RUN_AS_MODULES:
            continue
        up = FLOOR_OF[unit(imported)] > FLOOR_OF.get(unit(name), 0)
        assert not up, f"{name} imports {imported}, which is floors above"


def test_the_command_line_knows_only_the_ground():
    allowed = {"errors", "out_of_memory", "config_flags"}
    assert {unit(name) for name in ours(imports_of("llama_jax.cli"))} <= allowed


def test_nothing_imports_in_a_circle():
    graph = {name: {i for i in imports_of(name) if i != name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_two_parts_need_each_other():
    graph = {}
    for name in FILES:
        needed = {unit(imported) for imported in ours(imports_of(name))} - {unit(name)}
        graph.setdefault(unit(name), set()).update(needed)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", FILES)
def test_the_package_knows_no_door(name):
    assert not set(DOORS) & {imported.split(".")[0] for imported in imports_of(name)}


@pytest.mark.parametrize("name", EVERYTHING)
def test_libraries_stay_where_they_belong(name):
    for imported in imports_of(name):
        places = ONLY_IN.get(imported.split(".")[0])
        allowed = places is None or {unit(name), name.removeprefix("llama_jax.")} & places
        assert allowed, f"{name} imports {imported}"


def test_config_knows_no_jax():
    for name in ("errors", "config", "config_parsing", "config_flags", "cli"):
        libraries = {imported.split(".")[0] for imported in imports_of(f"llama_jax.{name}")}
        assert not libraries & {"jax", "flax", "numpy"}


@pytest.mark.parametrize("module", ["llama_jax", "llama_jax.cli", "llama_jax.config"])
def test_importing_it_loads_no_jax(module):
    script = f"import sys, {module}; print(sorted({{'jax', 'flax', 'torch'}} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn as nn", ["torch.nn"]),
        ("def f():\n    from llama_jax import model", ["llama_jax.model"]),
        ("from llama_jax.model import Llama", ["llama_jax.model"]),
        ("from .model import Llama", ["llama_jax.model"]),
        ("from . import model", ["llama_jax.model"]),
    ],
)
def test_imports_are_found_however_they_are_written(source, found):
    assert imports(source, "llama_jax.layers") == found
