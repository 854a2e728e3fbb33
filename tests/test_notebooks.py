"""The notebooks: stored without outputs, and run from top to bottom as a user would."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHARED = ("# Clones the repository", "# Versions, and the devices")
SHORT = "--config.optimizer.steps=8 --config.optimizer.warmup_steps=2 --config.run.eval_batches=1"

pytestmark = pytest.mark.filterwarnings("ignore")  # those of nbclient and its kernel


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
def test_scripts_configs_and_extras_exist(path):
    text = "\n".join(cells(path))
    for script in re.findall(r"python (\w+\.py)|\"(\w+\.py)\"", text):
        assert (ROOT / "".join(script)).is_file() or f"%%writefile {''.join(script)}" in text
    configs = re.findall(r"configs/(\w+)\.py", text)
    for choices in re.findall(r"CONFIG = .*@param (\[.*\])", text):
        configs += json.loads(choices)
    for name in configs:
        assert (ROOT / "configs" / f"{name}.py").is_file()
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for hardware in json.loads(re.search(r"HARDWARE = .*@param (\[.*\])", text)[1]):
        assert hardware == "auto" or f"\n{hardware} = [" in extras


def test_cells_that_the_notebooks_share_are_equal():
    for head in SHARED:
        assert len({next(c for c in cells(path) if c.startswith(head)) for path in NOTEBOOKS}) == 1


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone, with the files that the notebooks use."""
    folder = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for part in ("llama_jax", "configs", "examples", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(clone, name, **fields):
    """Return the text that the code cells printed, and the MIME types of their other outputs.

    Form fields are filled in with `fields`, and cells that install are left out.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / "notebooks" / name, as_version=4)
    notebook.cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", ())]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for field, value in fields.items():
        line = re.compile(rf"(?m)^{field} = .*(?=  # @param)")
        (cell,) = (cell for cell in code if line.search(cell.source))
        cell.source = line.sub(f"{field} = {value!r}", cell.source)
    # One process holds a TPU, so that the notebook's own must never load JAX.
    code[-1].source += "\nimport sys\nassert 'jax' not in sys.modules"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLAMA_JAX_CACHE": str(clone / "cache"),
        "PYTHONPATH": "",
        "XLA_FLAGS": "",
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,
        startup_timeout=300,
        resources={"metadata": {"path": str(clone / "notebooks")}},
    )
    client.execute(env=environment)
    outputs = [cell.outputs for cell in code]
    texts = ["".join(o.text for o in cell if o.output_type == "stream") for cell in outputs]
    kinds = {kind for cell in outputs for o in cell for kind in o.get("data", ())}
    return "\n".join(texts), kinds


@pytest.fixture(scope="module")
def trained(clone):
    """What the notebook of training prints and shows; its run is what the others start from."""
    return run(clone, "train_tpu.ipynb", FLAGS=SHORT)


@pytest.mark.slow
def test_train_and_run_all_again(clone, trained):
    printed, shown = trained
    assert "fits: " in printed
    assert "sample with: python sample.py --ckpt ckpt/notebook" in printed
    assert "image/png" in shown
    assert printed.count("Once upon a time") >= 3
    assert (clone / "ckpt" / "notebook.gguf").is_file()
    assert "error" not in printed

    printed, _ = run(clone, "train_tpu.ipynb", FLAGS=SHORT)  # nothing is lost or repeated
    assert "all 8 steps were made already" in printed
    assert "error" not in printed


@pytest.mark.slow
def test_sample(clone, trained):
    printed, _ = run(clone, "sample_tpu.ipynb", WEIGHTS="ckpt/notebook")
    assert "fits: " in printed
    assert "Once upon a time" in printed
    assert re.search(r"\d\.\d  Once upon a time", printed)
    assert "error" not in printed.lower()


@pytest.mark.slow
def test_finetune(clone, trained):
    flags = f"{SHORT} --config.optimizer.steps=2 --config.data.batch_size=2"
    printed, _ = run(clone, "finetune_tpu.ipynb", BASE="ckpt/notebook", CHAT="alpaca", FLAGS=flags)
    assert "nf4" in printed
    assert "finished 2 steps" in printed
    assert (clone / "ckpt" / "finetuned-peft" / "adapter_config.json").is_file()
    assert (clone / "ckpt" / "finetuned.gguf").is_file()
    assert "error" not in printed


@pytest.mark.slow
def test_chat(clone, trained):
    pytest.importorskip("starlette")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fields = {"MODEL": "ckpt/notebook", "FLAGS": "--template alpaca", "PORT": port}
    printed, _ = run(clone, "chat.ipynb", **fields, MAX_TOKENS=20, STOP=True)
    assert f"http://127.0.0.1:{port}" in printed
    assert printed.split(f"http://127.0.0.1:{port}")[-1].strip()  # the answer
    with socket.socket() as closed:
        assert closed.connect_ex(("127.0.0.1", port)) != 0
