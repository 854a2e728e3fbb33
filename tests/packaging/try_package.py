"""Build sdist and wheel, install them as a user does, and run commands from another folder.

    python tests/packaging/try_package.py [--work FOLDER] [PYTHON ...]

By default with each of Python 3.11, 3.12 and 3.13 that is found. Each gets an empty environment
with the wheel, in which commands run as `llama-jax`; and pip resolves every extra, but installs
none. `make test-package` runs it; it needs the package index, and takes minutes.
"""

import argparse
import email
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "build", "ckpt*")
TINY = ("--config.optimizer.steps=2", "--config.data.batch_size=2", "--config.run.sample_tokens=4")
COMMANDS = (  # arguments of llama-jax, exit code, what stdout or stderr contains
    (("--help",), 0, "doctor"),
    (("train", "--config", "demo", "--help"), 0, "usage: llama-jax train"),
    (("train", "--config", "dmo"), 2, "; did you mean 'demo'?"),
    (("doctor",), 0, "all is in place"),
    (("plan", "--config", "7b", "--target", "v5e-8", "--fast"), 0, "parameters"),
    (("train", "--config", "demo", *TINY), 0, "sample with: llama-jax sample --ckpt ckpt"),
    (("sample", "--ckpt", "ckpt", "--prompt", "Once", "--max_tokens", "4"), 0, "Once"),
    (("plot",), 0, "ckpt/loss.png"),
    (("serve", "--model", "ckpt"), 1, "pip install 'llama_jax[serve]'"),
    (("train", "--config.run.wandb"), 2, 'pip install "llama_jax[wandb]"'),
)


def run(*words: object, **options: object) -> None:
    """Run a process; its failure ends this one."""
    subprocess.run([str(word) for word in words], check=True, **options)  # type: ignore[call-overload]


def interpreters() -> list[str]:
    """Return the Pythons that are found, on the path or among pyenv's, one a version."""
    found = []
    for version in VERSIONS:
        places = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
        names = [f"python{version}", *map(str, places)]
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        for name in filter(shutil.which, names):
            done = subprocess.run([name, "-c", code], capture_output=True, text=True)
            if done.stdout.strip() == version:
                found.append(name)
                break
    return found


def environment(python: str, folder: Path) -> Path:
    """Return the Python of a new, empty environment."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def build(python: str, work: Path) -> Path:
    """Return the wheel, which is built of the sdist that is built of the tree."""
    shutil.copytree(ROOT, work / "tree", ignore=NOT_SOURCE)
    builder = environment(python, work / "builder")
    run(builder, *PIP, "install", "build")
    with (work / "build.log").open("w") as log:
        run(builder, "-m", "build", "--outdir", work / "dist", work / "tree", stdout=log)
    (wheel,) = (work / "dist").glob("*.whl")
    (sdist,) = (work / "dist").glob("*.tar.gz")
    print(f"built {sdist.name} and {wheel.name}, {wheel.stat().st_size / 1e3:,.0f} kB", flush=True)
    return wheel


def check_files(wheel: Path) -> None:
    """Check that the wheel has all files of the package, the configs and the pages."""
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "llama_jax").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    for pattern in ("configs/*.py", "docs/*.md"):
        expected |= {f"llama_jax/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == expected, f"differ in {sorted(inside ^ expected)}"


def extras(wheel: Path) -> list[str]:
    """Return the extras that the wheel's metadata names."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return email.message_from_bytes(archive.read(name)).get_all("Provides-Extra") or []


def try_commands(python: Path, place: Path) -> None:
    """Run commands in an empty folder, without a variable or cache of this machine's user."""
    place.mkdir()
    variables = {"HOME": str(place), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    for words, code, text in COMMANDS:
        command = [str(python.parent / "llama-jax"), *words]
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)
        output = done.stdout + done.stderr
        is_right = done.returncode == code and text in output and "Traceback" not in output
        print(f"  {'ok' if is_right else 'WRONG'}  llama-jax {' '.join(words)}", flush=True)
        assert is_right, f"exit code {done.returncode}, expected {code} and {text!r}:\n{output}"


def main() -> None:
    """Build once, then try each interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters to try")
    parser.add_argument("--work", help="folder to work in, kept afterwards")
    flags = parser.parse_args()
    pythons = flags.pythons or interpreters()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(flags.work or temporary).resolve()
        wheel = build(pythons[0] if pythons else sys.executable, work)
        check_files(wheel)
        for number, name in enumerate(pythons):
            print(name, flush=True)
            python = environment(name, work / f"environment-{number}")
            run(python, *PIP, "install", wheel)
            try_commands(python, work / f"elsewhere-{number}")
            for extra in extras(wheel):
                run(python, *PIP, "install", "--dry-run", f"{wheel}[{extra}]")
                print(f"  ok  pip install llama_jax[{extra}]", flush=True)


if __name__ == "__main__":
    main()
