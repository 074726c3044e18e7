"""Comparison of runs: accuracy with its interval, size, training time, and significance."""

import logging
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tinyvgg_jax.data import Split
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path, status_of
from tinyvgg_jax.report.evaluation import (
    CheckpointEvaluation,
    DataFolders,
    check_split,
    evaluate_each_seed,
)
from tinyvgg_jax.report.plots import drawable, png
from tinyvgg_jax.report.scores import McNemar, accuracy_interval, mcnemar
from tinyvgg_jax.report.tables import columns, percentage
from tinyvgg_jax.runs import seeds
from tinyvgg_jax.runs.files import output_file, write_bytes, write_json
from tinyvgg_jax.runs.folder import read_summary

logger = logging.getLogger(__name__)

_AS_IN_CONFIGS = DataFolders()
# The table has a line for each pair of runs up to this many runs; beyond, each is compared with the
# best one, because nobody would read all pairs.
_MAX_RUNS_FOR_ALL_PAIRS = 3


class ComparedRun(NamedTuple):
    """Result of a run on a split; the run may have several seeds.

    Attributes:
        name: the run's folder.
        step: number of optimizer steps of the checkpoint.
        accuracy: a fraction; the mean over the seeds.
        std: standard deviation over the seeds, a fraction; None for a single seed.
        interval: lower and upper bound of the 95 % confidence interval, as fractions. For a single
            seed it is Wilson's, which covers the choice of test images; for several seeds it is
            that of `seeds.statistics_of`, which covers the choice of seeds; for two seeds None.
        parameters: number of parameters of the network.
        seconds: training time; None if the run is not finished.
        accuracies: accuracy of each seed, as fractions.
        correct: `[N]` bool, whether the first seed predicts each example correctly.
    """

    name: str
    step: int
    accuracy: float
    std: float | None
    interval: tuple[float, float] | None
    parameters: int
    seconds: float | None
    accuracies: list[float]
    correct: np.ndarray


class Welch(NamedTuple):
    """Welch's t-test (1947) of two recipes with several seeds each.

    With n_1 and n_2 seeds, mean accuracies m_1 and m_2 and sample standard deviations s_1 and s_2,

        t = (m_1 - m_2) / sqrt(s_1**2 / n_1 + s_2**2 / n_2)

    Unlike Student's t-test, it does not assume that both recipes vary equally between seeds.

    Attributes:
        interval: lower and upper bound of the 95 % confidence interval of the difference of the
            mean accuracies, as fractions. What would leave [-1, 1], where every difference lies, is
            cut off, which makes the interval no less likely to hold the difference. None if a
            recipe has two seeds only, as in `seeds.statistics_of`, or no recipe varies.
        p_value: probability of a difference at least this large if both are equally good.
    """

    interval: tuple[float, float] | None
    p_value: float


class Comparison(NamedTuple):
    """Comparison of runs on the same examples.

    Attributes:
        split: the split's name.
        runs: the results, in the order in which the runs were named.
        tests: the test of each pair of runs (i, j) with i < j: McNemar's if both have a single
            seed, Welch's if both have several; None if one has several, or if the accuracies
            differ between the runs and not at all between seeds.
    """

    split: str
    runs: list[ComparedRun]
    tests: dict[tuple[int, int], McNemar | Welch | None]


def compare_runs(
    workdirs: Sequence[str | Path],
    split: str = "test",
    step: int | str = "latest",
    folders: DataFolders = _AS_IN_CONFIGS,
) -> Comparison:
    """Evaluates runs on the same examples and tests each pair for a significant difference.

    Args:
        workdirs: folders of two runs or more. Among them may be files, folders without a run, and
            runs without a checkpoint, as in `runs/*`; they are left out, which is logged.
        split: "train", "validation" or "test".
        step: as in `restore`.
        folders: folders of the data that replace those of the runs' configs.

    Returns:
        The comparison.

    Raises:
        UserError: if there are fewer than two runs, one cannot be evaluated, or their splits
            differ.
    """
    check_split(split)
    found = _runs_among(workdirs)
    runs: list[ComparedRun] = []
    first: Split | None = None
    for workdir in found:
        evaluated = evaluate_each_seed(workdir, split, step, folders)
        first = first or evaluated[0].data
        if not _same(first, evaluated[0].data):
            raise UserError(f"{found[0]} and {workdir} have different {split} splits.")
        runs.append(_result(workdir, evaluated))
    pairs = combinations(range(len(runs)), 2)
    return Comparison(split, runs, {(i, j): _test(runs[i], runs[j]) for i, j in pairs})


