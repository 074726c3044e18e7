"""The report: all measurements of a machine in one Markdown file, which grows part by part.

The file is replaced after each part, so that it holds what was measured whenever the program is
stopped; a part that fails is named, and the next begins.
"""

import datetime
import re
import time
from pathlib import Path
from typing import Any

from tinyvgg_jax.benchmark.parts import Part
from tinyvgg_jax.errors import InterruptedRunError, first_line
from tinyvgg_jax.runs.files import write_text

# An absolute path of at least two names, but not the rest of an address or of a fraction.
_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"`|]+/)+")


_UNDER_WAY = "under way"
_NO_TIME = "not begun: the time was over"
_EXPLANATION = (
    "Medians with the lowest and the highest of n turns; accuracies as mean ± standard deviation "
    "of n seeds. Contestants take turns, each in a process of its own; a ratio is the median of "
    "the ratios of the rounds. float32 products are TF32 on a GPU that has it. The first step ends "
    "so long after the start of its process, which finds what earlier ones have compiled; on a GPU "
    "this package's first call takes up to a hundred steps. Memory is the device's, or on a CPU "
    "the process's; on a GPU this package's includes what XLA tries while it compiles. A run is "
    "one call of `train_and_evaluate`: data, compilation, training, validation and saving after "
    "each epoch, evaluation of three splits; the first run of a part compiles, later ones find its "
    "programs. The time to an accuracy runs from that call to the end of the first epoch whose "
    "accuracy on validation reaches it; without compilation, the first epoch counts as long as the "
    "median of the others."
)


class Report:
    """A Markdown file that is replaced whenever a part has measured something."""

    def __init__(self, path: Path, head: str, parts: list[Part], budget_seconds: float):
        """Writes the file, with no part begun.

        Args:
            path: the file.
            head: Markdown before the parts, the circumstances.
            parts: the parts, in their order.
            budget_seconds: time from now after which no new part begins.

        Raises:
            UserError: if the file cannot be written.
        """
        self._path, self._head, self._parts = path, head, parts
        self._start, self._budget = time.monotonic(), budget_seconds
        self._bodies: dict[str, str] = {}
        self._states = {part.name: "not begun" for part in parts}
        self.failed: list[str] = []
        self.write()

    def measure(self) -> None:
        """Measures all parts while there is time.

        Raises:
            InterruptedRunError: after SIGINT or SIGTERM, when the file says so.
            UserError: if the file cannot be written.
        """
        try:
            for part in self._parts:
                self._run_part(part)
        except InterruptedRunError:
            # The signal may have come anywhere, also between two parts.
            for name, state in self._states.items():
                if state == _UNDER_WAY:
                    self._states[name] = "interrupted"
            self.write()
            raise
        self.write()

    def _run_part(self, part: Part) -> None:
        """Measures a part, unless the time is over, and says so on standard output."""
        if self._is_over():
            self._states[part.name] = _NO_TIME
            return
        self._states[part.name] = _UNDER_WAY
        self.write()
        print(f"{part.name}: {part.title} ...", flush=True)
        self._measure(part)
        print(f"{part.name}: {self._states[part.name]}", flush=True)

    def _is_over(self) -> bool:
        return time.monotonic() - self._start >= self._budget

    def _measure(self, part: Part) -> None:
        """Measures a part to its end, its failure, or the end of the time."""
        start = time.monotonic()
        while True:
            try:
                progress = next(part.steps)
            except StopIteration:
                self._states[part.name] = f"done in {time.monotonic() - start:.0f} s"
                return
            except InterruptedRunError:
                raise
            except Exception as error:
                # Anything may go wrong on a machine that nobody has tried, and the next part may
                # still succeed.
                self._states[part.name] = f"failed: {first_line(error)}"
                self.failed.append(part.name)
                return
            self._bodies[part.name] = progress.body
            self.write()
            if progress.left and self._is_over():
                part.steps.close()
                self._states[part.name] = f"stopped: the time was over, {progress.left} left"
                return

    def write(self) -> None:
        """Replaces the file."""
        seconds = time.monotonic() - self._start
        lines = [self._head, f"After {seconds / 60:.1f} minutes:\n"]
        lines += [f"- {part.name}: {self._states[part.name]}" for part in self._parts]
        for part in self._parts:
            if part.name in self._bodies:
                lines.append(f"\n## {part.title}\n\n{self._bodies[part.name].strip()}")
        # Messages of libraries, and the command, may name paths, which mean nothing elsewhere.
        write_text(self._path, _PATH.sub("", "\n".join(lines)) + "\n")


def circumstances(
    command: str, environment: dict[str, Any], is_rehearsal: bool, minutes: float
) -> str:
    """Formats the head of a report.

    Args:
        command: the command that makes it.
        environment: the machine and the versions, as in the JSON file.
        is_rehearsal: whether the figures have no meaning.
        minutes: the time after which no new part begins.
    """
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "# Benchmark report",
        "",
        f"- command: `{command}`",
        f"- begun: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"- device: {environment['device']} ({environment['runtime']})",
        f"- processor: {environment['description']}",
        f"- versions: Python {environment['python']}, {versions}",
        f"- after {minutes:g} minutes no new part begins, nor another seed of a recipe",
        "",
    ]
    if is_rehearsal:
        lines += ["**A rehearsal: a tiny network, few steps, figures without a meaning.**", ""]
    return "\n".join([*lines, _EXPLANATION, ""])
