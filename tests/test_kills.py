"""Processes that end too early: killed, interrupted by Ctrl-C, or without room on the disk.

The numbers of kills and interruptions are small. More are tried with, for example,

    TINYVGG_KILLS=100 TINYVGG_INTERRUPTS=40 pytest -s tests/test_kills.py
"""

import functools
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import (
    FIRST,
    ROOT,
    Done,
    World,
    at_save,
    complaint,
    fill_disk,
    final_state,
    forked,
    fresh,
    print_digest,
    refusal,
)

pytestmark = pytest.mark.slow

_KILLS = int(os.environ.get("TINYVGG_KILLS", "6"))
_INTERRUPTS = int(os.environ.get("TINYVGG_INTERRUPTS", "3"))
# Another seed for other moments.
_SEED = int(os.environ.get("TINYVGG_MOMENTS", "0"))
_KILLS_OF_A_RUN = 8
_RUNS: list[dict[str, Any]] = [
    {"seed": seed, "data.pipeline": pipeline, "num_epochs": 6}
    for seed in range(3)
    for pipeline in ("stream", "device")
]


# Killed


def set_programs(world: World, fields: dict[str, Any]) -> None:
    """Removes the compiled programs for one of the seeds, so that kills hit their compilation."""
    if fields["seed"] == 0:
        shutil.rmtree(world.root / "cache" / "tinyvgg_jax" / "compiled", ignore_errors=True)


def phase(workdir: Path, killed: Done) -> str:
    """Tells in which phase of a run its process was killed."""
    if "Evaluating" in killed.stderr:
        return "closing evaluation"
    began = time.time() - killed.seconds
    unfinished = (workdir / "checkpoints").glob("*tmp*")
    if any(path.stat().st_mtime > began for path in unfinished):
        return "saving"
    if any(path.stat().st_mtime > began for path in workdir.glob("tensorboard/*")):
        return "compilation or epochs"
    return "start-up"


def kill_until_done(
    world: World, name: str, fields: dict[str, Any], moments: list[float]
) -> Counter[str]:
    """Trains, killed after each of these times, unless an attempt is done sooner; then to the end.

    Returns:
        The number of kills in each phase.
    """
    phases: Counter[str] = Counter()
    set_programs(world, fields)
    for moment in (*moments, None):
        done = forked(world.train(name, **fields), world.environment, kill_after=moment)
        if done.status != -signal.SIGKILL or done.hung:
            break
        where = phase(world.root / name, done)
        print(f"{name} {fields}: killed after {moment:.3f} s: {where}")
        phases[where] += 1
    assert (done.status, complaint(done)) == (0, ""), done.stderr
    return phases


def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_one_that_was_not(
    world: World,
) -> None:
    world.reset()
    rng, phases = random.Random(_SEED), Counter[str]()
    expected = {}
    for chain in itertools.count():
        fields = _RUNS[chain % len(_RUNS)]
        if chain < len(_RUNS):
            set_programs(world, fields)
            whole = forked(world.train(f"whole{chain}", **fields), world.environment)
            assert whole.status == 0, whole.stderr
            expected[chain] = whole.seconds, final_state(world.root / f"whole{chain}")
        seconds, state = expected[chain % len(_RUNS)]
        kills = min(_KILLS - phases.total(), _KILLS_OF_A_RUN)
        moments = [rng.uniform(0, seconds) for _ in range(kills)]
        phases += kill_until_done(world, f"killed{chain}", fields, moments)
        assert final_state(world.root / f"killed{chain}") == state
        if phases.total() >= _KILLS:
            break
    print(f"{phases.total()} kills of {chain + 1} runs: {dict(phases)}")


# A full disk


@pytest.fixture
def small_disk(world: World) -> Iterator[Path]:
    """A folder of the world on a file system of 4 MiB."""
    world.reset()
    folder = world.root / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_refused_and_resumed(world: World, name: str, refused: Done, saves: int) -> None:
    """Checks that an error lost nothing, and that the same command ends the run."""
    assert complaint(refused) == refusal(refused, "checkpoints|tensorboard") == "", refused.stderr
    if saves:
        digests = [
            forked(functools.partial(print_digest, world.root / run, FIRST), world.environment)
            for run in ("finished", name)
        ]
        assert digests[0].stdout == digests[1].stdout != "", digests[1].stderr
    resumed = forked(world.train(name), world.environment)
    assert (resumed.status, complaint(resumed)) == (0, ""), resumed.stderr
    assert final_state(world.root / name) == final_state(world.root / "finished")