def _runs_among(workdirs: Sequence[str | Path]) -> list[str | Path]:
    """Leaves out what is no run with a checkpoint, and logs it; a missing path is an error."""
    found: list[str | Path] = []
    others: dict[str, list[str]] = {}
    for workdir in workdirs:
        path = local_path(workdir)
        if status_of(path) is None:
            raise UserError(f"there is no folder {workdir}.")
        try:
            if _is_run_with_checkpoint(path):
                found.append(workdir)
            else:
                others.setdefault("hold no run, or no checkpoint yet", []).append(str(workdir))
        except UserError:
            others.setdefault("cannot be read", []).append(str(workdir))
    left_out = [(reason, ", ".join(names)) for reason, names in others.items()]
    if len(found) < 2:
        reasons = "".join(f"; these {reason}: {names}" for reason, names in left_out)
        raise UserError(f"--mode compare needs the folders of two runs or more{reasons}.")
    for reason, names in left_out:
        logger.warning("Left out, because they %s: %s", reason, names)
    return found


def _is_run_with_checkpoint(path: Path) -> bool:
    # Runs of several seeds have their checkpoints in the folders of the seeds.
    checkpoints = [path / "checkpoints", *path.glob("seed_*/checkpoints")]
    is_run = status_of(path / "config.json") is not None
    return is_run and any(any(c.glob("[0-9]*")) for c in checkpoints)


def _same(first: Split, second: Split) -> bool:
    return np.array_equal(first.labels, second.labels) and np.array_equal(
        first.images, second.images
    )


def _result(workdir: str | Path, evaluated: list[CheckpointEvaluation]) -> ComparedRun:
    """Summarises the evaluations of a run's seeds."""
    summary = read_summary(local_path(workdir))
    result = evaluated[0].result
    accuracies = [one.result.accuracy for one in evaluated]
    statistics = seeds.statistics_of(accuracies)
    interval = statistics["interval"]
    if len(evaluated) == 1:
        interval = accuracy_interval(result.correct, result.count)
    return ComparedRun(
        str(workdir),
        evaluated[0].step,
        statistics["mean"],
        statistics["std"],
        interval and (interval[0], interval[1]),
        evaluated[0].parameters,
        None if summary is None else summary["seconds"],
        accuracies,
        result.predicted == evaluated[0].data.labels,
    )


def _test(first: ComparedRun, second: ComparedRun) -> McNemar | Welch | None:
    """Chooses and runs the test of a pair, as `Comparison` describes."""
    a, b = first.accuracies, second.accuracies
    if len(a) == len(b) == 1:
        return mcnemar(first.correct, second.correct)
    if min(len(a), len(b)) == 1:
        return None
    if first.std == second.std == 0:
        # SciPy's t would be 0 / 0 or infinite.
        return Welch(None, 1.0) if first.accuracy == second.accuracy else None
    from scipy import stats

    with warnings.catch_warnings():
        # SciPy warns of lost digits where all values of a run are equal, and none are lost.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_ind(a, b, equal_var=False)
    if min(len(a), len(b)) == 2:
        return Welch(None, float(found.pvalue))
    interval = found.confidence_interval(0.95)
    bounds = (max(-1.0, float(interval.low)), min(1.0, float(interval.high)))
    return Welch(bounds, float(found.pvalue))


def comparison_table(comparison: Comparison) -> str:
    """Formats a comparison for the terminal: a row for each run, then a line for each test."""
    runs = comparison.runs
    several = any(len(run.accuracies) > 1 for run in runs)
    head = ["", "run", f"{comparison.split} accuracy", *(["seeds", "std"] if several else [])]
    rows = [[*head, "95 % interval", "parameters", "time"]]
    for index, run in enumerate(runs, start=1):
        row = [f"{index}", run.name, percentage(run.accuracy)]
        if several:
            row += [f"{len(run.accuracies)}", "-" if run.std is None else f"{run.std:.2%}"]
        interval = "-" if run.interval is None else "-".join(map(percentage, run.interval))
        seconds = "-" if run.seconds is None else f"{run.seconds:,.0f} s"
        rows.append([*row, interval, f"{run.parameters:,}", seconds])
    lines = [*columns(rows, left=(1,)), ""]
    best = max(range(len(runs)), key=lambda index: runs[index].accuracy)
    for (i, j), test in comparison.tests.items():
        if len(runs) <= _MAX_RUNS_FOR_ALL_PAIRS or best in (i, j):
            lines.append(f"{i + 1} and {j + 1}: {_test_line(runs[i], runs[j], test)}")
    if any(len(run.accuracies) == 1 for run in runs):
        lines.append(
            "The interval of a single seed covers the choice of images only, and McNemar's test\n"
            "compares two networks, not two recipes. To compare recipes, train several seeds."
        )
    if any(len(run.accuracies) == 2 for run in runs):
        lines.append("Two seeds give no useful interval; train three or more.")
    return "\n".join(lines)


