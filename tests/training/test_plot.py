"""Pictures of losses: of one run, and of several for comparison."""

import json
import math

import pytest

from llama_jax.errors import UsageError, UserError
from llama_jax.training.plot import compare, draw


def make_run(folder, final, validates=True):
    """Write the metrics of a run of 60 steps."""
    folder.mkdir(parents=True)
    records = [
        {"step": step, "loss": final + 5 / step, "learning_rate": 1e-3} for step in range(1, 61)
    ]
    records.append({"step": 30, "loss": math.nan})
    if validates:
        records += [
            {"step": 20, "validation_loss": final - 0.125},
            {"step": 40, "validation_loss": final + 0.5},
        ]
    lines = [json.dumps(record).replace("NaN", '"nan"') for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_picture_replaces_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    folder = make_run(tmp_path / "run", 2.0)
    (folder / "loss.png").write_text("old")
    assert draw(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_several_runs_are_named_with_their_best_loss(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    runs = [make_run(tmp_path / "first", 1.5), make_run(tmp_path / "b" / "same", 2.0)]
    runs.append(make_run(tmp_path / "c" / "same", 3.0, validates=False))
    text = compare(runs, tmp_path / "all.svg").read_text()
    assert "first: best 1.375 at step 20" in text
    assert f"{runs[1]}: best 1.875 at step 20" in text
    assert f"{runs[2]}: 3.083 at the end" in text


def test_what_cannot_be_compared_is_a_line(tmp_path):
    run, other = make_run(tmp_path / "run", 2.0), make_run(tmp_path / "other", 2.0)
    with pytest.raises(UsageError, match=r"all.jpg is no picture; expected a name that ends with"):
        compare([run, other], tmp_path / "all.jpg")
    with pytest.raises(UsageError, match="is given twice; expected different runs"):
        compare([run, run], tmp_path / "all.png")
    with pytest.raises(UserError, match=r"cannot write to .*: No such file or directory"):
        compare([run, other], tmp_path / "absent" / "all.png")
    (other / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no steps yet"):
        compare([run, other], tmp_path / "all.png")
