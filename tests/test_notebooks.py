"""The notebooks: stored without outputs, and run from top to bottom."""

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
    """Return the sources of the cells of one kind."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_stored(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_scripts_and_configs_exist(path):
    text = "\n".join(cells(path))
    for script in re.findall(r"!python (\w+\.py)", text):
        assert (ROOT / script).is_file()
    for choices in re.findall(r"CONFIG = .*@param \[(.*)\]", text):
        for name in choices.split(", "):
            assert (ROOT / "configs" / f"{json.loads(name)}.py").is_file()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone, with the files that the notebooks use."""
    folder = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for part in ("llama_jax", "configs", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(clone, name, **parameters):
    """Return the text that the code cells printed, and the MIME types of their other outputs.

    A cell with the values of `parameters` is inserted, and cells that install are left out.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / name, as_version=4)
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(values))
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
    printed, shown = run(clone, "train_tpu.ipynb", **names)
    assert "fits: " in printed
    assert "sample with: python sample.py --ckpt ckpt/notebook" in printed
    assert "image/png" in shown
    assert printed.count("Once upon a time") >= 3
    assert (clone / "ckpt" / "notebook.gguf").is_file()

    printed, _ = run(clone, "train_tpu.ipynb", **names)  # again: nothing is lost or repeated
    assert "all 20 steps were made already" in printed

    printed, _ = run(clone, "sample_tpu.ipynb", WEIGHTS="ckpt/notebook", CHECKPOINT="ckpt/int8")
    assert "fits: " in printed
    assert "Once upon a time" in printed
    assert re.search(r"\d\.\d  Once upon a time", printed)
    assert "Error" not in printed
