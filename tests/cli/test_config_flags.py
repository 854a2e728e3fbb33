"""Config files and the flags that override them."""

# ruff: noqa: E501 (a table of mistakes reads best with one to a line)

import pytest

from llama_jax.cli.config_flags import load_config, read_config, shipped_configs
from llama_jax.errors import UsageError

FILE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({
        "model": {"dim": 24, "dropout": 0.0, "tied": True, "name": "tiny"},
        "data": {"seed": 0},
        "run": {"debug": False, "seed": 0},
    })
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with one good config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(FILE)
    return tmp_path


def flags(*words):
    return load_config("configs/tiny.py", words)


def message(*words, path="configs/tiny.py"):
    """The one-line error for these words."""
    with pytest.raises(UsageError) as error:
        load_config(path, words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_flags_the_config_is_that_of_the_file():
    assert flags().to_dict()["model"] == {"dim": 24, "dropout": 0.0, "tied": True, "name": "tiny"}


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["--config.model.dim=36"], "model", "dim", 36),
        (["--config.model.dim", "36"], "model", "dim", 36),
        (["--config.run.seed", "-1"], "run", "seed", -1),
        (["--config.model.dropout=1"], "model", "dropout", 1.0),
        (["--config.model.name=a=b c"], "model", "name", "a=b c"),
        (["--config.model.name="], "model", "name", ""),
        (["--config.run.debug"], "run", "debug", True),
        (["--config.run.debug", "--config.run.seed=1"], "run", "debug", True),
        (["--config.run.debug=true"], "run", "debug", True),
        (["--config.run.debug", "true"], "run", "debug", True),
        (["--config.model.tied=False"], "model", "tied", False),
        (["--noconfig.model.tied"], "model", "tied", False),
        (["--config.model.dim=1", "--config.model.dim=2"], "model", "dim", 2),
    ],
)
def test_a_flag_sets_its_key(words, section, key, value):
    got = flags(*words)[section][key]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.dim=3"], "'model.dim=3' is not understood; did you mean --config.model.dim=3"),
        (["stray"], "'stray' is not understood; see --help"),
        (["configs/tiny.py"], "'configs/tiny.py' is not understood; did you mean --config configs/tiny.py?"),
        (["--steps"], "'--steps' is not understood; see --help"),
        (["steps=3"], "'steps=3' is not understood; did you mean --config.SECTION.steps=3"),
        (["dim=3"], "'dim=3' is not understood; did you mean --config.model.dim=3"),
        (["--dim=3"], "'--dim=3' is not understood; did you mean --config.model.dim=3"),
        (["--dim", "3"], "'--dim' is not understood; did you mean --config.model.dim"),
        (["seed=3"], "did you mean --config.data.seed=3 or --config.run.seed=3"),
        (["dim"], "'dim' is not understood; see --help"),
        (["--config.model.dm=3"], "configs/tiny.py has no key 'model.dm'; did you mean 'model.dim'?"),
        (["--config.dim=3"], "has no key 'dim'; did you mean 'model.dim'?"),
        (["--config.model.lr=3"], "has no key 'model.lr'; see docs/config.md"),
        (["--config.xyzzy=3"], "has no key 'xyzzy'; see docs/config.md"),
        (["--config.model=3"], "has no key 'model'"),
        (["--config.model.dim=3.5"], "config.model.dim='3.5' has the wrong type; expected an integer"),
        (["--config.model.dim"], "--config.model.dim has no value; expected one, as in"),
        (["--noconfig.model.tied=true"], "'--noconfig.model.tied=true' is not understood"),
        (["--noconfig.model.dim", "3"], "'--noconfig.model.dim' is not understood"),
        (["--configs=3"], "'--configs=3' is not understood; see --help"),
        (["--config.model.dropout=much"], "='much' has the wrong type; expected a number"),
        (["--config.model.tied=perhaps"], "='perhaps' has the wrong type; expected True or False"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_a_one_line_error(words, says):
    assert says in message(*words)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("configs/tny.py", "; did you mean 'configs/tiny.py'?"),
        ("tiny", "; did you mean 'configs/tiny.py'?"),
        ("configs/110m.py", "; did you mean '110m'?"),
        ("zzz", "--config=zzz is not a file; expected one, or a name: 110m, 110m_tpu, 13b,"),
    ],
)
def test_a_missing_file_is_a_one_line_error(path, says):
    assert says in message(path=path)


