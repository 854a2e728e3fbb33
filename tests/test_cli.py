"""Flags in, one-line errors and exit codes out."""

# ruff: noqa: E501 (a table of mistakes reads best with one to a line)

import subprocess
import sys
import textwrap

import pytest

from llama_jax import cli
from llama_jax.cli import Parser, config_from_flags
from llama_jax.errors import UsageError

FILE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({
        "model": {"dim": 24, "dropout": 0.0, "tied": True, "name": "tiny"},
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
        (["--config.model.dm=3"], "configs/tiny.py has no key 'model.dm'; did you mean 'model.dim'?"),
        (["--config.dim=3"], "has no key 'dim'; did you mean 'model.dim'?"),
        (["--config.xyzzy=3"], "has no key 'xyzzy'; see configs/demo.py"),
        (["--config.model=3"], "has no key 'model'"),
        (["--config.model.dim=3.5"], "config.model.dim='3.5' has the wrong type; expected a whole number"),
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


def door(body, *words, **options):
    """Run a door whose main has this body, in a process of its own."""
    script = "import sys\nfrom llama_jax.cli import run, Parser\n"
    script += "from llama_jax.errors import *\n"
    script += f"def main(argv):\n{textwrap.indent(body, '    ')}\nrun(main)"
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([sys.executable, "-c", script, *words], **options)


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    """Doors in processes of their own find the package."""
    package = sys.modules["llama_jax"].__path__[0]
    monkeypatch.setenv("PYTHONPATH", package.removesuffix("llama_jax"))


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("print('done')", 0, ""),
        ("return 5", 5, ""),
        ("raise UserError('bad\\n  file')", 1, "error: bad file\n"),
        ("raise UsageError('bad flag')", 2, "error: bad flag\n"),
        ("raise NonFiniteLossError('loss is nan')", 3, "error: loss is nan\n"),
        ("open('absent')", 1, "error: No such file or directory: absent\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("Parser().parse_args(argv)", 0, ""),
    ],
)
def test_a_door_ends_with_a_code_and_at_most_one_line(body, code, line):
    done = door(body)
    assert (done.returncode, done.stderr) == (code, line)


def test_debug_shows_the_traceback_and_is_no_word_of_the_doors():
    done = door("print(argv)\nraise UserError('bad')", "a", "--debug", "b")
    assert done.stdout == "['a', 'b']\n"
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError: bad" in done.stderr


def test_a_fault_of_ours_keeps_its_traceback():
    done = door("return {}['x']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("lines", [1, 9999])  # found out when flushing, and while printing
def test_a_reader_that_leaves_is_no_error(lines):
    script = "import sys\nfrom llama_jax.cli import run\nsys.stdin.read()\n"
    script += f"run(lambda argv: [print('x' * 80) for _ in range({lines})] and 0)"
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_full_device_is_explained():
    line = cli.one_line(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9663676416"))
    assert line.startswith("out of memory: 9.0 GiB more were needed; when sampling, try --quantize")
    assert cli.one_line(RuntimeError("else")) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temprature=1"], "'--temprature=1' is not understood; did you mean '--temperature'?"),
        (["--temp=1"], "'--temp=1' is not understood"),
        (["--zzz"], "'--zzz' is not understood; see --help"),
        (["--temperature=hot"], "invalid float value: 'hot'; see --help"),
    ],
)
def test_the_parser_names_the_nearest_flag(words, says):
    parser = Parser()
    parser.add_argument("--temperature", type=float, default=1.0)
    with pytest.raises(UsageError) as error:
        parser.parse_args(words)
    assert says in str(error.value)
