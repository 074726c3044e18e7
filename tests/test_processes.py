"""Several processes that train one run, connected over the loopback interface."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import CLASSES, ROOT, stored, synthetic_arrays
from ml_collections import ConfigDict

from tinyvgg_jax import train_and_evaluate
from tinyvgg_jax.data import prepare
from tinyvgg_jax.errors import AgreedError, InterruptedRunError, UserError
from tinyvgg_jax.processes import Stop, exchange, on_first, require_same, start, together
from tinyvgg_jax.runs.restore import restore

# Each starts several processes, one after another.
slow = pytest.mark.slow

# Moments of kill -9; more are tried by, for example, TINYVGG_KILLS=5 pytest -s.
_KILLS = int(os.environ.get("TINYVGG_KILLS", "2"))
# The longest time for the others to end after a process is gone.
_END_SECONDS = 60


class Ended(NamedTuple):
    """The end of a process: its exit status, and what it printed."""

    status: int
    stdout: str
    stderr: str


class Group:
    """Processes of one run."""

    def __init__(self, folder: Path, argvs: list[list[str]], devices: int = 1):
        """Starts them.

        Args:
            folder: receives what they print.
            argvs: the command line of each, besides the flags that connect them.
            devices: number of devices of each.
        """
        folder.mkdir(parents=True, exist_ok=True)
        port, self.files, self.processes = free_port(), [], []
        for number, argv in enumerate(argvs):
            connection = ["--coordinator_address", f"localhost:{port}"]
            connection += ["--num_processes", str(len(argvs)), "--process_id", str(number)]
            if any(flag in argv for flag in connection):
                connection = []
            outputs = [folder / f"{number}.{name}" for name in ("stdout", "stderr")]
            self.files.append(outputs)
            with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tinyvgg_jax.main", *connection, *argv],
                        cwd=ROOT,
                        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def wait(self, seconds: float = 300) -> list[Ended]:
        """Waits until all have ended; kills them if that takes too long, and fails."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
        return [
            Ended(process.wait(), *(file.read_text() for file in files))
            for process, files in zip(self.processes, self.files, strict=True)
        ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def flags(config: ConfigDict, workdir: Path, **changes: Any) -> list[str]:
    """The command line that trains a config."""
    from tinyvgg_jax.config import flat, validated

    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(changes)
    fields = flat(validated(config))
    given = [f"--config.{name}={value}" for name, value in fields.items() if value is not None]
    return ["--config", "default", "--workdir", str(workdir), *given]


def num_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_close(workdir: Path, other: Path) -> None:
    ours, theirs = restore(workdir)[1], restore(other)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), ours, theirs)


def assert_equal(workdir: Path, other: Path) -> None:
    ours, theirs = restore(workdir)[1], restore(other)[1]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def run(config: ConfigDict) -> ConfigDict:
    config.batch_size = 24
    config.model.dropout = 0.1
    return config


