"""The process of a contestant: it prepares one case, then runs it on request.

Requests and answers are lines of JSON on standard input and output.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A case that is ready to run.

    Attributes:
        run: runs a number of steps to their end and returns the time they took, in seconds.
        facts: reports device and memory; called once, at the end.
    """

    run: Callable[[int], float]
    facts: Callable[[], dict[str, Any]]


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
            # Linux reports KiB. RUSAGE_SELF leaves out child processes, such as the C compiler.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer({"peak_host_bytes": peak} | prepared.facts())
        else:
            answer({"seconds": prepared.run(request)})
