"""Training, preparing and converting under kills, signals, full disks and each other.

Whatever happens, what is left is complete or not there, nothing is a traceback, and the same
command ends with the result of an undisturbed one, to the bit. FAULTS=12 disturbs each of them 12
times as often, also in the ways that the short form leaves out for those that are like others;
FAULTS_SEED=1 at other moments.
"""

import signal
import time
from random import Random

import commands
import pytest
from commands import COMMANDS, OUT, ROUNDS, SEED, assert_intact, ended, started

pytestmark = pytest.mark.faults
MAIN = [name for name, command in COMMANDS.items() if ROUNDS > 1 or not command.is_like]
NO_PLOT = (
    "warning: the loss plot could not be drawn: OSError(28, 'No space left on device');"
    " training goes on without it\n"
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of inputs, shared by all tests of this file."""
    place = tmp_path_factory.mktemp("place")
    commands.make_inputs(place)
    return place


@pytest.fixture(scope="module")
def undisturbed(request, place, tmp_path_factory):
    """A command, its result when nobody disturbs it, and the seconds that it takes then."""
    command = COMMANDS[request.param]
    for _ in range(1 + command.resumes):  # the first run of training compiles
        folder = commands.copy_inputs(place, tmp_path_factory.mktemp("undisturbed"))
        before = time.monotonic()
        assert ended(started(command, folder, place / "cache")) == (0, "")
        seconds = time.monotonic() - before
    return command, command.result(folder / OUT), seconds


def assert_finishes(command, folder, place, expected):
    """Assert that the command, run again, gives the undisturbed result and leaves nothing else."""
    code, stderr = ended(started(command, folder, place / "cache"))
    if not command.resumes and code:
        assert "exists already" in stderr
    else:
        assert (code, stderr) == (0, "")
    assert command.result(folder / OUT) == expected
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == {OUT}
    assert not any(folder.glob(command.partial))


@pytest.mark.parametrize("undisturbed", COMMANDS, indirect=True)
def test_killed_at_random_moments(undisturbed, place, tmp_path):
    command, expected, seconds = undisturbed
    random = Random(f"{SEED} {command.words}")
    folder = commands.copy_inputs(place, tmp_path / "folder")
    last = command.kills * ROUNDS - 1
    for number in range(last + 1):
        process = started(command, folder, place / "cache")
        commands.wait_for_a_moment(random, command, process, folder, seconds, bool(number % 2))
        process.kill()
        ended(process)
        assert_intact(command, folder)
        if number == last or (number % 20 == 19 if command.resumes else number % 2):
            assert_finishes(command, folder, place, expected)
        if not command.resumes or number % 20 == 19:
            commands.remove(folder / OUT)


@pytest.mark.parametrize("undisturbed", MAIN, indirect=True)
def test_signalled_at_random_moments(undisturbed, place, tmp_path):
    command, expected, seconds = undisturbed
    random = Random(f"{SEED} {command.words}")
    folder = commands.copy_inputs(place, tmp_path / "folder")
    for turn in range(len(SIGNALS) * ROUNDS):
        number, times = SIGNALS[turn % 3], 1 + turn % 2
        process = started(command, folder, place / "cache")
        commands.wait_for_a_moment(random, command, process, folder, seconds, random.random() < 0.5)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(random.uniform(0, 0.05))
        code, stderr = ended(process)
        is_line = stderr.startswith("error: ") and stderr.count("\n") == 1
        # A library may turn Ctrl-C during its import into another error: then it is a line.
        assert code in (0, -number, 128 + number) or (number == signal.SIGINT and is_line), stderr
        assert_intact(command, folder)
        if not command.resumes:
            commands.remove(folder / OUT)
    assert_finishes(command, folder, place, expected)


@pytest.mark.parametrize("undisturbed", MAIN, indirect=True)
@pytest.mark.parametrize("kind", ["size", "nr_inodes"])
def test_disk_is_full(undisturbed, place, tmp_path, kind):
    command, expected, _ = undisturbed
    random = Random(f"{SEED} {command.words} {kind}")
    for _ in range(ROUNDS):
        disk = tmp_path / "disk"
        room = random.choice((4096, 40_000, 150_000, 400_000)) if kind == "size" else None
        room = room or random.randrange(48)
        with commands.small_disk(disk, "size=100m") as change:
            folder = commands.copy_inputs(place, disk / "folder")
            if change:
                links = len(list(folder.iterdir())) + 2  # and the two folders
                used = 16 * 4096 if kind == "size" else links
                change(f"{kind}={used + room}")
                code, stderr = ended(started(command, folder, place / "cache"))
            else:
                limit = {"preexec_fn": commands.limit_files(min(room, 10_000))}
                code, stderr = ended(started(command, folder, place / "cache", **limit))
            # The plot of losses is drawn before the first save; it costs a warning, not the run.
            stderr = stderr.removeprefix(NO_PLOT)
            if code:
                assert code in (1, 2), stderr  # 2: for the folder, before anything is done
                assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
            assert_intact(command, folder)
            # Threads of a failed save may write on; the next session removes what they leave.
            assert command.resumes or not any(folder.glob(command.partial))
            if change:
                change(f"{kind}={100_000 if kind == 'nr_inodes' else '100m'}")
            assert_finishes(command, folder, place, expected)
        commands.remove(disk)


@pytest.mark.parametrize("undisturbed", MAIN, indirect=True)
def test_nothing_may_be_written(undisturbed, place, tmp_path):
    command, _, _ = undisturbed
    with commands.small_disk(tmp_path / "disk", "size=1m") as change:
        folder = commands.copy_inputs(place, tmp_path / "disk" / "folder")
        if change:
            change("ro")
        else:
            folder.chmod(0o500)
        code, stderr = ended(started(command, folder, place / "cache"))
        folder.chmod(0o700) if not change else None
        assert code in (1, 2) and stderr.startswith("error: ") and stderr.count("\n") == 1
        assert not (folder / OUT).exists()


@pytest.mark.parametrize("undisturbed", MAIN, indirect=True)
def test_two_at_once(undisturbed, place, tmp_path):
    command, expected, seconds = undisturbed
    random = Random(f"{SEED} {command.words}")
    for number in range(ROUNDS):
        folder = commands.copy_inputs(place, tmp_path / f"folder{number}")
        first = started(command, folder, place / "cache")
        time.sleep(random.uniform(0, seconds) * random.random())
        both = [ended(first)] if first.poll() is not None else []
        second = started(command, folder, place / "cache")
        both = [ended(second), *(both or [ended(first)])]
        codes = sorted(code for code, _ in both)
        assert codes in ([0, 0], [0, 1]) if command.resumes else codes == [0, 1]
        for code, stderr in both:
            if code:
                assert "is in use by process" in stderr or "exists already" in stderr
        assert_finishes(command, folder, place, expected)