def _test_line(first: ComparedRun, second: ComparedRun, test: McNemar | Welch | None) -> str:
    """Describes the difference of two accuracies and its test."""
    gap = f"{100 * (first.accuracy - second.accuracy):+.2f} points"
    if test is None:
        if min(len(first.accuracies), len(second.accuracies)) == 1:
            return f"{gap}; no test of several seeds against a single one"
        return f"{gap}; no test, since neither accuracy varies between seeds"
    found = "significant" if test.p_value < 0.05 else "not significant"
    if isinstance(test, Welch):
        if test.interval:
            gap += " (95 % interval {:+.2f} to {:+.2f})".format(*(100 * x for x in test.interval))
        return f"{gap}, {found} (Welch's t-test, p = {test.p_value:.2g})"
    return (
        f"{gap}, {found} (McNemar's test, p = {test.p_value:.2g}; predicted correctly by the "
        f"first only: {test.only_first}, by the second only: {test.only_second})"
    )


# A dollar sign in a name does not begin a formula.
@matplotlib.rc_context({"text.parse_math": False})
def draw_comparison(comparison: Comparison) -> Figure:
    """Draws the accuracy of each run with its confidence interval, and of each of several seeds."""
    runs = comparison.runs
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(runs)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows = range(len(runs))
    for row, run in enumerate(runs):
        if run.interval:
            bounds = [100 * bound for bound in run.interval]
            axes.plot(bounds, [row, row], color="#b5451c", linewidth=2, solid_capstyle="round")
        if len(run.accuracies) > 1:
            seeds = [100 * accuracy for accuracy in run.accuracies]
            axes.plot(seeds, [row] * len(seeds), "|", color="#22201d", markersize=9, zorder=3)
        axes.plot([100 * run.accuracy], [row], "o", color="#b5451c")
        axes.annotate(
            percentage(run.accuracy),
            (100 * run.accuracy, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(rows, [_axis_label(run) for run in runs])
    axes.set(ylim=(len(runs) - 0.5, -0.7))
    axes.set_xlabel(
        f"Accuracy on the {comparison.split} split (%), with 95 % confidence interval"
        + ("; strokes: seeds" if any(len(run.accuracies) > 1 for run in runs) else "")
    )
    axes.grid(axis="x", color="#e4e0da")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def _axis_label(run: ComparedRun, longest: int = 32) -> str:
    """Names a run and its size in two lines; a long name loses its beginning."""
    name = run.name if len(run.name) <= longest else "..." + run.name[-longest + 3 :]
    seeds = f", {len(run.accuracies)} seeds" if len(run.accuracies) > 1 else ""
    return f"{drawable(name)}\n{run.parameters:,} parameters{seeds}"


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Writes a comparison as a plot, and its numbers as JSON.

    Args:
        comparison: the comparison.
        path: the PNG to write; `PATH.json` beside it receives the numbers.

    Returns:
        The path of the PNG.

    Raises:
        UserError: if the files cannot be written.
    """
    path = output_file(path)
    content: dict[str, Any] = {
        "split": comparison.split,
        "runs": [
            {key: value for key, value in run._asdict().items() if key != "correct"}
            for run in comparison.runs
        ],
        "tests": [
            {"first": comparison.runs[i].name, "second": comparison.runs[j].name, **test._asdict()}
            for (i, j), test in comparison.tests.items()
            if test is not None
        ],
    }
    write_bytes(path, png(draw_comparison(comparison), dpi=120))
    write_json(path.with_name(f"{path.name}.json"), content)
    return path
