"""The process's memory."""

import contextlib
import ctypes


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library (glibc) keeps it.

    Compiling a program leaves tens of MiB of it, and so do large arrays that many threads allocate.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
