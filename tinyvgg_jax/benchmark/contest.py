"""Measures contestants in turns, each in its own process, so that noise affects all alike."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

# The threads of the previous contestant may spin for a while before they sleep.
_PAUSE_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A worker, and the settings with which it runs a case.

    Attributes:
        name: its name in tables and JSON.
        module: the worker's module, run with `python -m`.
        case: fields that it adds to the case.
        environment: environment variables of its process; None unsets one.
        is_peer: whether it is a competitor that this package is compared with.
        is_compared: whether it is this package as its users run it, to be compared with the peers.
    """

    name: str
    module: str
    case: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    is_peer: bool = False
    is_compared: bool = False


@dataclasses.dataclass
class Result:
    """Measurements of a contestant on a case.

    Attributes:
        name: the contestant's name.
        is_peer: whether the contestant is a competitor.
        is_compared: whether the contestant is this package as its users run it.
        case: the whole case that it ran.
        first_step_seconds: time from the start of its process to the end of its first step.
        seconds: time per step, one number for each round; empty if it failed.
        facts: device and peak memory.
        error: the last line of its standard error, if it failed.
    """

    name: str
    is_peer: bool = False
    is_compared: bool = False
    case: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_step_seconds: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float:
        """Median time per step over the rounds, in seconds."""
        return statistics.median(self.seconds)

    def fail(self, error: Exception) -> None:
        """Makes it the result of a contestant that failed, whatever it has measured."""
        self.error, self.seconds = str(error), []


class WorkerError(Exception):
    """A worker's process ended without an answer."""


class Process:
    """A worker's process; requests and answers are lines of JSON."""

    def __init__(self, contestant: Contestant, case: dict[str, Any]):
        """Starts the process, and waits until it is ready to run the case.

        Raises:
            WorkerError: if it fails.
        """
        self.result = _empty_result(contestant, case)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | contestant.environment
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", contestant.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={name: value for name, value in environment.items() if value is not None},
            # Ctrl-C in a terminal reaches this process alone, which then ends the workers.
            process_group=0,
        )
        try:
            self.ask(case | contestant.case)
        except BaseException:
            self.kill()
            raise
        self.result.first_step_seconds = time.perf_counter() - start

    def ask(self, request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerError: if the process ends instead, with the last line of its standard error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            # A process may write its error after it has closed its output.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or ["it ended without an error message"]
            raise WorkerError(lines[-1][:300])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process: a worker stops when its input ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        """Ends the process and its children at once, if they have not ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


def _empty_result(contestant: Contestant, case: dict[str, Any], error: str = "") -> Result:
    """Makes the result of a contestant that has measured nothing yet."""
    return Result(
        contestant.name,
        contestant.is_peer,
        contestant.is_compared,
        case | contestant.case,
        error=error,
    )


def contest(
    contestants: list[Contestant],
    case: dict[str, Any],
    rounds: int,
    seconds: float,
    steps: int | None = None,
) -> list[Result]:
    """Runs a case with all contestants, in turns.

    Args:
        contestants: the contestants; if one fails, the others still run.
        case: the case, like `{"kind": "train", "batch_size": 32, "dtype": "float32"}`.
        rounds: number of turns of each contestant.
        seconds: approximate length of a turn.
        steps: number of steps of a turn, in place of `seconds`.

    Returns:
        A result for each contestant, in their order.
    """
    results: list[Result] = []
    with contextlib.ExitStack() as opened:
        # The processes that have not failed, with the number of steps of their turns.
        numbers: dict[Process, int] = {}
        for contestant in contestants:
            try:
                process = opened.enter_context(running(contestant, case))
                numbers[process] = steps or _steps_in(process, seconds)
                results.append(process.result)
            except WorkerError as error:
                results.append(_empty_result(contestant, case, str(error)))
        for _ in range(rounds):
            for process, number in list(numbers.items()):
                time.sleep(_PAUSE_SECONDS)
                try:
                    process.result.seconds.append(process.ask(number)["seconds"] / number)
                except WorkerError as error:
                    process.result.fail(error)
                    del numbers[process]
        for process in numbers:
            try:
                process.result.facts = process.ask("facts")
            except WorkerError as error:
                process.result.fail(error)
    return results


@contextlib.contextmanager
def running(contestant: Contestant, case: dict[str, Any]) -> Iterator[Process]:
    """Runs a contestant's process until the end of the context; an exception kills it at once."""
    process = Process(contestant, case)
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    process.close()


def _steps_in(process: Process, seconds: float) -> int:
    """Finds the number of steps that take about so many seconds; this also warms the process up."""
    number = 1
    while True:
        taken = process.ask(number)["seconds"]
        if taken > seconds / 4 or number >= 100_000:
            return max(1, round(number * seconds / max(taken, 1e-9)))
        number = max(number + 1, min(10 * number, round(number * seconds / max(taken, 1e-9) / 2)))


def ratios(result: Result, peer: Result) -> list[float]:
    """Computes for each round how many times as fast as a peer a contestant was."""
    pairs = zip(result.seconds, peer.seconds, strict=True)
    return [peer_seconds / seconds for seconds, peer_seconds in pairs]
