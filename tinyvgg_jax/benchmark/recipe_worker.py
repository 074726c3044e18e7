"""The worker of whole training runs, which trains recipes of `configs/` as the command line does.

A case has the fields `recipe`, a recipe's name; `fields`, the values of config fields that differ
from it; `num_seeds`, which train in one call of `train_and_evaluate`; and `target`, an accuracy on
validation. A step is such a call, with the next seeds each time.
"""

import itertools
import logging
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax.benchmark.jax_worker import device_facts
from tinyvgg_jax.benchmark.parts import recipe_config
from tinyvgg_jax.benchmark.worker import Prepared, serve
from tinyvgg_jax.report.evaluation import evaluate_checkpoint
from tinyvgg_jax.runs.files import read_json
from tinyvgg_jax.runs.seeds import folders
from tinyvgg_jax.system import enable_compilation_cache
from tinyvgg_jax.train import train_and_evaluate


class EpochEnds(logging.Handler):
    """Notes when epochs end, by the line that training logs after each."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Notes the time of a line about a finished epoch."""
        if re.search(r"epoch \d+/\d+: ", record.getMessage()):
            self.times.append(time.perf_counter())


def prepare(case: dict[str, Any]) -> Prepared:
    """Prepares the runs of a recipe."""
    runs: list[dict[str, Any]] = []
    ends = EpochEnds()
    logger = logging.getLogger("tinyvgg_jax.train")
    logger.setLevel(logging.INFO)
    logger.addHandler(ends)

    def run(calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            fields = case["fields"] | {"seed": len(runs), "num_seeds": case["num_seeds"]}
            config = recipe_config(case["recipe"], fields)
            with tempfile.TemporaryDirectory() as folder:
                ends.times.clear()
                start = time.perf_counter()
                train_and_evaluate(config, folder)
                seconds = time.perf_counter() - start
                times = [end - start for end in ends.times]
                runs.extend(records(Path(folder), config, times, seconds, case["target"]))
            total += seconds
        return total

    return Prepared(run, lambda: device_facts() | {"runs": runs})


def records(
    workdir: Path, config: ConfigDict, times: list[float], seconds: float, target: float
) -> list[dict[str, Any]]:
    """Makes a record of each seed of a finished run.

    Args:
        workdir: the run's folder.
        config: its config.
        times: the ends of the epochs, in seconds from the start; those of several seeds follow one
            another, unless the seeds trained together.
        seconds: duration of the run.
        target: accuracy on validation, a fraction.

    Returns:
        For each seed `seed`, the accuracies of the last parameters, `best_test_accuracy`, the one
        on the test split of the checkpoint that is best on validation; `steps_seconds`, the time of
        the training steps; `run_seconds`, the duration of the call that trained it; and
        `target_epoch`, `target_seconds` and `target_seconds_compiled`, None if it was not reached.
    """
    found = []
    together = len(times) == config.num_epochs
    for i, folder in enumerate(folders(workdir, config)):
        summary = read_json(folder / "summary.json")
        assert summary is not None
        first = 0 if together else i * config.num_epochs
        start = times[first - 1] if first else 0.0
        own = [end - start for end in times[first : first + config.num_epochs]]
        best = evaluate_checkpoint(folder, "test", "best")
        # If any epoch reaches the target, the best one does, and its history ends with it.
        accuracies = [epoch["validation_accuracy"] for epoch in best.history]
        found.append(
            {name: value for name, value in summary.items() if name.endswith("_accuracy")}
            | {
                "seed": config.seed + i,
                "best_test_accuracy": best.result.accuracy,
                "steps_seconds": summary["seconds"],
                "run_seconds": seconds,
            }
            | time_to_target(accuracies, own, target)
        )
    return found


def time_to_target(accuracies: list[float], ends: list[float], target: float) -> dict[str, Any]:
    """Finds the time to the first epoch whose accuracy on validation is at least a target.

    The time runs from the call of `train_and_evaluate` to the end of that epoch, so it includes
    loading the data, compilation, training, validation and saving. Without compilation, the first
    epoch, in which everything is loaded and compiled, counts as long as the median of the others.

    Args:
        accuracies: the accuracy on validation after each epoch, as fractions.
        ends: the end of each epoch, in seconds from the start.
        target: the accuracy to reach, a fraction.

    Returns:
        `target_epoch`, counted from 1, `target_seconds` and `target_seconds_compiled`, that time
        without compilation; None where the target was not reached, or a single epoch tells nothing.
    """
    epoch = next((i for i, accuracy in enumerate(accuracies) if accuracy >= target), None)
    found: dict[str, Any] = {"target_epoch": None, "target_seconds": None}
    found["target_seconds_compiled"] = None
    if epoch is None:
        return found
    found |= {"target_epoch": epoch + 1, "target_seconds": ends[epoch]}
    lengths = [later - earlier for earlier, later in itertools.pairwise(ends)]
    if lengths:
        found["target_seconds_compiled"] = ends[epoch] - ends[0] + statistics.median(lengths)
    return found


if __name__ == "__main__":
    enable_compilation_cache()
    serve(prepare)
