"""Handling of the signals that ask a run to stop."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list while the context is open.

    Only the first signal is collected. It restores the earlier handlers, so that a second one ends
    a run that hangs. Outside the main thread Python allows no handlers, and the list stays empty.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell may have started the process in the background with SIGINT ignored; it stays ignored.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        received.append(number)
        restore()
        logger.info("Received %s; saving ...", signal.Signals(number).name)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
