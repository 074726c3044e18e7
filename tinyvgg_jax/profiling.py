"""A trace of a few steps, for XProf or Perfetto."""

import logging
from pathlib import Path

import jax
from jax import Array

logger = logging.getLogger(__name__)


class Profile:
    """A trace of a few of a run's calls, when the first have compiled and warmed up everything."""

    _FIRST, _CALLS = 3, 3

    def __init__(self, folder: Path | None):
        """Args: the folder that receives the trace; None for none."""
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
