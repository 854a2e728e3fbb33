"""Report what llama_jax finds on this machine: llama-jax doctor

Versions, devices, folders of the cache and their sizes, which extras are installed, and a line of
advice. It needs no network, and reports what cannot be found out. The exit code is 1 if something
has to be mended first.
"""

import importlib.metadata
import os
import platform
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from llama_jax.cli.main import Parser, one_line
from llama_jax.cli.startup import has_tpu
from llama_jax.errors import GIB, UserError, first_line, format_line
from llama_jax.files import CACHE_VARIABLE, cache_folder

NAME = "llama_jax"
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")
PATIENCE = 60.0  # seconds that devices may take to answer


def main(argv: list[str]) -> int:
    """Print the report and return the exit code."""
    Parser(description=__doc__).parse_args(argv)
    sections = {
        "llama_jax": package,
        "python": python,
        "packages": packages,
        "devices": devices,
        "cache": cache,
        "extras": extras,
    }
    broken = [label for label, section in sections.items() if not _report(label, section)]
    advice = f"mend the line {broken[0]!r} first" if broken else _suggestion()
    print(f"{'advice':10} {advice}")
    return 1 if broken else 0


def _report(label: str, section: Callable[[], str]) -> bool:
    """Print a section; return whether nothing has to be mended."""
    is_fine = True
    try:
        text = section()
    except Exception as error:  # whatever is broken here is what the user wants to know
        is_fine, text = False, one_line(error) or f"{type(error).__name__}: {first_line(error)}"
    print(f"{label:10} {format_line(text)}", flush=True)
    return is_fine


def package() -> str:
    """Return the version and the place of this package.

    Raises:
      UserError: if it is not installed, so that nothing is known about what it requires.
    """
    folder = Path(__file__).resolve().parents[1]
    if version := _version(NAME):
        return f"{version} in {folder}"
    raise UserError(f"{folder} is not installed; run pip install -e {folder.parent}")


def python() -> str:
    """Return the interpreter, the system and its size."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    size = f"{os.cpu_count()} CPU cores, {memory:,.0f} GiB of memory"
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {size}"


def packages() -> str:
    """Return the versions of the main packages.

    Raises:
      UserError: if a package is missing, or has a version that is not supported.
    """
    for requirement in _requirements(NAME):
        if not _is_met(requirement):
            there = _version(requirement.name) or "missing"
            raise UserError(
                f"{requirement.name} is {there}; expected {requirement.specifier}: run"
                ' pip install --upgrade "llama_jax"'
            )
    found = {name: _version(name) for name in SHOWN}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def devices() -> str:
    """Return the devices that JAX finds, which may take long to answer.

    Raises:
      UserError: if JAX does not start in time.
    """
    answer: list[Any] = []
    thread = threading.Thread(target=_ask_for_devices, args=(answer,), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not answer:
        raise UserError(
            f"JAX has not started in {PATIENCE:.0f} s; another process may hold the devices: end"
            " it, or run with JAX_PLATFORMS=cpu"
        )
    if isinstance(answer[0], Exception):
        raise answer[0]
    return str(answer[0])


def _ask_for_devices(answer: list[Any]) -> None:
    """Append a line on the devices, or the error."""
    try:
        import jax

        from llama_jax.hardware.accelerators import memory_limit

        found = jax.devices()
        limit = 0 if found[0].platform == "cpu" else memory_limit(found)
        size = f", {limit / GIB:,.1f} GiB each" if limit else ""
        answer.append(f"{len(found)} × {found[0].device_kind}{size}")
    except Exception as error:
        answer.append(error)


def cache() -> str:
    """Return the cache folder, and the sizes of the folders in it.

    Raises:
      UserError: if it cannot be written.
    """
    folder = cache_folder()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder} cannot be written; set {CACHE_VARIABLE} to another folder")
    if not folder.exists():
        return f"{folder}, still empty"
    sizes = [
        f"{each.name} {_size(each) / 1e6:,.0f} MB"
        for each in sorted(folder.iterdir())
        if each.is_dir()
    ]
    return f"{folder}: {', '.join(sizes) or 'empty'}"


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; files may go away meanwhile."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def extras() -> str:
    """Return which extras are installed, and which are not."""
    names = importlib.metadata.metadata(NAME).get_all("Provides-Extra") or []
    is_there = {
        name: all(map(_is_met, needed))
        for name in names
        if (needed := list(_requirements(NAME, name)))
    }
    present, absent = (
        [n for n, here in is_there.items() if here is kind] for kind in (True, False)
    )
    return f"{', '.join(present) or 'none'}; not installed: {', '.join(absent) or 'none'}"


def _requirements(name: str, extra: str = "") -> Iterable[Requirement]:
    """Yield what an installed package requires, or what one of its extras adds to that."""
    for text in importlib.metadata.requires(name) or []:
        marker = (requirement := Requirement(text)).marker
        always = marker is None or marker.evaluate({"extra": ""})
        added = marker is not None and not always and marker.evaluate({"extra": extra})
        if added if extra else always:
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    """Return whether a package is installed in the version and the required extras."""
    version = _version(requirement.name)
    if not version or not requirement.specifier.contains(version, prereleases=True):
        return False
    return all(
        _is_met(each)
        for extra in requirement.extras
        for each in _requirements(requirement.name, extra)
    )


def _version(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _suggestion() -> str:
    """Return what to do where nothing has to be mended."""
    import jax

    if jax.default_backend() == "cpu" and "JAX_PLATFORMS" not in os.environ:
        for extra, is_here in (("cuda", Path("/dev/nvidia0").exists()), ("tpu", has_tpu())):
            if is_here:
                device = {"cuda": "an NVIDIA GPU", "tpu": "a TPU"}[extra]
                command = f'pip install "llama_jax[{extra}]"'
                return f"this machine has {device}, which JAX does not use: {command}"
    return "all is in place; begin with llama-jax train, or llama-jax chat smollm2"
