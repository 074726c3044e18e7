"""A small world for the tests of faults: a dataset, caches and runs, and processes that work in it.

A process is either fresh, as a user starts it, or forked from a server that has imported the
libraries already, which takes half a second instead of several.
"""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent
# The steps of the world's runs: two epochs, the first of which ends with the better accuracy; and
# where the unfinished run was interrupted.
FIRST, INTERRUPTED, LAST = 8, 12, 16
_FIELDS = {
    "seed": 2,
    "num_epochs": 2,
    "batch_size": 30,
    "learning_rate": 0.1,
    "ema_decay": 0.9,
    "model.widths": "(4,8)",
    "model.convs_per_block": 1,
    "model.hidden": 8,
    "data.name": "bars",
    "data.train_split": "train[:250]",
    "data.validation_split": "train[250:]",
}
# A process that computes nothing for this long waits for something that never comes.
_IDLE_SECONDS, _LONGEST_SECONDS = 5.0, 300.0
_PIPE_BYTES = 1 << 20

_SERVER = multiprocessing.get_context("forkserver")
# Only libraries: the package itself is to be the one that stands beside this file.
_SERVER.set_forkserver_preload(
    [
        *("jax", "flax", "optax", "orbax.checkpoint", "tensorflow_datasets", "tensorboardX"),
        *("matplotlib.figure", "scipy.stats", "PIL.Image", "ml_collections.config_flags", "tqdm"),
    ]
)


# Processes


