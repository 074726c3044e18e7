"""Handling of Ctrl-C, and of the other signals that ask a run to stop."""

import _thread
import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from tinyvgg_jax.errors import InterruptedRunError

logger = logging.getLogger(__name__)

# Time for a library's callback to return, before Ctrl-C is raised again.
_AGAIN_SECONDS = 0.05
# The file, as Python names it, of the functions that import a module.
_IMPORT = "<frozen importlib._bootstrap>"


@contextlib.contextmanager
def ctrl_c(abandon: Callable[[], object]) -> Iterator[threading.Event]:
    """Makes Ctrl-C raise KeyboardInterrupt in the main thread, again and again until it is heard.

    Python raises it wherever the thread is at that moment. Within a library's callback that may be
    a place from which no exception gets out: Python prints "Exception ignored" and goes on. Other
    libraries turn it into an error of theirs. So whoever catches any exception asks the event
    whether Ctrl-C was its cause.

    Args:
        abandon: ends the process at once. It is called if a library is being imported, because some
            print a traceback then.

    Yields:
        An event that is set once Ctrl-C was pressed.
    """
    pressed = threading.Event()
    if (
        threading.current_thread() is not threading.main_thread()
        # A shell may have started the process in the background with SIGINT ignored.
        or signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):
        yield pressed
        return

    def handle(_: int, frame: FrameType | None) -> None:
        pressed.set()
        if any(f.f_code.co_filename == _IMPORT for f, _ in traceback.walk_stack(frame)):
            abandon()
        raise KeyboardInterrupt

    def show_unraisable(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            show_before(unraisable)

    before, show_before = signal.signal(signal.SIGINT, handle), sys.unraisablehook
    sys.unraisablehook = show_unraisable
    try:
        yield pressed
    finally:
        sys.unraisablehook = show_before
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised_signals(
    state: str, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Makes the first of some signals raise an InterruptedRunError while the context is open.

    Args:
        state: says in the error what there is then.
        numbers: the signals.
    """

    def interrupt(number: int) -> None:
        name = signal.Signals(number).name
        raise InterruptedRunError(f"interrupted by {name}; {state}", number)

    with _first_signal(interrupt, numbers):
        try:
            yield
        except InterruptedRunError as error:
            # It is raised anew, since a library on its way, like tfds, may have changed its words.
            interrupt(error.signal_number)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list while the context is open.

    Only the first signal is collected. Outside the main thread the list stays empty.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []

    def collect(number: int) -> None:
        received.append(number)
        logger.info("Received %s; saving ...", signal.Signals(number).name)

    with _first_signal(collect, (signal.SIGINT, signal.SIGTERM)):
        yield received


@contextlib.contextmanager
def _first_signal(act: Callable[[int], object], numbers: Sequence[int]) -> Iterator[None]:
    """Calls a function with the first of some signals while the context is open.

    That signal restores the earlier handlers, so that a second one ends a process that hangs.
    Outside the main thread Python allows no handlers, and nothing is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    # A shell may have started the process in the background with SIGINT ignored; it stays ignored.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        restore()
        act(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
