"""Progress of the reading and decoding of images, shown on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

# A small dataset is decoded before anyone wonders, and then no bar is shown.
_BAR_AFTER_SECONDS = 2.0
# Without a terminal, a log file gets a line this often.
_LINE_SECONDS = 60.0


def has_terminal() -> bool:
    """Tells whether standard error is a terminal; it may also have been closed at the start."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(line: str) -> None:
    """Prints a line on standard error, if it can be printed: a full disk must end no run."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(size: int, title: str) -> Iterator[Callable[[int], None]]:
    """Shows on standard error how much is done: a bar on a terminal, a line a minute elsewhere.

    Args:
        size: number of images.
        title: names what is done.

    Yields:
        A function that is to be called with a number of images that have just been done.
    """
    start = last_line = time.monotonic()
    on_terminal, done = has_terminal(), 0

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        bar.update(count)
        now = time.monotonic()
        if not on_terminal and now - last_line >= _LINE_SECONDS:
            last_line = now
            left = (now - start) * (size - done) / done
            line = f"{title}: {done:,}/{size:,} images, {left:.0f} s left"
            say(line)

    with tqdm(
        desc=title,
        total=size,
        unit=" images",
        unit_scale=True,
        delay=_BAR_AFTER_SECONDS,
        disable=not on_terminal,
        leave=False,
    ) as bar:
        yield advance
