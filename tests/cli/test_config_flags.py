"""A config file and the flags that override it; every mistake in one line."""

# ruff: noqa: E501 (a table of mistakes reads best with one to a line)

import pytest

from llama_jax.cli.config_flags import config_from_flags, read_config
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
    return config_from_flags(words, default="configs/tiny.py")


def refusal(*words):
    """The one line that these words are refused with."""
    with pytest.raises(UsageError) as error:
        flags(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_flags_the_default_file_is_read():
    assert flags().model.dim == 24


def test_the_order_of_words_does_not_matter(place):
    (place / "other.py").write_text(FILE.replace("24", "48"))
    before = flags("--config.model.dropout=0.5", "--config", "other.py")
    after = flags("--config=other.py", "--config.model.dropout", "0.5")
    assert before == after
    assert (after.model.dim, after.model.dropout) == (48, 0.5)


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
        (["--config.model.tied=False"], "model", "tied", False),
        (["--noconfig.model.tied"], "model", "tied", False),
        (["--config.model.dim=1", "--config.model.dim=2"], "model", "dim", 2),
    ],
)
def test_an_override_reaches_its_key(words, section, key, value):
    got = flags(*words)[section][key]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.dim=3"], "'model.dim=3' is not understood; did you mean --config.model.dim=3"),
        (["stray"], "'stray' is not understood; see --help"),
        (["--steps"], "'--steps' is not understood; see --help"),
        (["--config", "configs/tny.py"], "'configs/tny.py' does not exist; did you mean 'configs/tiny.py'?"),
        (["--config=zzz"], "config file 'zzz' does not exist; there are configs/tiny.py"),
        (["--config"], "--config names no file; for example --config configs/demo.py"),
        (["steps=3"], "'steps=3' is not understood; did you mean --config.SECTION.steps=3"),
        (["dim=3"], "'dim=3' is not understood; did you mean --config.model.dim=3"),
        (["--dim=3"], "'--dim=3' is not understood; did you mean --config.model.dim=3"),
        (["--dim", "3"], "'--dim' is not understood; did you mean --config.model.dim"),
        (["seed=3"], "did you mean --config.data.seed=3 or --config.run.seed=3"),
        (["dim"], "'dim' is not understood; see --help"),
        (["--config.model.dm=3"], "configs/tiny.py has no key 'model.dm'; did you mean 'model.dim'?"),
        (["--config.dim=3"], "has no key 'dim'; did you mean 'model.dim'?"),
        (["--config.xyzzy=3"], "has no key 'xyzzy'; see configs/demo.py"),
        (["--config.model=3"], "has no key 'model'"),
        (["--config.model.dim=3.5"], "config.model.dim='3.5' has the wrong type; expected an integer"),
        (["--config.model.dim"], "--config.model.dim has no value; expected one, as in"),
            (["--noconfig.model.tied=true"], "'--noconfig.model.tied=true' is not understood"),
            (["--configs=3"], "'--configs=3' is not understood; see --help"),
        (["--config.model.dropout=much"], "='much' has the wrong type; expected a number"),
        (["--config.model.tied=perhaps"], "='perhaps' has the wrong type; expected True or False"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line(words, says):
    assert says in refusal(*words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config():\n    return (", "broken.py:2: '(' was never closed"),
        ("x = 1", "broken.py defines no get_config(); see configs/demo.py"),
        ("import no_such_module", "broken.py fails: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 1 / 0", "broken.py fails: ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_named_in_one_line(place, text, says):
    (place / "broken.py").write_text(text)
    assert says in refusal("--config=broken.py")


EMPTY = "from ml_collections import ConfigDict\nget_config = ConfigDict"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EMPTY, "key 'model' is missing in wrong.py; expected a section with keys"),
        (FILE, "unknown key 'model.name' in wrong.py; did you mean 'norm_eps'?"),
    ],
)
def test_a_key_that_is_missing_or_too_many_is_named_with_its_file(place, text, says):
    (place / "wrong.py").write_text(text)
    with pytest.raises(UsageError) as error:
        read_config(["--config=wrong.py"], default="configs/tiny.py")
    assert str(error.value).startswith(says)
