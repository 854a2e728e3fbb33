"""Errors as one line, exit codes, and suggestions for misspelt flags."""

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llama_jax.cli import main as cli
from llama_jax.cli.main import Parser
from llama_jax.cli.startup import GPU_FLAGS, skip_absent_tpu, use_gpu_flags
from llama_jax.errors import UsageError


def run_command(body, *words, **options):
    """Run a command whose `main` has this body, in a new process."""
    script = "import sys\nfrom llama_jax.cli.main import run, Parser\n"
    script += "from llama_jax.errors import *\n"
    script += f"def main(argv):\n{textwrap.indent(body, '    ')}\nrun(main)"
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([sys.executable, "-c", script, *words], **options)


@pytest.fixture(autouse=True)
def python_path(monkeypatch):
    """New processes find the package."""
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
def test_a_command_ends_with_an_exit_code_and_at_most_one_line(body, code, line):
    done = run_command(body)
    assert (done.returncode, done.stderr) == (code, line)


def test_debug_prints_the_traceback_and_is_not_passed_on():
    done = run_command("print(argv)\nraise UserError('bad')", "a", "--debug", "b")
    assert done.stdout == "['a', 'b']\n"
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError: bad" in done.stderr


def test_a_bug_is_one_line_with_how_to_report_it():
    done = run_command("return {}['x']")
    assert done.returncode == 1
    assert re.fullmatch(r"error: KeyError in .*: 'x'; this is a bug .* --debug .*\n", done.stderr)
    done = run_command("return {}['x']", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("lines", [1, 9999])  # noticed when flushing, and while printing
def test_a_closed_pipe_is_no_error(lines):
    script = "import sys\nfrom llama_jax.cli.main import run\nsys.stdin.read()\n"
    script += f"run(lambda argv: [print('x' * 80) for _ in range({lines})] and 0)"
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_out_of_memory_is_one_line_with_advice():
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
def test_the_parser_names_the_closest_flag(words, says):
    parser = Parser()
    parser.add_argument("--temperature", type=float, default=1.0)
    with pytest.raises(UsageError) as error:
        parser.parse_args(words)
    assert says in str(error.value)


def test_flags_of_the_config_are_left_and_misspelt_others_reported():
    parser = Parser()
    parser.add_argument("--profile")
    parser.add_argument("--help_config_section")
    words = ["--config=a.py", "--config.run.profile=1", "--noconfig.run.profile", "--steps=3", "x"]
    assert parser.parse_known_args(words)[1] == words
    with pytest.raises(UsageError, match="'--profil=1:2' is not understood; did you mean '--prof"):
        parser.parse_known_args([*words, "--profil=1:2"])


def test_help_shows_defaults_that_say_something():
    parser = Parser()
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--name", default="", help="any")
    parser.add_argument("--fast", action="store_true", help="estimate")
    parser.add_argument("--config", default="/long/path/demo.py", help="a file (demo.py)")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    for line in (
        "--seed SEED of the run (default: 0)",
        "--name NAME any",
        "--fast estimate",
        "--config CONFIG a file (demo.py)",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("installed", "device", "platforms"),
    [
        ({"libtpu"}, None, "cpu"),
        ({"libtpu"}, "accel0", None),
        ({"libtpu"}, "vfio/0", None),
        ({"libtpu", "jax_plugins"}, None, None),
        (set(), None, None),
    ],
)
def test_jax_does_not_start_libtpu_where_there_is_no_tpu(
    installed, device, platforms, tmp_path, monkeypatch
):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    skip_absent_tpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.parametrize("value", ["-1:2", "-.5", "-1"])
def test_a_value_may_begin_with_a_minus(value):
    parser = Parser()
    parser.add_argument("--profile")
    assert parser.parse_args(["--profile", value]).profile == value


STRANGE = "print('\\u00e9\\x1b[2J')\nraise UserError('no \\u00e9 in a\\x1b[2Jb')"


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]
)
def test_any_text_can_be_printed_in_any_encoding(variables):
    done = run_command(STRANGE, env=os.environ | variables, encoding="utf-8")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout in ("\\xe9\x1b[2J\n", "é\x1b[2J\n")  # raw into a pipe
    assert done.stderr in (
        r"error: no \xe9 in a\x1b[2Jb" + "\n",
        r"error: no é in a\x1b[2Jb" + "\n",
    )


def test_control_characters_are_escaped_on_a_terminal():
    ours, theirs = pty.openpty()
    run_command(STRANGE, capture_output=False, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert shown.splitlines() == [r"é\x1b[2J", r"error: no é in a\x1b[2Jb"]


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_output_is_no_error(closed, tmp_path):
    file = tmp_path / "written"
    script = (
        f"from llama_jax.cli.main import run\ndef main(argv):\n    f = open({str(file)!r}, 'w')"
    )
    script += "\n    print('x')\n    f.write('y')\nrun(main)"
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, file.read_text()) == (0, "", "y")


