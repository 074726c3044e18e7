"""Exceptions that the command line reports in one line, without a traceback."""

import functools
import inspect
import logging
import sys
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct: a config field, a file, a folder. Exit status 2."""


class AgreedError(UserError):
    """A UserError that every process of a run raises, and the first one alone reports."""


class LostProcessError(Exception):
    """Another process of the run ended, or cannot be reached. Exit status 1."""


class DivergedError(RuntimeError):
    """The loss is no longer a finite number. Exit status 1.

    Attributes:
        step: number of optimizer steps taken when the loss diverged.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class InterruptedRunError(Exception):
    """A signal ended the work in an orderly way: a run is saved, and nothing is left half-written.

    Exit status 128 + signal.

    Attributes:
        signal_number: number of the signal.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; its class if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_leftover(unraisable: Any) -> bool:
    """Tells whether `sys.unraisablehook` was given a coroutine that Orbax has left behind.

    Orbax reads with coroutines. When one of them fails, others are never run to their end, and
    Python would print a traceback of each whenever it finds them.
    """
    if inspect.iscoroutine(unraisable.object):
        return "orbax" in Path(unraisable.object.cr_code.co_filename).parts
    return str(unraisable.exc_value) == "Event loop is closed"


@functools.cache
def hide_leftovers() -> None:
    """Hides the coroutines that Orbax leaves behind, from the first call to the process's end.

    They may still wait for a thread that reads, so nobody knows when Python will find them, and
    whether it will be as a coroutine that was never awaited or as a task that nobody asked.
    """

    def show(unraisable: Any) -> None:
        if not is_leftover(unraisable):
            show_before(unraisable)

    show_before, sys.unraisablehook = sys.unraisablehook, show
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
