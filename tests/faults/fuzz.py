"""Damage files at random and read them: python tests/faults/fuzz.py --rounds 1000 [READER ...]

Readers run in another process with little memory. A damaged file must be refused in one line, or
give the content of an intact one; formats without checksums may give other numbers. Round N of a
seed damages the same bytes every time: --start N --rounds 1 repeats it.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
MEMORY = 2**30  # bytes of address space beyond what reading an intact file takes
SECONDS = 20  # that reading a damaged file may take
LONGEST = 1500  # characters of a message
OUTCOMES = ("refused", "same", "warned", "changed", "faults")


@dataclasses.dataclass
class Report:
    """What became of the damaged files of one reader."""

    reader: str
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)  # a line for each kind
    kinds: set[str] = dataclasses.field(default_factory=set)
    seconds: float = 0.0

    def collect(self, results: Path) -> bool:
        """Add the results that a process has left, if any; return whether it was finished."""
        found = json.loads(results.read_text()) if results.exists() else {}
        results.unlink(missing_ok=True)
        self.counts.update(found.get("counts", {}))
        self.seconds += found.get("seconds", 0)
        for kind, example in found.get("faults", []):
            if kind not in self.kinds:
                self.kinds.add(kind)
                self.faults.append(f"{kind} ({example})")
        return found.get("finished", False)

    def line(self) -> str:
        """Return the counts as a row of a table."""
        counts = "".join(f"{self.counts[outcome]:10,}" for outcome in OUTCOMES)
        return f"{self.reader:20}{self.counts.total():10,}{counts}{self.seconds:9.0f} s"


def run(rounds: dict[str, int], seed: int = 0, start: int = 0, keep: str = "") -> list[Report]:
    """Fuzz readers, one after the other, in another process; it is started again after a crash.

    Args:
      rounds: how many files to damage, by reader.
      keep: a folder for the damaged files that led to faults; empty: they are not kept.
    """
    reports = {name: Report(name) for name in rounds}
    next_round = dict.fromkeys(rounds, start)  # of the readers that are not finished
    with tempfile.TemporaryDirectory() as folder:
        while next_round:
            jobs = [f"{name}:{n}:{start + rounds[name] - n}" for name, n in next_round.items()]
            command = [sys.executable, __file__, *jobs, "--worker", folder]
            command += ["--seed", str(seed), "--keep", keep]
            process = subprocess.run(command, capture_output=True, text=True, errors="replace")
            for name in list(next_round):
                if reports[name].collect(Path(folder) / name / "results"):
                    del next_round[name]
            if not next_round:
                break
            name = next(iter(next_round))  # where it crashed
            marker = Path(folder) / name / "round"
            last = int(marker.read_text() or -1) if marker.exists() else -1
            report, end_of_output = reports[name], " ".join(process.stderr.split())[-600:]
            report.counts["faults"] += 1
            report.faults.append(f"round {last}: exit {process.returncode}: {end_of_output}")
            next_round[name] = last + 1
            if last < start:  # it did not come so far
                del next_round[name]
    return list(reports.values())


# ---- in the process of the readers ----


def work(name: str, place: Path, seed: int, start: int, rounds: int, keep: str) -> None:
    """Damage and read files; write counts and faults to a file `results`."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    from mutations import flip, mutate
    from readers import READERS

    reader, folder, started = READERS[name], place / "example", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    faults: list[tuple[str, str]] = []

    def write_results(finished: bool = False) -> None:
        found = {"counts": counts, "faults": faults, "finished": finished}
        found["seconds"] = time.monotonic() - started
        (place / "results").write_text(json.dumps(found))

    limit_memory(None)
    if not any(folder.iterdir()):
        with contextlib.redirect_stdout(io.StringIO()):
            reader.make(folder)
    intact = {reader.read(folder)}
    if reader.newest:
        shutil.move(folder / reader.newest, place / "newest")
        intact.add(reader.read(folder))
        shutil.move(place / "newest", folder / reader.newest)
    files = sorted(path for path in folder.glob(reader.files) if path.is_file())
    depth = min(len(path.parts) for path in files)
    listed = [path for path in files if len(path.parts) == depth]  # not deep in a checkpoint
    limit_memory(MEMORY)
    signal.signal(signal.SIGALRM, _too_slow)
    marker = os.open(place / "round", os.O_CREAT | os.O_RDWR)
    for number in range(start, start + rounds):
        os.pwrite(marker, str(number).encode(), 0)
        random = Random(f"{seed} {name} {number}")
        path = random.choice((files, listed)[number % 2])
        good = path.read_bytes()
        damage = random.choice((flip, mutate)) if reader.is_checked else mutate
        bad = reader.outer(damage(random, reader.inner(good)), good)
        _replace(path, bad)
        result, kind = outcome(reader, folder, intact)
        counts[result] += 1
        if result == "faults":
            faults.append((kind, f"round {number} of {path.relative_to(folder)}"))
            if keep:
                Path(keep).mkdir(parents=True, exist_ok=True)
                (Path(keep) / f"{name}-{seed}-{number}-{path.name}").write_bytes(bad)
            write_results()
        _replace(path, good)
    write_results(finished=True)


def outcome(reader, folder: Path, intact: set[object]) -> tuple[str, str]:
    """Return the outcome of reading a damaged folder, and what kind of fault it is."""
    from llama_jax.errors import UserError

    warnings = io.StringIO()
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with contextlib.redirect_stderr(warnings), contextlib.redirect_stdout(io.StringIO()):
            found = reader.read(folder)
    except UserError as error:
        line = str(error)
        if "\n" in line or len(line) > LONGEST:
            return "faults", f"message of {len(line)} characters: {line[:100]!r}"
        return "refused", ""
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "llama_jax" in frame.filename] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "faults", f"{type(error).__name__} in {where}: {str(error)[:150]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if found in intact:
        return "same", ""
    if not reader.is_checked:
        return "changed", ""
    return ("warned", "") if "warning: " in warnings.getvalue() else ("faults", "silent change")


def _replace(path: Path, content: bytes) -> None:
    """Write a file anew: the old one may still be mapped."""
    path.unlink()
    path.write_bytes(content)


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def limit_memory(more: int | None) -> None:
    """Let this process have so many bytes more than it has now; None: any number."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = resource.RLIM_INFINITY if more is None else pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> int:
    """Fuzz readers and print a table; the exit code is 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", help="default: all")
    parser.add_argument("--rounds", type=int, default=1000, help="damaged files of each reader")
    parser.add_argument("--start", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="folder for files that lead to faults")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        for name, start, rounds in (job.split(":") for job in flags.readers):
            work(name, flags.worker / name, flags.seed, int(start), int(rounds), flags.keep)
        return 0
    source = (HERE / "readers.py").read_text()
    names = flags.readers or re.findall(r'^    "(\S+)": Reader\(', source, re.MULTILINE)
    print(f"{'reader':20}{'damaged':>10}" + "".join(f"{name:>10}" for name in OUTCOMES))
    failed, total = False, 0
    with ThreadPoolExecutor(flags.jobs) as pool:
        options = (flags.seed, flags.start, flags.keep)
        for [report] in pool.map(lambda name: run({name: flags.rounds}, *options), names):
            print(report.line(), flush=True)
            for fault in report.faults:
                print(f"    {fault}", flush=True)
            failed, total = failed or bool(report.faults), total + report.counts.total()
    print(f"{total:,} damaged files")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
