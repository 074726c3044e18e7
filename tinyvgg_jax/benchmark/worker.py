"""The process of a contestant: it prepares one case, then runs it on request.

Requests and answers are lines of JSON on standard input and output.
"""

import contextlib
import json
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A case that is ready to run.

    Attributes:
        run: runs a number of steps to their end and returns the time they took, in seconds.
        facts: reports device and memory; called after each run.
    """

    run: Callable[[int], float]
    facts: Callable[[], dict[str, Any]]


def peak_host_bytes() -> int:
    """Returns the highest memory of this process so far, without that of its child processes."""
    with contextlib.suppress(OSError):
        # The process that started this one has left its own peak in what `getrusage` reports.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return 1024 * int(found[1])
    # Here Linux reports KiB, too, and macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(prepare: Callable[[dict[str, Any]], Prepared]) -> None:
    """Answers requests until the input ends.

    The first request is the case; each later one is a number of steps to run, or "facts".

    Args:
        prepare: prepares a case, like `{"kind": "train", "batch_size": 32}`.
    """
    # Output of libraries goes to standard error, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Without this, buffered output would come at the exit, after the error message.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    prepared = prepare(json.loads(sys.stdin.readline()))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if request == "facts":
            answer({"peak_host_bytes": peak_host_bytes()} | prepared.facts())
        else:
            answer({"seconds": prepared.run(request)})
