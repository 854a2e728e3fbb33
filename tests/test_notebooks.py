"""The notebooks: kept without outputs, and run from top to bottom as a user would."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = " ".join(
    f"--config.{setting}"
    for setting in ("optimizer.steps=20", "optimizer.warmup_steps=5", "run.eval_batches=1")
)


def cells(path, kind="code"):
    """The sources of one kind of cells."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_kept(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_doors_and_configs_exist(path):
    text = "\n".join(cells(path))
    for door in re.findall(r"!python (\w+\.py)", text):
        assert (ROOT / door).is_file()
    for choices in re.findall(r"CONFIG = .*@param \[(.*)\]", text):
        for name in choices.split(", "):
            assert (ROOT / "configs" / f"{json.loads(name)}.py").is_file()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a user has after cloning: the files that the notebooks use, and no runs."""
    folder = tmp_path_factory.mktemp("clone")
    for door in ROOT.glob("*.py"):
        shutil.copy(door, folder)
    for part in ("llama_jax", "configs", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(clone, name, **parameters):
    """The text that each code cell printed, and the kinds of what else it showed.

    A cell with the parameters' new values comes after the first; nothing is installed.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / name, as_version=4)
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLAMA_JAX_CACHE": str(clone / "cache"),
        "PYTHONPATH": "",
        "XLA_FLAGS": "",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(clone / "notebooks")}}
    )
    client.execute(env=environment)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(o.text for o in cell if o.output_type == "stream") for cell in outputs]
    kinds = {kind for cell in outputs for o in cell for kind in o.get("data", ())}
    return "\n".join(texts), kinds


def tags(cell):
    return cell.metadata.get("tags", ())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_train_then_sample(clone):
    names = {"CONFIG": "demo", "CHECKPOINT": "ckpt/notebook", "FLAGS": SHORT}
    said, shown = run(clone, "train_tpu.ipynb", **names)
    assert "fits: " in said
    assert "sample with: python sample.py --ckpt ckpt/notebook" in said
    assert "image/png" in shown
    assert said.count("Once upon a time") >= 3
    assert (clone / "ckpt" / "notebook.gguf").is_file()

    said, _ = run(clone, "train_tpu.ipynb", **names)  # again: nothing is lost or made anew
    assert "all 20 steps were made already" in said

    said, _ = run(clone, "sample_tpu.ipynb", WEIGHTS="ckpt/notebook", CHECKPOINT="ckpt/int8")
    assert "fits: " in said
    assert "Once upon a time" in said
    assert re.search(r"\d\.\d  Once upon a time", said)
    assert "Error" not in said
