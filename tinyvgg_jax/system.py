"""The machine around a run: compiled programs, memory, device, profiler."""

import collections
import contextlib
import ctypes
import logging
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import jax
from jax import Array

from tinyvgg_jax import cache
from tinyvgg_jax.errors import UserError

logger = logging.getLogger(__name__)


class _VerifiedPrograms:
    """Compiled programs in the user's cache, in the place of JAX's own cache.

    JAX relies on the checksum of zlib, and never replaces a damaged program. Where zstd is
    installed, as in Python from 3.14 on, it uses that without any checksum: a flipped bit then ends
    the process or gives wrong numbers.
    """

    def __init__(self, folder: Path):
        self._path = folder  # JAX logs it.

    def get(self, key: str) -> bytes | None:
        return cache.read(f"{self._path.name}/{key}")

    def put(self, key: str, value: bytes) -> None:
        # Without a place to keep them, each process compiles for itself.
        with contextlib.suppress(OSError):
            cache.keep(f"{self._path.name}/{key}", lambda file: file.write(value))


def enable_compilation_cache() -> None:
    """Makes JAX keep compiled programs for the next process, unless the user has set a folder."""
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    root = cache.cache_dir()
    if root is None:
        return  # Each process compiles for itself then.
    folder = root / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    # By default JAX does not keep a program that compiles within a second. A run has several.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # XLA's own files beside it have no digest, and where one cannot be written, a GPU's compiler
    # ends the process.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX has no public way to replace its cache. A version without this name uses its own.
    with contextlib.suppress(ImportError):
        from jax._src import compilation_cache

        compilation_cache._cache = _VerifiedPrograms(folder)  # type: ignore[assignment]


def require_device() -> None:
    """Makes JAX look for its devices now, so that a missing one ends in one line.

    Otherwise JAX would look for them wherever the first array is made.

    Raises:
        UserError: if JAX finds no device of the platform that `JAX_PLATFORMS` asks for.
    """
    try:
        jax.devices()
    except Exception as error:
        # JAX raises an AssertionError for a platform that is not installed, among others.
        wanted = os.environ.get("JAX_PLATFORMS")
        advice = (
            f" of {wanted}, which JAX_PLATFORMS asks for. Leave it unset, or install the libraries "
            "of that platform, like tinyvgg-jax[cuda]"
        )
        raise UserError(
            f"JAX finds no device{advice if wanted else ''}. {str(error).strip()}"
        ) from error


def trim_heap() -> None:
    """Returns freed memory to the system, if the C library is glibc, which keeps it.

    Compiling a program leaves tens of MiB of it; so do large arrays that many threads allocate.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Returns the number of bytes that the system could give to processes now.

    A container's limit counts, too. Where the system tells only how much memory there is in all, it
    is that number.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(number) for number in re.findall(r"MemAvailable: +(\d+) kB", text)]
    return min([*found, *_container_limits()])


def _container_limits() -> Iterator[int]:
    """Yields the limits in bytes that this process's control groups set, of version 1 or 2."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, name = group.split(":", 2)
        if not controllers:
            root, file = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / name.lstrip("/")
        # A container sees its own group as the root, by another name than its host.
        for above in (folder, *folder.parents):
            # Without a limit there is no file, or no number in it.
            with contextlib.suppress(OSError, ValueError):
                yield int((above / file).read_text())


class MemoryBudget:
    """Memory that several threads share, so that together they take no more than a total."""

    def __init__(self, total: int):
        """Makes a budget that is free.

        Args:
            total: number of bytes.
        """
        self._total = self._free = total
        self._queue: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Takes memory while the context is open, after waiting until it is free.

        Threads are served in the order in which they came, so that a large piece is not passed for
        ever by small ones.

        Args:
            size: number of bytes. For more than the total, it waits until the whole budget is free.

        Raises:
            CancelledError: if the budget has been closed.
        """
        size, ticket = min(size, self._total), object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._closed or (self._queue[0] is ticket and self._free >= size)
                )
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
            if self._closed:
                raise CancelledError("the budget is closed")
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def close(self) -> None:
        """Gives out no more memory; whoever waits for some gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Profile:
    """Profiler for a few calls of a run, after the first calls, which compile and warm up."""

    _FIRST, _CALLS = 3, 3

    def __init__(self, folder: Path | None):
        """Prepares a trace, which begins in `after_call`.

        Args:
            folder: receives the trace for XProf or Perfetto; None for no trace.
        """
        self._folder, self._call = folder, 0

    def after_call(self, done: Array) -> None:
        """Starts or ends the trace when enough calls have been made.

        Args:
            done: an array that the latest call returned. It is waited for, so that the trace holds
                whole calls.
        """
        self._call += 1
        if self._folder and self._call == self._FIRST:
            done.block_until_ready()
            jax.profiler.start_trace(self._folder)
        elif self._folder and self._call == self._FIRST + self._CALLS:
            done.block_until_ready()
            self.close()

    def close(self) -> None:
        """Ends the trace, if it has started, and logs where it is."""
        if self._folder and self._call > self._FIRST:
            jax.profiler.stop_trace()
            logger.info("A trace for XProf or Perfetto is in %s.", self._folder)
        elif self._folder:
            if self._call == self._FIRST:
                jax.profiler.stop_trace()
            logger.warning("There is no trace: the run ended before it had warmed up.")
        self._folder = None
