"""Several runs side by side: how good, how large, how fast, and what is more than chance."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tinyvgg_jax.data import Split
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.report.evaluation import (
    CheckpointEvaluation,
    DataFolders,
    evaluate_checkpoint,
)
from tinyvgg_jax.report.scores import McNemar, accuracy_interval, mcnemar
from tinyvgg_jax.runs import seeds
from tinyvgg_jax.runs.restore import run_config

_OF_THE_CONFIGS = DataFolders()
# Up to so many runs the table has a line for each pair of them.
_EACH_PAIR = 3


class ComparedRun(NamedTuple):
    """A run on a split.

    Attributes:
        name: its folder.
        step: optimizer steps of the checkpoint.
        accuracy: a fraction; of several seeds their mean.
        interval: 95 %, two fractions: for other images of the same kind; of several seeds, for
            the mean over other seeds.
        parameters: number of the network's.
        seconds: of training, None where the run was not finished.
        accuracies: of each seed.
        right: `[N]` bool, whether the first seed has each example right.
    """

    name: str
    step: int
    accuracy: float
    interval: tuple[float, float]
    parameters: int
    seconds: float | None
    accuracies: list[float]
    right: np.ndarray


class Welch(NamedTuple):
    """Two recipes with several seeds each, by Welch's t-test.

    Attributes:
        interval: 95 %, of the difference of the mean accuracies, two fractions.
        p_value: how often chance alone makes a difference as large, if both are equally good.
    """

    interval: tuple[float, float]
    p_value: float


class Comparison(NamedTuple):
    """Runs on the same examples.

    Attributes:
        split: the split's name.
        runs: in the order asked for.
        tests: of each pair of their indices, the first being the smaller: McNemar's of two
            single seeds, Welch's of several seeds each, else None.
    """

    split: str
    runs: list[ComparedRun]
    tests: dict[tuple[int, int], McNemar | Welch | None]


def compare_runs(
    workdirs: Sequence[str | Path],
    split: str = "test",
    step: int | str = "latest",
    folders: DataFolders = _OF_THE_CONFIGS,
) -> Comparison:
    """Evaluates runs on the same examples and compares each with each.

    Args:
        workdirs: folders of two runs or more.
        split: "train", "validation" or "test".
        step: as in `restore`.
        folders: where the data lies, where that is not what the configs say.

    Returns:
        The comparison.

    Raises:
        UserError: if there are fewer than two runs, one cannot be evaluated, or their splits
            differ.
    """
    if len(workdirs) < 2:
        raise UserError("--mode compare needs the folders of two runs or more.")
    runs: list[ComparedRun] = []
    first: Split | None = None
    for workdir in workdirs:
        folder = local_path(workdir)
        evaluated = [
            evaluate_checkpoint(one, split, step, folders)
            for one in seeds.folders(folder, run_config(folder))
        ]
        first = first or evaluated[0].data
        if not _same(first, evaluated[0].data):
            raise UserError(f"{workdirs[0]} and {workdir} have different {split} splits.")
        runs.append(_compared(workdir, evaluated))
    pairs = combinations(range(len(runs)), 2)
    return Comparison(split, runs, {(i, j): _test(runs[i], runs[j]) for i, j in pairs})


def _same(ours: Split, theirs: Split) -> bool:
    return np.array_equal(ours.labels, theirs.labels) and np.array_equal(ours.images, theirs.images)


def _compared(workdir: str | Path, evaluated: list[CheckpointEvaluation]) -> ComparedRun:
    result = evaluated[0].result
    accuracies = [one.result.accuracy for one in evaluated]
    statistics = seeds.statistics_of(accuracies)
    interval = statistics["interval"] or accuracy_interval(result.correct, result.count)
    return ComparedRun(
        str(workdir),
        evaluated[0].step,
        statistics["mean"],
        (interval[0], interval[1]),
        evaluated[0].parameters,
        _seconds(local_path(workdir)),
        accuracies,
        result.predicted == evaluated[0].data.labels,
    )


def _test(first: ComparedRun, second: ComparedRun) -> McNemar | Welch | None:
    a, b = first.accuracies, second.accuracies
    if len(a) == len(b) == 1:
        return mcnemar(first.right, second.right)
    if min(len(a), len(b)) == 1:
        return None
    from scipy import stats

    found = stats.ttest_ind(a, b, equal_var=False)
    interval = found.confidence_interval(0.95)
    return Welch((float(interval.low), float(interval.high)), float(found.pvalue))


def _seconds(workdir: Path) -> float | None:
    try:
        return float(json.loads((workdir / "summary.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def comparison_table(comparison: Comparison) -> str:
    """What was found, for a terminal."""
    runs = comparison.runs
    width = max(len("run"), *(len(run.name) for run in runs))
    lines = [
        f"    {'run':<{width}}  {comparison.split:>10}  {'95 % interval':>15}  {'parameters':>10}"
        f"  {'time':>8}"
    ]
    for index, run in enumerate(runs, start=1):
        low, high = run.interval
        seconds = "-" if run.seconds is None else f"{run.seconds:,.0f} s"
        lines.append(
            f"{index:>2}  {run.name:<{width}}  {run.accuracy:>10.2%}  {low:>7.2%}-{high:.2%}  "
            f"{run.parameters:>10,}  {seconds:>8}"
        )
    lines.append("")
    best = max(range(len(runs)), key=lambda index: runs[index].accuracy)
    for (i, j), test in comparison.tests.items():
        # Of many runs not each pair, which nobody would read: each beside the best one.
        if len(runs) <= _EACH_PAIR or best in (i, j):
            lines.append(f"{i + 1} and {j + 1}: {_verdict(runs[i], runs[j], test)}")
    if any(len(run.accuracies) == 1 for run in runs):
        lines.append(
            "A single seed's interval is for other images of the same kind, McNemar's test for "
            "these; another seed of the same recipe varies too."
        )
    return "\n".join(lines)


def _verdict(first: ComparedRun, second: ComparedRun, test: McNemar | Welch | None) -> str:
    gap = f"{100 * (first.accuracy - second.accuracy):+.2f} points"
    if test is None:
        return f"{gap}; no test of several seeds beside a single one"
    found = "more than chance" if test.p_value < 0.05 else "may be chance"
    if isinstance(test, Welch):
        low, high = (f"{100 * bound:+.2f}" for bound in test.interval)
        return f"{gap} (95 % interval {low} to {high}), {found} (Welch's t, p = {test.p_value:.2g})"
    return (
        f"{gap}, {found} (p = {test.p_value:.2g}; {test.only_first} images only the "
        f"first has right, {test.only_second} only the second)"
    )


def draw_comparison(comparison: Comparison) -> Figure:
    """One plot: the runs' accuracies with their intervals."""
    runs = comparison.runs
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(runs)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows = range(len(runs))
    for row, run in enumerate(runs):
        low, high = (100 * bound for bound in run.interval)
        axes.plot([low, high], [row, row], color="#b5451c", linewidth=2, solid_capstyle="round")
        axes.plot([100 * run.accuracy], [row], "o", color="#b5451c")
        axes.annotate(
            f"{run.accuracy:.2%}",
            (100 * run.accuracy, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(rows, [_short(run) for run in runs])
    axes.set(ylim=(len(runs) - 0.5, -0.7))
    axes.set_xlabel(f"{comparison.split} accuracy in %, with its 95 % interval")
    axes.grid(axis="x", color="#e4e0da")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def _short(run: ComparedRun, longest: int = 32) -> str:
    name = run.name if len(run.name) <= longest else "..." + run.name[-longest + 3 :]
    seeds = f", {len(run.accuracies)} seeds" if len(run.accuracies) > 1 else ""
    return f"{name}\n{run.parameters:,} parameters{seeds}"


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Writes the plot as a PNG and, into `PATH.json` beside it, the figures.

    Raises:
        UserError: if that cannot be written.
    """
    path = local_path(path)
    content: dict[str, Any] = {
        "split": comparison.split,
        "runs": [
            {key: value for key, value in run._asdict().items() if key != "right"}
            for run in comparison.runs
        ],
        "tests": [
            {"first": comparison.runs[i].name, "second": comparison.runs[j].name, **test._asdict()}
            for (i, j), test in comparison.tests.items()
            if test is not None
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_comparison(comparison).savefig(path, format="png", dpi=120)
        path.with_name(f"{path.name}.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
    return path
