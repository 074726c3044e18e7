"""Measures contestants side by side: one process each, in turns, so that noise falls on all."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

# After a run the other's threads may still wait actively for more.
_PAUSE_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Who runs a case.

    Attributes:
        name: in the tables.
        module: to be run with `python -m`, a worker.
        case: what it adds to the case.
        environment: variables set for its process.
        is_peer: whether ours is compared with it.
    """

    name: str
    module: str
    case: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    is_peer: bool = False


@dataclasses.dataclass
class Result:
    """What a contestant reached.

    Attributes:
        name: the contestant's.
        is_peer: likewise.
        first_step_seconds: from the start of its process to the end of the first step.
        seconds: of a step, one figure a round; empty if it failed.
        facts: of the device and the memory.
        error: the last line it wrote, if it failed.
    """

    name: str
    is_peer: bool
    first_step_seconds: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


class _WorkerError(Exception):
    pass


class _Process:
    """A worker's process, and the conversation with it."""

    def __init__(self, contestant: Contestant, case: dict[str, Any]):
        self.result = Result(contestant.name, contestant.is_peer)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", contestant.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | contestant.environment,
        )
        self.ask(case | contestant.case)
        self.result.first_step_seconds = time.perf_counter() - start

    def ask(self, request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            # Its last words may come after it has closed its output.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            self._log.seek(0)
            lines = self._log.read().strip().splitlines() or ["it ended without a word"]
            self.close()
            raise _WorkerError(lines[-1][:300])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def contest(
    contestants: list[Contestant], case: dict[str, Any], rounds: int, seconds: float
) -> list[Result]:
    """Runs a case with all contestants, in turns.

    Args:
        contestants: who takes part; one that fails leaves the others alone.
        case: what to run, like `{"kind": "train", "batch_size": 32, "dtype": "float32"}`.
        rounds: turns of each.
        seconds: length of a turn, about.

    Returns:
        A result for each contestant.
    """
    results, processes, steps = [], [], []
    try:
        for contestant in contestants:
            try:
                process = _Process(contestant, case)
                steps.append(_steps_in(process, seconds))
                processes.append(process)
                results.append(process.result)
            except _WorkerError as error:
                results.append(Result(contestant.name, contestant.is_peer, error=str(error)))
        for _ in range(rounds):
            for process, number in zip(processes, steps, strict=True):
                time.sleep(_PAUSE_SECONDS)
                process.result.seconds.append(process.ask(number)["seconds"] / number)
        for process in processes:
            process.result.facts = process.ask("facts")
    except _WorkerError as error:
        raise RuntimeError(f"a contestant failed in the middle: {error}") from error
    finally:
        for process in processes:
            process.close()
    return results


def _steps_in(process: _Process, seconds: float) -> int:
    """How many steps take about so long; finding out warms everything up."""
    number = 1
    while True:
        taken = process.ask(number)["seconds"]
        if taken > seconds / 4 or number >= 100_000:
            return max(1, round(number * seconds / max(taken, 1e-9)))
        number = max(number + 1, min(10 * number, round(number * seconds / max(taken, 1e-9) / 2)))


def ratios(ours: Result, peer: Result) -> list[float]:
    """How many times as fast ours was, round by round."""
    return [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
