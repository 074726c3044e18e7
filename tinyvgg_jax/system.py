"""The machine around a run: its cache folder, compiled programs, freed memory, device, profiler."""

import contextlib
import ctypes
import logging
import os
from pathlib import Path

import jax
from jax import Array

from tinyvgg_jax.errors import UserError

logger = logging.getLogger(__name__)


def cache_dir() -> Path | None:
    """Names the user's cache folder for this package (`$XDG_CACHE_HOME`, or `~/.cache`).

    None for a user without a home folder. The folder is not made, and nobody can rely on being
    allowed to make it: what is kept here must be optional.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The standard says to ignore a relative path, as an address like gs://... is one, too.
        return (root if root.is_absolute() else Path.home() / ".cache") / "tinyvgg_jax"
    except RuntimeError:
        return None


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs for the next process, unless it was told where already."""
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    root = cache_dir()
    if root is None:
        return  # Then each process compiles.
    try:
        (root / "compiled").mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(root / "compiled"))
    # By default, JAX does not keep what compiles within a second; a run has several of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def require_device() -> None:
    """Makes JAX find its devices, which it would do wherever the first array is made.

    Raises:
        UserError: if there is none.
    """
    try:
        jax.devices()
    except Exception as error:
        # A platform that is not installed is a failed assertion within JAX.
        wanted = os.environ.get("JAX_PLATFORMS", "any platform")
        raise UserError(
            f"JAX finds no device of {wanted}, as JAX_PLATFORMS asks. Leave it unset, or install "
            f"what belongs to that platform, like tinyvgg-jax[cuda]. {str(error).strip()}"
        ) from error


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library (glibc) keeps it.

    Compiling a program leaves tens of MiB of it, and so do large arrays that many threads allocate.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Profile:
    """A trace of a few calls of a run, taken after the first calls have compiled and warmed up."""

    _FIRST, _CALLS = 3, 3

    def __init__(self, folder: Path | None):
        """Args: the folder that receives the trace for XProf or Perfetto; None for no trace."""
        self._folder, self._call = folder, 0

    def after_call(self, done: Array) -> None:
        """Begins or ends the trace where it is time; `done` is there when the call has ended."""
        self._call += 1
        if self._folder and self._call == self._FIRST:
            done.block_until_ready()
            jax.profiler.start_trace(self._folder)
        elif self._folder and self._call == self._FIRST + self._CALLS:
            done.block_until_ready()
            self.close()

    def close(self) -> None:
        """Ends the trace."""
        if self._folder and self._call > self._FIRST:
            jax.profiler.stop_trace()
            logger.info("A trace for XProf or Perfetto is in %s.", self._folder)
        elif self._folder:
            if self._call == self._FIRST:
                jax.profiler.stop_trace()
            logger.warning("There is no trace: the run was over when it had warmed up.")
        self._folder = None
