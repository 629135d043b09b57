"""A save that is cut short: killed, interrupted, out of disk, in another's way.  Nothing that was whole is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import statewise as sw
from damaging import model, plan, state, words
from refusals import refused
from statewise._src.checkpoint import temporary

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "helpers/programs/keep_killed.py"
PATHS = (TESTS / "helpers", TESTS.parent / "src")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
SAYS_WHERE = "free some space, or choose a directory that can be written to"


def killed(folder: Path, how: str, first: int, after: float, number: int = signal.SIGKILL) -> tuple[int, int]:
    """Lets the program save until some time after its second save, and gives the last steps begun and done."""
    program = [sys.executable, str(PROGRAM), str(folder), how, str(first)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        begun = done = -1
        try:
            for line in process.stdout:
                begun, done = _told(line, begun, done)
                if done >= first + 1:
                    break
            time.sleep(after)
        finally:
            process.send_signal(number)
        for line in process.stdout:
            begun, done = _told(line, begun, done)
    assert process.returncode != 0
    return begun, done


def _told(line: str, begun: int, done: int) -> tuple[int, int]:
    what, step = line.split()
    return (int(step), done) if what == "begun" else (begun, int(step))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def check_plain(folder: Path, begun: int, done: int) -> None:
    """Every path that is there restores what its step says, and none that was done is lost."""
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
    assert done in steps
    assert steps[-1] in (begun, done)
    for step in steps[-3:]:
        assert words(sw.restore(folder / f"step_{step}", plan().abstract())[0]) == words(plan().take(model(step)))


def check_managed(folder: Path, begun: int, done: int) -> None:
    with sw.Checkpoints(folder, max_to_keep=2) as checkpoints:
        assert checkpoints.latest is not None
        assert done <= checkpoints.latest <= begun
        for step in checkpoints.steps[-2:]:
            restored = checkpoints.restore(plan().abstract(), step=step).state
            assert words(restored) == words(plan().take(model(step)))


CHECKS: dict[str, Callable[[Path, int, int], None]] = {
    "plain": check_plain,
    "managed": check_managed,
    "newer": check_managed,  # on the first interface, which reads what the newer one wrote
}


@pytest.mark.parametrize("how", CHECKS)
def test_a_killed_save_loses_nothing_and_offers_no_half(how: str, tmp_path: Path) -> None:
    dice, first = random.Random(how), 0
    for _ in range(2):
        begun, done = killed(tmp_path, how, first, dice.uniform(0, 0.2))
        CHECKS[how](tmp_path, begun, done)
        first = begun + 1


def test_a_sigterm_that_nothing_handles_loses_the_step_that_is_being_written_and_no_earlier_one(tmp_path: Path) -> None:
    begun, done = killed(tmp_path, "managed", 0, 0.05, signal.SIGTERM)
    check_managed(tmp_path, begun, done)


@pytest.mark.slow
@pytest.mark.parametrize("how", CHECKS)
def test_fifty_kills_lose_nothing(how: str, tmp_path: Path) -> None:
    dice, first = random.Random(), 0
    for _ in range(50):
        begun, done = killed(tmp_path, how, first, dice.uniform(0, 0.4))
        CHECKS[how](tmp_path, begun, done)
        first = begun + 1


def dead() -> int:
    """Returns the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_a_killed_save_left_is_cleared_by_the_next_to_that_path(tmp_path: Path) -> None:
    start = temporary._start_of(os.getpid())
    host, many = temporary._host(), temporary._many(temporary._host_number())
    # Containers give each trainer the number that the one before had: another start, another process.
    ended = [f"{dead()}", f"{dead()}.{start}", f"{os.getpid()}.{start - 1}"]
    running = [f"{os.getpid()}", f"{os.getpid()}.{start}"]
    others = [f".step_2.tmp-{host}-{dead()}-0000", f".step?1.tmp-many-{dead()}-0000", f".step?1.tmp-{host}-mine-0000"]
    cleared = [f".step?1.tmp-{of}-{maker}-0000" for of in (host, many) for maker in ended]
    kept = [f".step?1.tmp-{of}-{maker}-0000" for of in (host, many) for maker in running] + others
    for name in cleared + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    sw.save(tmp_path / "step?1", state())
    assert sorted(hidden(tmp_path)) == sorted(kept)


