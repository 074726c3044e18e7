"""Signals that ask a run to stop."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list; a second signal acts as it would have without us.

    Outside of the main thread, where Python handles no signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Who started us in the background may have had Ctrl-C ignored; then it stays so.
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