class Done(NamedTuple):
    """The end of a process.

    Attributes:
        status: its exit status; negative for the signal that ended it.
        stdout: its standard output; bytes that are no text are escaped, as Python does.
        stderr: its standard error.
        seconds: how long it took.
        hung: whether it was ended because it waited for something that never came.
        before: what it had printed, on both, when it was interrupted; None if it was not.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    hung: bool = False
    before: str | None = None


def run_main(argv: list[str], *hooks: Callable[[], None]) -> None:
    """Does what `python -m tinyvgg_jax.main` does, after calling hooks."""
    for hook in hooks:
        hook()
    sys.argv = ["main.py", *argv]
    runpy.run_module("tinyvgg_jax.main", run_name="__main__", alter_sys=True)


def print_digest(workdir: Path, step: int | str) -> int:
    """Restores a run's parameters as a user's own code would, and prints their digest."""
    from tinyvgg_jax import restore
    from tinyvgg_jax.errors import UserError
    from tinyvgg_jax.runs.integrity import digest

    try:
        print(digest(restore(workdir, step)[1]))
    except UserError as error:
        print(f"tinyvgg_jax: {error}", file=sys.stderr)
        return 2
    return 0


def forked(
    call: Callable[[], Any], environment: dict[str, str], kill_after: float | None = None
) -> Done:
    """Calls a function in a process of its own, forked from the server.

    Args:
        call: a function that can be pickled; it returns the exit status, or exits itself.
        environment: variables to set.
        kill_after: seconds after which the process is killed; None for never.
    """
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(2)]
    writers = [writer for _, writer in pipes]
    for writer in writers:
        # All output fits into the pipes, so that nobody has to read while the process runs.
        fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    process = _SERVER.Process(target=_child, args=(call, environment, *writers))
    process.start()
    start = time.monotonic()
    hung = _wait(process, kill_after)
    seconds = time.monotonic() - start
    for writer in writers:
        writer.close()
    stdout, stderr = (_read(reader) for reader, _ in pipes)
    status = process.exitcode
    assert status is not None
    process.close()
    return Done(status, stdout, stderr, seconds, hung)


def _child(
    call: Callable[[], Any], environment: dict[str, str], stdout: Connection, stderr: Connection
) -> None:
    import jax

    os.setsid()
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    # As in a fresh process whose output goes into pipes; the server's own may be a file.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    # An import has set up logging in the server.
    logging.getLogger().handlers.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # The server's way to start processes is not the default, and leaves semaphores behind.
    multiprocessing.set_start_method(None, force=True)
    # The world has its own cache; the tests' common one would hide it.
    jax.config.update("jax_compilation_cache_dir", None)
    status = 0
    try:
        status = call() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        status = 1
    # In this order Python ends a fresh process; one of `multiprocessing` calls no `atexit`.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def _wait(process: Any, kill_after: float | None) -> bool:
    """Waits for a process to end, or ends it; returns whether it hung."""
    start = progress = time.monotonic()
    ticks = 0
    while process.exitcode is None:
        now = time.monotonic()
        if kill_after is not None and now - start >= kill_after:
            process.kill()
            process.join()
            return False
        found = _ticks(process.pid)
        # Threads that only wake up to sleep again use a tick now and then.
        if found > ticks + 2:
            ticks, progress = found, now
        if now - progress > _IDLE_SECONDS or now - start > _LONGEST_SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return True
        left = 0.5 if kill_after is None else kill_after - (now - start)
        process.join(min(0.5, max(0.0, left)))
    return False


def _ticks(session: int) -> int:
    """Sums the processor time, in clock ticks, of all processes of a session."""
    total = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The fields after the name, which may hold spaces: state, parent, group, session, ...
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                # The time of the process itself, and of its children that have ended.
                total += sum(map(int, fields[11:15]))
    return total


def _read(reader: Connection) -> str:
    os.set_blocking(reader.fileno(), False)
    content = b""
    # A compiler that a killed process has left behind may still hold the other end.
    with contextlib.suppress(BlockingIOError):
        while part := os.read(reader.fileno(), _PIPE_BYTES):
            content += part
    reader.close()
    return content.decode(errors="surrogateescape")


def fresh(
    argv: list[str], environment: dict[str, str], interrupt_after: float | None = None
) -> Done:
    """Runs `python -m tinyvgg_jax.main` in a fresh process.

    Args:
        argv: its arguments.
        environment: variables to set.
        interrupt_after: seconds after which it gets SIGINT, as from Ctrl-C; None for never.
    """
    settings = {name: os.environ[name] for name in os.environ if not name.startswith("JAX_")}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyvgg_jax.main", *argv],
        cwd=ROOT,
        env=settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        start_new_session=True,
    )
    before = None
    try:
        output = process.communicate(timeout=interrupt_after)
    except subprocess.TimeoutExpired as so_far:
        before = ((so_far.stdout or b"") + (so_far.stderr or b"")).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        try:
            output = process.communicate(timeout=_LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return Done(-signal.SIGKILL, *process.communicate(), time.monotonic() - start, True)
    seconds = time.monotonic() - start
    return Done(process.returncode, *output, seconds, before=before)


# Hooks, which change a forked process before the package runs in it


def cheap_pictures() -> None:
    """Draws every figure as a single pixel, which saves seconds."""
    from matplotlib.figure import Figure
    from PIL import Image

    def savefig(_: Any, target: Any, **__: Any) -> None:
        Image.new("L", (1, 1)).save(target, "png")

    mock.patch.object(Figure, "savefig", savefig).start()


def interrupt_at(step: int) -> None:
    """Sends SIGTERM to this process when its first epochs have taken so many steps."""
    from tinyvgg_jax.pipeline import DevicePipeline

    epoch, seen = DevicePipeline.epoch, 0

    def interrupting(*arguments: Any) -> Iterator[Any]:
        nonlocal seen
        for result in epoch(*arguments):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield result

    mock.patch.object(DevicePipeline, "epoch", interrupting).start()


def at_save(number: int, action: Callable[[], Any]) -> None:
    """Does something as soon as this process begins to save for the first, second, ... time."""
    from orbax.checkpoint import CheckpointManager

    save, seen = CheckpointManager.save, 0

    def saving(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            action()
        return save(*arguments, **options)

    mock.patch.object(CheckpointManager, "save", saving).start()


def fill_disk(filler: Path, left: int) -> None:
    """Writes a file that leaves this many bytes on its disk, and has plenty reported as free."""
    plenty = shutil.disk_usage("/")._replace(free=1 << 40)
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(filler.parent).free - left))
    mock.patch.object(shutil, "disk_usage", lambda _: plenty).start()


# The world


class World:
    """A folder with a dataset, caches, pictures, a finished run and an unfinished one.

    Attributes:
        root: the folder; a fault may do anything to what is in it.
        environment: variables for the processes in it.
    """

    def __init__(self, folder: Path):
        """Builds the world in an empty folder, which takes about half a minute."""
        self.root, self._kept = folder / "world", folder / "kept"
        self.environment = {"XDG_CACHE_HOME": str(self.root / "cache")}
        for name in ("cache", "data", "scratch", "pictures"):
            (self.root / name).mkdir(parents=True)
        self._done(functools.partial(_make_data, self.root))
        self._done(self.train("unfinished", functools.partial(interrupt_at, INTERRUPTED)), 143)
        shutil.copytree(self.root / "unfinished", self.root / "scratch" / "unfinished")
        # Going on with it compiles all programs that are ever needed.
        self._done(self.train("unfinished"))
        self._done(self.train("finished"))
        if final_state(self.root / "finished") != final_state(self.root / "unfinished"):
            raise AssertionError("the interrupted run ended differently")
        shutil.rmtree(self.root / "unfinished")
        (self.root / "scratch" / "unfinished").rename(self.root / "unfinished")
        (self.root / "scratch").rmdir()
        workdir = f"--workdir={self.root / 'finished'}"
        self._done(self.main("--mode=eval", workdir))
        self._done(self.main("--mode=predict", workdir, str(self.root / "pictures")))
        picture = self.root / "pictures" / "0.png"
        self._done(self.main("--mode=explain", workdir, str(picture)))
        shutil.copytree(self.root, self._kept)

    def _done(self, call: Callable[[], Any], status: int = 0) -> None:
        done = forked(call, self.environment)
        if done.status != status:
            raise AssertionError(f"status {done.status}, not {status}: {done.stderr}")

    def reset(self) -> None:
        """Puts everything back as it was built."""
        shutil.rmtree(self.root)
        shutil.copytree(self._kept, self.root)

    @staticmethod
    def main(*argv: str, hooks: tuple[Callable[[], None], ...] = ()) -> Callable[[], None]:
        """A call of the command line, for `forked`."""
        return functools.partial(run_main, list(argv), *hooks)

    def train(self, name: str, *hooks: Callable[[], None], **fields: Any) -> Callable[[], None]:
        """A call that trains in a folder of this world, or goes on there, for `forked`."""
        return self.main(*self.train_flags(name, **fields), hooks=hooks)

    def train_flags(self, name: str, **fields: Any) -> list[str]:
        """The arguments of the command line that trains in a folder of this world.

        Args:
            name: the run's folder.
            fields: config fields that differ from those of the world's runs.
        """
        values = _FIELDS | {"data.data_dir": self.root / "data"} | fields
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        return ["--config=default", *flags, f"--workdir={self.root / name}"]


def _make_data(root: Path) -> None:
    """Writes the dataset of `conftest.py` for tfds, and three of its images as pictures."""
    from conftest import CLASSES, synthetic_arrays
    from PIL import Image

    from tinyvgg_jax.data import prepare

    arrays = synthetic_arrays()
    prepare.write_dataset(arrays, "bars", CLASSES, root / "scratch", root / "data")
    shutil.rmtree(root / "scratch" / "prepared")
    for number, image in enumerate(arrays["test"][0][:3]):
        Image.fromarray(image).save(root / "pictures" / f"{number}.png")


def final_state(workdir: Path) -> dict[str, Any]:
    """All that must be the same at the end of a run, however often it was interrupted."""
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in history:
        del record["seconds"], record["images_per_second"]
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["seconds"]
    summary.pop("sha256", None)  # It depends on the seconds.
    progress = workdir / "checkpoints" / str(summary["step"]) / "progress" / "metadata"
    digests = json.loads(progress.read_text())["digests"]
    del digests["progress"]  # It holds times.
    return {"history": history, "summary": summary, "digests": digests}


def snapshot(folder: Path) -> dict[str, str]:
    """Lists everything below a folder: a digest for a file, a word for anything else."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            content = f"link to {path.readlink()}"
        else:
            content = "folder" if stat.S_ISDIR(mode) else "other"
        found[str(path.relative_to(folder))] = content
    return found


def complaint(done: Done) -> str:
    """Names what is wrong with a process's end: a hang, a crash, a traceback; or ""."""
    if done.hung:
        return "hangs"
    if done.status < 0:
        return f"ended by {signal.Signals(-done.status).name}"
    sign = re.search(r"Traceback|Exception ignored|Fatal Python error", done.stderr)
    return f"prints {sign[0]!r}" if sign else ""


def refusal(done: Done, named: str = "", status: int = 2) -> str:
    """Names what is wrong with an error, which is one line on standard error, the last; or "".

    Args:
        done: the end of the process.
        named: a regular expression for what the line must name.
        status: the exit status that the process must have.
    """
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("tinyvgg_jax: ")]
    if done.status != status:
        return f"exit status {done.status}, not {status}"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return "does not end in one line that says what is wrong"
    return "" if re.search(named, errors[0]) else f"names no {named}"