def test_a_process_is_known_by_its_start_where_the_system_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = temporary.temporary_beside(tmp_path / "step")
    assert path.name.startswith(f".step.tmp-{temporary._host()}-{os.getpid()}.{temporary._start_of(os.getpid())}-")
    assert temporary._is_alive(1, 0), "another user's, perhaps"
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    path = temporary.temporary_beside(tmp_path / "step")
    assert path.name.startswith(f".step.tmp-{temporary._host()}-{os.getpid()}-")
    assert temporary._is_alive(os.getpid(), 5), "the start is not known"


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path) -> None:
    begun, done = killed(tmp_path, "plain", 0, 0.03, signal.SIGINT)
    check_plain(tmp_path, begun, done)
    assert hidden(tmp_path) == []


# --- a disk that is full -----------------------------------------------------------------------------------------

FULL = """
import os, resource, signal
import statewise as sw
from damaging import state, words
from pathlib import Path
folder = Path({folder!r})
values = state(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for size in (0, 100, 1000, 5000):
    for layout in ("named", "packed"):
        full(size)
        try:
            sw.save(folder / "full", values, layout=layout)
        except sw.SaveError as error:
            full(resource.RLIM_INFINITY)
            said = f"{{folder / 'full'}} could not be written: File too large. Nothing of it is left."
            assert error.message == said, error
            assert error.hint == {hint!r}, error
        else:
            raise AssertionError(size)
        assert list(folder.iterdir()) == [], list(folder.iterdir())
full(resource.RLIM_INFINITY)
checkpoints = sw.Checkpoints(folder / "run")
checkpoints.save(1, values)
checkpoints.wait()
for ending in ("wait", "save", "close"):
    again = sw.Checkpoints(folder / "run")
    full(1000)
    try:
        again.save(2, values)
        again.save(3, values) if ending == "save" else getattr(again, ending)()
    except sw.SaveError as error:
        assert "could not be written" in error.message, error
    else:
        raise AssertionError(ending)
    full(resource.RLIM_INFINITY)
assert checkpoints.steps == (1,), checkpoints.steps
assert words(checkpoints.restore(values).state) == words(values)
os._exit(0)  # threads of Orbax's wait for signals that a failed save never gives
"""


def test_a_full_disk_is_an_error_that_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    program = FULL.format(folder=str(tmp_path), hint=SAYS_WHERE)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# --- a directory that cannot be written --------------------------------------------------------------------------


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    final = tmp_path / "file" / "step"
    message = f"{final} could not be written: Not a directory. Nothing of it is left."
    with refused(sw.SaveError, message, hint=SAYS_WHERE):
        sw.save(final, state())
    with pytest.raises(sw.SaveError, match="cannot be used"):
        sw.Checkpoints(tmp_path / "file")


def test_a_directory_that_takes_no_files_cannot_be_written() -> None:
    before = sorted(os.listdir("/proc/self"))
    with pytest.raises(sw.SaveError, match=r"could not be written: .*\. Nothing of it is left\."):
        sw.save("/proc/self/step", state())
    with pytest.raises(sw.SaveError, match="cannot be used"):
        sw.Checkpoints("/proc/self/run")
    assert sorted(os.listdir("/proc/self")) == before


# --- two writers -------------------------------------------------------------------------------------------------


def test_of_two_writers_on_one_path_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    outcomes: list[tuple[int, sw.SaveError | None]] = []
    together = threading.Barrier(2)
    states = {seed: state(seed) for seed in (1, 2)}

    def write(seed: int) -> None:
        together.wait()
        try:
            sw.save(tmp_path / "step", states[seed])
        except sw.SaveError as error:
            outcomes.append((seed, error))
        else:
            outcomes.append((seed, None))

    writers = [threading.Thread(target=write, args=(seed,)) for seed in states]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    won = [seed for seed, error in outcomes if error is None]
    (lost,) = [error for _, error in outcomes if error is not None]
    assert str(tmp_path / "step") in lost.message
    assert words(sw.restore(tmp_path / "step", plan().abstract())[0]) == words(states[won[0]])
    assert hidden(tmp_path) == []