def test_a_full_disk_under_the_output_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = run_command("print('x')", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_very_long_message_is_shortened_in_its_middle():
    done = run_command("raise UserError('a=' + 'x' * 5000 + ' is bad; expected 1')")
    assert done.stderr.startswith("error: a=xxx") and done.stderr.endswith("x is bad; expected 1\n")
    assert len(done.stderr) < 1100


def test_an_import_that_ctrl_c_breaks_is_an_interrupt():
    body = "try:\n    raise KeyboardInterrupt\nexcept BaseException:\n    raise ImportError('x')"
    done = run_command(body)
    assert (done.returncode, done.stderr) == (130, "")


LEFT = {
    "a thread that waits": "threading.Thread(target=time.sleep, args=(60,)).start()",
    "threads at work in C++": """
from llama_jax.text.sentencepiece import train_tokenizer
tokenizer = train_tokenizer(['once upon a time'] * 9, 280, sys.argv[1])
def encode():
    while True:
        tokenizer.encode_array('time upon ' * 1000)
for _ in range(4):
    threading.Thread(target=encode, daemon=True).start()
time.sleep(0.1)
""",
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize(("error", "code"), [("KeyboardInterrupt", 130), ("UserError('x')", 1)])
def test_after_an_error_no_thread_of_a_library_is_waited_for(tmp_path, left, error, code):
    """One that works on in C++ would abort the end of Python."""
    script = f"""
import atexit, sys, threading, time
from llama_jax.cli import doctor
from llama_jax.cli.main import run_command
from llama_jax.errors import UserError

atexit.register(print, "at exit")
def main(argv):
{textwrap.indent(LEFT[left], "    ")}
    raise {error}
doctor.main = main
run_command("doctor")
"""
    words = [sys.executable, "-c", script, str(tmp_path / "tokenizer.model")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (code, "at exit\n")
    assert done.stderr == ("error: x\n" if code == 1 else "")


def test_ctrl_c_while_the_module_of_a_command_is_imported_ends_the_process():
    script = "import importlib, os, signal\nfrom llama_jax.cli.main import run_command\n"
    script += "importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)\n"
    words = [sys.executable, "-c", f"{script}run_command('train')"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


INTERRUPTED = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.modules.pop(sys.argv[1], None)
sys.meta_path.insert(0, Finder())
from llama_jax.cli.main import run_command
"""


@pytest.mark.parametrize("module", ["threading", "typing", "argparse", "llama_jax.files"])
def test_ctrl_c_while_a_command_is_imported_is_no_traceback(module):
    words = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("purpose", "is_distributed", "least"),
    [("decoding", False, 1), ("training", False, 2), ("training", True, 1)],
)
def test_flags_for_gpus_are_set_where_there_are_some_and_said(
    purpose, is_distributed, least, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    flag = GPU_FLAGS[purpose]
    for count in range(3):
        monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
        use_gpu_flags(purpose, is_distributed, tmp_path)
        is_set = count >= least
        assert os.environ["XLA_FLAGS"] == "--xla_other=1" + f" {flag}" * is_set
        assert (flag in capsys.readouterr().err) == is_set
        (tmp_path / f"0000:{count}").mkdir()
    monkeypatch.setenv("XLA_FLAGS", own := flag.partition("=")[0] + "=false")
    use_gpu_flags(purpose, is_distributed, tmp_path)
    assert (os.environ["XLA_FLAGS"], capsys.readouterr().err) == (own, "")


@pytest.mark.parametrize(("platforms", "is_set"), [("cpu", False), ("cuda,cpu", True)])
def test_flags_for_gpus_are_not_set_where_jax_is_to_use_none(
    platforms, is_set, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", "")
    (tmp_path / "0000:1").mkdir()
    use_gpu_flags("decoding", gpus=tmp_path)
    assert (os.environ["XLA_FLAGS"] != "") == is_set


def test_xla_knows_the_flags_for_gpus():
    done = run_command(
        "import jax\njax.devices()", env=os.environ | {"XLA_FLAGS": " ".join(GPU_FLAGS.values())}
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nothing", marks=pytest.mark.slow)])
def test_an_absent_platform_is_one_line_with_what_there_is(platform):
    done = run_command("import jax\njax.devices()", env=os.environ | {"JAX_PLATFORMS": platform})
    line = f"error: JAX_PLATFORMS={platform} names a device that cannot be used here; expected cpu:"
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith(line)


@pytest.mark.parametrize("home", [pytest.param("/proc/none", marks=pytest.mark.slow), None])
def test_without_a_home_directory_there_is_no_cache_but_a_line(home):
    body = "from llama_jax.cli.startup import use_compilation_cache\nimport jax, pwd\n"
    body += "def getpwuid(uid): raise KeyError\npwd.getpwuid = getpwuid  # a container's user\n"
    body += "use_compilation_cache()\nprint(jax.config.jax_compilation_cache_dir)"
    absent = ("HOME", "LLAMA_JAX_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in absent}
    done = run_command(body, env=environment | ({"HOME": home} if home else {}))
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert re.fullmatch("warning: compiled programs are not kept: .*\n", done.stderr)
