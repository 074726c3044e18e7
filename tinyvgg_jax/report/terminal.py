"""Text on the terminal: whatever a file or a folder is named, it cannot steer the terminal."""

import logging


def printable(text: str) -> str:
    """Escapes the characters of a text that cannot be printed, line breaks included.

    A run's folder, its class names and the names of files may come from a stranger. Sequences of
    control characters move the cursor, change the window's title, or hide what follows.

    Args:
        text: any text; it may hold bytes that are no text, as Python keeps them in file names.

    Returns:
        The text, with `\\x1b` for an escape character, and so on.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def lines(text: str) -> str:
    """Escapes each line of a text by `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(message: object) -> str:
    """Formats a message as one line: spaces for white space, other characters by `printable`."""
    return printable(" ".join(str(message).split()))


class Formatter(logging.Formatter):
    """Formatter of log messages that makes one line of each and escapes what cannot be printed."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record as the base class does, and escapes it by `printable`."""
        return printable(super().format(record))