def test_shipped_configs_are_found_by_name_in_any_folder(place):
    assert read_config("110m") == read_config(str(shipped_configs()["110m"]))
    (place / "110m").write_text(FILE)  # a name is never taken for a file that happens to be there
    assert load_config("110m").model.dim == 768
    assert "did you mean --config 110m?" in message("110m")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config():\n    return (", "broken.py:2: '(' was never closed"),
        ("x = 1", "broken.py defines no get_config(); see configs/demo.py"),
        ("import sys\nsys.exit(0)", "broken.py calls sys.exit(0); expected a get_config()"),
        ("import no_such_module", "broken.py fails: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 1 / 0", "broken.py fails: ZeroDivisionError"),
        (
            "def get_config():\n    return 7",
            "broken.py: get_config() returns 7; expected a ConfigDict",
        ),
    ],
)
def test_a_broken_file_is_a_one_line_error(place, text, says):
    (place / "broken.py").write_text(text)
    assert says in message(path="broken.py")


EMPTY = "from ml_collections import ConfigDict\nget_config = ConfigDict"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EMPTY, "key 'model' is missing in wrong.py; expected a section with keys"),
        (FILE, "unknown key 'model.name' in wrong.py"),
    ],
)
def test_a_missing_or_unknown_key_is_reported_with_its_file(place, text, says):
    (place / "wrong.py").write_text(text)
    with pytest.raises(UsageError) as error:
        read_config("wrong.py")
    assert str(error.value).startswith(says)


def test_a_file_with_a_bom_is_read_and_utf16_is_named(place):
    (place / "bom.py").write_text(FILE, encoding="utf-8-sig")
    assert load_config("bom.py") == load_config("configs/tiny.py")
    (place / "wide.py").write_text(FILE, encoding="utf-16")
    assert message(path="wide.py") == "wide.py is UTF-16; convert it to UTF-8"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "--config.optimizer.lr=1",
            "has no key 'optimizer.lr'; did you mean 'optimizer.learning_rate'?",
        ),
        ("--config.wandb=1", "has no key 'wandb'; see docs/config.md"),
        ("--lr=1", "did you mean --config.optimizer.learning_rate=1?"),
        ("epochs=3", "did you mean --config.optimizer.epochs=3?"),
    ],
)
def test_names_of_other_projects_are_known(place, word, says):
    settings = '"optimizer": {"learning_rate": 0.1, "steps": 9, "epochs": 0.0, "eps": 1e-8}, "run"'
    (place / "other.py").write_text(FILE.replace('"run"', settings))
    assert says in message(word, path="other.py")


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        (["--config.optimizer.steps=40"], 4),
        (["--config.optimizer.steps", "5"], 0),
        (["--config.optimizer.steps=60"], 50),
        (["--config.optimizer.steps=40", "--config.optimizer.warmup_steps=30"], 30),
    ],
)
def test_fewer_steps_than_the_warmup_of_the_file_shorten_it_with_a_notice(capsys, words, warmup):
    assert read_config("demo", words).optimizer.warmup_steps == warmup
    assert ("notice: the run has" in capsys.readouterr().err) == (warmup < 30)


def test_warmup_longer_than_the_run_is_an_error_if_it_was_set():
    with pytest.raises(UsageError, match="warmup_steps=60 is longer than the run"):
        read_config("demo", ["--config.optimizer.steps=40", "--config.optimizer.warmup_steps=60"])
