"""TensorBoard: losses, accuracies, learning rate and speed of a run's epochs as its events."""

import contextlib
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tinyvgg_jax.runs.files import subfolder, writing_to


class TensorBoard:
    """A writer of events, in a file of its own, after the epochs that a run has so far.

    `tensorboardX.SummaryWriter` writes from a thread, which on a full disk prints a traceback and
    ends. This one writes in the caller's thread, where an error can be told; an epoch has but a
    few numbers. As a context, it closes its file; an exception within the context comes first.

    Args:
        workdir: the run's folder.
        history: the records in `metrics.jsonl`; TensorBoard discards what it has beyond them.

    Raises:
        UserError: if the events cannot be written.
    """

    def __init__(self, workdir: Path, history: list[dict[str, Any]]) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = subfolder(workdir, "tensorboard")
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        with writing_to(self._folder):
            self._file = RecordWriter(str(self._folder / name))
        self._write(Event(file_version="brain.Event:2"))
        if history:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=history[-1]["step"] + 1, session_log=start))
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing_to(self._folder) if error is None else contextlib.suppress(OSError):
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Writes an epoch's record; TensorBoard groups `loss/...` and `accuracy/...`.

        Args:
            record: the epoch's record in `metrics.jsonl`.

        Raises:
            UserError: if it cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars(record).items():
            self._write(Event(step=record["step"], summary=scalar(name, value)))
        self._flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with writing_to(self._folder):
            self._file.write(event.SerializeToString())

    def _flush(self) -> None:
        with writing_to(self._folder):
            self._file.flush()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Names the numbers of an epoch's record as TensorBoard groups them.

    Args:
        record: the epoch's record in `metrics.jsonl`.

    Returns:
        Values by name, as `loss/train` or `learning_rate`.
    """
    named = {name: record[name] for name in ("learning_rate", "images_per_second")}
    for name, value in record.items():
        split, _, kind = name.partition("_")
        if split in ("train", "validation"):
            named[f"{kind}/{split}"] = value
    return named