@pytest.fixture
def other_data(tmp_path: Path) -> Path:
    """A tfds folder with other images in `bars`."""
    for name in ("scratch", "other"):
        (tmp_path / name).mkdir()
    prepare.write_dataset(
        synthetic_arrays(1), "bars", CLASSES, tmp_path / "scratch", tmp_path / "other"
    )
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("devices", "pipeline"),
    [
        (2, "device"),
        pytest.param(1, "device", marks=slow),
        pytest.param(2, "stream", marks=slow),
    ],
)
def test_two_processes_end_like_one(
    run: ConfigDict, tmp_path: Path, devices: int, pipeline: str
) -> None:
    argv = flags(run, tmp_path / "two", **{"data.pipeline": pipeline})
    first, second = Group(tmp_path / "out", [argv, argv], devices).wait()
    assert first.status == second.status == 0, first.stderr + second.stderr
    # The first alone prints.
    assert "epoch 3/3" in first.stderr and f"{2 * devices} x cpu" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    train_and_evaluate(run, tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")
    ours, theirs = (stored(tmp_path / name / "summary.json") for name in ("two", "one"))
    for name in ("train_accuracy", "validation_accuracy", "test_accuracy", "test_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@slow
def test_runs_go_on_on_another_number_of_processes(run: ConfigDict, tmp_path: Path) -> None:
    """From two to one, evaluated there, and from one to two."""
    argv = flags(run, tmp_path / "run", num_epochs=1)
    assert [ended.status for ended in Group(tmp_path / "a", [argv, argv]).wait()] == [0, 0]
    evaluated = subprocess.run(
        [
            *(sys.executable, "-m", "tinyvgg_jax.main"),
            *("--mode", "eval", "--workdir", str(tmp_path / "run")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    run.num_epochs = 2
    train_and_evaluate(run, tmp_path / "run")
    argv = flags(run, tmp_path / "run", num_epochs=3)
    assert [ended.status for ended in Group(tmp_path / "b", [argv, argv]).wait()] == [0, 0]
    run.num_epochs = 3
    train_and_evaluate(run, tmp_path / "whole")
    assert_close(tmp_path / "run", tmp_path / "whole")


@slow
def test_seeds_are_trained_one_after_another(run: ConfigDict, tmp_path: Path) -> None:
    argv = flags(run, tmp_path / "run", num_seeds=2, num_epochs=1)
    first, second = Group(tmp_path / "out", [argv, argv]).wait()
    assert first.status == second.status == 0, first.stderr + second.stderr
    run.num_epochs = 1
    for seed in range(2):
        run.seed = seed
        train_and_evaluate(run, tmp_path / f"seed_{seed}")
        assert_close(tmp_path / "run" / f"seed_{seed}", tmp_path / f"seed_{seed}")


@slow
def test_a_killed_process_ends_the_others_and_all_go_on_bit_for_bit(
    run: ConfigDict, tmp_path: Path
) -> None:
    argv = flags(run, tmp_path / "whole", num_epochs=40)
    assert [ended.status for ended in Group(tmp_path / "out", [argv, argv]).wait()] == [0, 0]
    moments, records = random.Random(), tmp_path / "killed" / "metrics.jsonl"
    argv = flags(run, tmp_path / "killed", num_epochs=40)
    for attempt in range(_KILLS):
        # After some more epochs, or at some moment of the start.
        epoch = num_lines(records) + moments.randrange(30 // _KILLS)
        group, victim = Group(tmp_path / str(attempt), [argv, argv]), attempt % 2
        time.sleep(moments.uniform(0, 8))
        while num_lines(records) < epoch:
            time.sleep(0.01)
        group.processes[victim].kill()
        killed_at = time.monotonic()
        ended = group.wait(_END_SECONDS)
        other, seconds = ended[1 - victim], time.monotonic() - killed_at
        print(f"killed {victim} in epoch {epoch}; {seconds:.1f} s: {other.status} {other.stderr}")
        assert ended[victim].status == -signal.SIGKILL
        # JAX itself may abort at the same time.
        assert other.status in (1, 2, -signal.SIGABRT)
        assert other.stderr.strip() and "Traceback" not in other.stderr
    assert [ended.status for ended in Group(tmp_path / "last", [argv, argv]).wait()] == [0, 0]
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_different_data_of_several_seeds_are_found(
    run: ConfigDict, other_data: Path, tmp_path: Path
) -> None:
    argv = flags(run, tmp_path / "run", num_seeds=2)
    argvs = [argv, [*argv, f"--config.data.data_dir={other_data}"]]
    first, second = Group(tmp_path / "out", argvs).wait()
    assert (first.status, second.status) == (2, 2)
    assert "the processes have different data" in first.stderr


@slow
def test_a_damaged_checkpoint_is_moved_away_by_all(run: ConfigDict, tmp_path: Path) -> None:
    argv = flags(run, tmp_path / "run", num_epochs=2)
    assert [ended.status for ended in Group(tmp_path / "a", [argv, argv]).wait()] == [0, 0]
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    (newest / "params" / "manifest.ocdbt").write_bytes(b"")
    argv = flags(run, tmp_path / "run", num_epochs=3)
    first, second = Group(tmp_path / "b", [argv, argv]).wait()
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert "is damaged" in first.stderr and "Going on from step 10" in first.stderr
    assert (tmp_path / "run" / "checkpoints.damaged" / newest.name).is_dir()
    run.num_epochs = 3
    train_and_evaluate(run, tmp_path / "whole")
    assert_close(tmp_path / "run", tmp_path / "whole")


@slow
def test_signals_end_processes_that_find_each_other(run: ConfigDict, tmp_path: Path) -> None:
    """JAX waits there where Python could not handle Ctrl-C."""
    argv = flags(run, tmp_path / "run")
    connection = ["--coordinator_address", f"localhost:{free_port()}", "--num_processes", "2"]
    group = Group(tmp_path / "out", [[*argv, *connection, "--process_id", "0"]])
    time.sleep(12)
    group.processes[0].send_signal(signal.SIGINT)
    (ended,) = group.wait(10)
    assert ended.status in (130, -signal.SIGINT)


@slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_process_stops_all(run: ConfigDict, tmp_path: Path, who: int) -> None:
    argv = flags(run, tmp_path / "run", num_epochs=100_000)
    group = Group(tmp_path / "out", [argv, argv])
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert group.processes[0].poll() is None
    group.processes[who].send_signal(signal.SIGTERM)
    first, second = group.wait()
    assert first.status == second.status == 128 + signal.SIGTERM
    assert "everything is saved" in first.stderr and second.stderr in ("",)
    restore(tmp_path / "run")


def test_processes_with_different_configs_or_data_end_alike(
    run: ConfigDict, other_data: Path, tmp_path: Path
) -> None:
    argv = flags(run, tmp_path / "run")
    first, second = Group(tmp_path / "a", [argv, [*argv, "--config.seed=7"]]).wait()
    words = "the processes have different configs: seed is 0 in process 0, and 7 in process 1."
    assert (first.status, second.status) == (2, 2)
    assert first.stderr == f"tinyvgg_jax: {words}\n" and second.stderr == ""
    other = [*argv, f"--config.data.data_dir={other_data}"]
    first, second = Group(tmp_path / "b", [argv, other]).wait()
    assert (first.status, second.status) == (2, 2)
    assert "the processes have different data: train is" in first.stderr
    assert len(first.stderr.splitlines()) == 1 or "Decod" in first.stderr
    assert not (tmp_path / "run").exists()


@slow
def test_what_one_process_alone_finds_wrong_ends_all(run: ConfigDict, tmp_path: Path) -> None:
    argv = flags(run, tmp_path / "run")
    nothing = [*argv, f"--config.data.data_dir={tmp_path / 'nothing'}"]
    first, second = Group(tmp_path / "a", [argv, nothing]).wait()
    assert (first.status, second.status) == (2, 2)
    assert first.stderr.startswith("tinyvgg_jax: process 1: ") and second.stderr == ""
    # A copy of the run is as good as the run, until they write.
    assert Group(tmp_path / "one", [argv], 1).wait()[0].status == 0
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    argv = flags(run, tmp_path / "run", num_epochs=5)
    elsewhere = flags(run, tmp_path / "elsewhere", num_epochs=5)
    first, second = Group(tmp_path / "b", [argv, elsewhere]).wait()
    assert (first.status, second.status) == (2, 2)
    assert "a file system that they share" in first.stderr and second.stderr == ""


@slow
def test_a_coordinator_that_nobody_hears_of_ends_in_a_minute(
    run: ConfigDict, tmp_path: Path
) -> None:
    argv = flags(run, tmp_path / "run")
    connection = ["--coordinator_address", f"localhost:{free_port()}", "--num_processes", "2"]
    start_time = time.monotonic()
    group = Group(tmp_path / "out", [[*argv, *connection, "--process_id", "1"]])
    (ended,) = group.wait(_END_SECONDS)
    assert time.monotonic() - start_time < _END_SECONDS
    assert ended.status == 2
    assert ended.stderr.splitlines()[-1].endswith("did not answer within 50 seconds.")
    assert not (tmp_path / "run").exists()


# A process alone


def never(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id must be passed, too."),
        ((None, 2, 0), "--coordinator_address must be passed, too."),
        (("localhost", 2, 0), "--coordinator_address must be HOST:PORT, not 'localhost'."),
        (
            ("localhost:99999", 2, 0),
            "--coordinator_address must be HOST:PORT, not 'localhost:99999'.",
        ),
        (("node..x:1", 2, 0), "--coordinator_address node..x:1 names no host."),
        (("localhost:1", 0, 0), "--num_processes must be at least 1, not 0."),
        (("localhost:1", 2, 2), "--process_id must be from 0 to 1, not 2."),
        (("localhost:1", 2, -1), "--process_id must be from 0 to 1, not -1."),
    ],
)
def test_wrong_flags_are_named(arguments: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        start(*arguments, never)
    assert str(raised.value) == words


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch job that is no step of `srun`, a single task, and a pod that is no job.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NODELIST": "node1",
        },
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_single_process_connects_with_nobody(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", never)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(None, None, None, never)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used here: address already"):
            start(f"localhost:{port}", 2, 0, never)


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(UserError, match=r"--coordinator_address nosuchhost\.invalid:5720: "):
        start("nosuchhost.invalid:5720", 2, 1, never)


def test_what_a_cluster_starts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"JOB_ID": 1, "NTASKS": 2, "PROCID": 1, "LOCALID": 0, "STEP_NODELIST": "node1"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    class Found(BaseException):
        pass

    def initialize(*arguments: Any, **_: Any) -> None:
        # JAX reads the rest by itself.
        assert arguments == (None, None, None)
        raise Found

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Found):
        start(None, None, None, never)


def test_a_single_process_agrees_with_itself() -> None:
    assert exchange({"a": 1}) == [{"a": 1}]
    assert together(lambda: 3) == on_first(lambda: 3) == 3
    require_same("configs", {"seed": 1})
    received: list[int] = []
    stop = Stop(received)
    assert not stop.after_call() and stop.signal() == 0
    received.append(signal.SIGTERM)
    assert stop.after_call() and stop.signal() == signal.SIGTERM


def test_a_process_that_is_interrupted_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def answer(message: str | None) -> list[str | None]:
        told.append(message)
        return ["interrupted by SIGTERM; nothing was prepared.", None]

    def interrupted() -> None:
        raise InterruptedRunError("interrupted by SIGTERM; nothing was prepared.", 15)

    monkeypatch.setattr("tinyvgg_jax.processes.count", lambda: 2)
    monkeypatch.setattr("tinyvgg_jax.processes.exchange", answer)
    with pytest.raises(InterruptedRunError):
        together(interrupted)
    with pytest.raises(AgreedError, match="interrupted by SIGTERM"):
        together(interrupted, takes_part=False)
    assert told == ["interrupted by SIGTERM; nothing was prepared.", None]


def test_processes_are_for_training_only(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "tinyvgg_jax.main", "--mode", "eval"),
            *("--workdir", str(tmp_path), "--process_id", "0"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == "tinyvgg_jax: --process_id is for training, not for --mode eval.\n"