@pytest.mark.parametrize("saves", [0, 1])
@pytest.mark.parametrize("size", [0, 300, 2000, 4500])
def test_a_file_that_cannot_grow_ends_a_save_in_one_line(
    world: World, saves: int, size: int
) -> None:
    world.reset()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    call = world.train("run", functools.partial(at_save, saves + 1, limit))
    assert_refused_and_resumed(world, "run", forked(call, world.environment), saves)


@pytest.mark.parametrize("saves", [0, 1])
@pytest.mark.parametrize("left", [0, 20_000, 60_000, 120_000])
def test_a_disk_that_fills_up_ends_a_save_in_one_line(
    world: World, small_disk: Path, saves: int, left: int
) -> None:
    fill = functools.partial(fill_disk, small_disk / "filler", left)
    call = world.train("disk/run", functools.partial(at_save, saves + 1, fill))
    refused = forked(call, world.environment)
    (small_disk / "filler").unlink()
    assert_refused_and_resumed(world, "disk/run", refused, saves)


# Ctrl-C


def moments_of(seconds: float, name: str) -> list[float]:
    """Draws a moment from each of as many equal parts of a time as there are to be."""
    rng = random.Random(f"{_SEED} {name}")
    return [seconds * (part + rng.random()) / _INTERRUPTS for part in range(_INTERRUPTS)]


# The last that each mode prints, or begins to print, before it ends.
_LAST_WORDS = {"eval": "test: accuracy", "predict": "prediction", "train": "Evaluating"}


def interruption(done: Done, mode: str, finished: bool) -> str:
    """Names what is wrong with the end of a process after Ctrl-C; or "".

    Args:
        done: the end of the process.
        mode: the mode that it ran.
        finished: whether it had done everything that it was to do.
    """
    by_signal = done.status == -signal.SIGINT
    if by_signal and (finished or not done.stdout + done.stderr):
        # Python handles no signals when it begins to start, and when it has nearly ended.
        return ""
    if "Traceback" in done.stderr and f'File "{ROOT}' not in done.stderr:
        # Python was starting, and had not come to the package.
        return ""
    if done.status == 0:
        ignored = done.before is not None and _LAST_WORDS[mode] not in done.before
        return complaint(done) or ("" if finished and not ignored else "Ctrl-C is ignored")
    # After some interruptions Python ends itself by the signal, which is 130 for a shell as well.
    if by_signal:
        done = done._replace(status=128 + signal.SIGINT)
    return complaint(done) or refusal(done, status=128 + signal.SIGINT)


@pytest.mark.parametrize("mode", ["eval", "predict"])
def test_ctrl_c_at_any_moment_is_one_line(world: World, mode: str) -> None:
    world.reset()
    argv = [f"--mode={mode}", f"--workdir={world.root / 'finished'}"]
    argv += [str(world.root / "pictures")] if mode == "predict" else []
    whole = fresh(argv, world.environment)
    assert whole.status == 0, whole.stderr
    wrong = []
    for moment in moments_of(whole.seconds, mode):
        done = fresh(argv, world.environment, moment)
        verdict = interruption(done, mode, done.stdout == whole.stdout)
        print(f"{mode}: Ctrl-C after {moment:.3f} s: status {done.status}: {verdict or 'right'}")
        if verdict:
            wrong.append(f"after {moment:.3f} s: {verdict}\n{done.stderr}")
    assert not wrong, "\n".join(wrong)


def test_training_interrupted_at_any_moment_goes_on(world: World) -> None:
    world.reset()
    whole = fresh(world.train_flags("whole"), world.environment)
    assert whole.status == 0, whole.stderr
    wrong = []
    for number, moment in enumerate(moments_of(whole.seconds, "train")):
        name = f"run{number}"
        done = fresh(world.train_flags(name), world.environment, moment)
        verdict = interruption(done, "train", (world.root / name / "summary.json").exists())
        if not verdict:
            resumed = forked(world.train(name), world.environment)
            same = final_state(world.root / name) == final_state(world.root / "finished")
            verdict = "" if resumed.status == 0 and same else f"goes on wrongly: {resumed.stderr}"
        print(f"train: Ctrl-C after {moment:.3f} s: status {done.status}: {verdict or 'right'}")
        if verdict:
            wrong.append(f"after {moment:.3f} s: {verdict}\n{done.stderr}")
    assert not wrong, "\n".join(wrong)
