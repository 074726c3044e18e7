"""A contestant's process: it prepares one case, then runs it as often as it is told to.

Requests and answers are lines of JSON on standard input and output.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A case that can be run.

    Attributes:
        run: takes a number of steps, and returns when they are done, with the seconds they took.
        facts: what else there is to know, asked for at the end, like the memory it took.
    """

    run: Callable[[int], float]
    facts: Callable[[], dict[str, Any]]


def serve(prepare: Callable[[dict[str, Any]], Prepared]) -> None:
    """Answers until the input ends. The first line is the case, each later one a number of steps.

    Args:
        prepare: makes a case, like `{"kind": "train", "batch_size": 32}`, ready to run.
    """
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Else it might be written at the exit only, after the error.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    prepared = prepare(json.loads(sys.stdin.readline()))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if request == "facts":
            # Linux counts in KiB, and other processes that this one waited for apart.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer({"peak_host_bytes": peak} | prepared.facts())
        else:
            answer({"seconds": prepared.run(request)})
