"""The parts of the report: contests beside the peer, and whole training runs of the recipes."""

import importlib
import re
import statistics
import tempfile
from collections.abc import Generator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tinyvgg_jax.benchmark import cases
from tinyvgg_jax.benchmark.cases import Case, Setting
from tinyvgg_jax.benchmark.contest import Contestant, Result, contest, running
from tinyvgg_jax.benchmark.results import conclusions, entry_of, peak_memory
from tinyvgg_jax.config import validated
from tinyvgg_jax.errors import UserError

_RECIPE_WORKER = "tinyvgg_jax.benchmark.recipe_worker"


class Size(NamedTuple):
    """How much a report measures.

    Attributes:
        examples: size of the train split in the epochs beside the peer.
        epochs: number of those epochs.
        rounds: number of turns of each contestant in the other contests.
        seconds: approximate length of such a turn.
        batch_sizes: batch sizes of training steps.
        inference_batch_sizes: batch sizes of inference.
        seeds: number of runs of each recipe.
        target: accuracy on validation to which the time is measured, a fraction.
        fields: config fields of all recipes that differ.
        setting: fields of `Setting` that differ.
    """

    examples: int = cases.EXAMPLES
    epochs: int = cases.EPOCHS
    rounds: int = 5
    seconds: float = 0.5
    batch_sizes: tuple[int, ...] = (32, 512, 4096)
    inference_batch_sizes: tuple[int, ...] = (1, 32, 256)
    seeds: int = 5
    target: float = 0.94
    fields: dict[str, Any] = {}  # noqa: RUF012
    setting: dict[str, Any] = {}  # noqa: RUF012


_TINY = {"widths": [4, 8], "convs_per_block": 1, "hidden": 8}
# Everything that the full report does, in seconds and without any meaning.
REHEARSAL = Size(
    examples=96,
    epochs=2,
    rounds=2,
    seconds=0.01,
    batch_sizes=(4,),
    inference_batch_sizes=(2,),
    seeds=2,
    target=0.01,
    fields={f"model.{name}": value for name, value in _TINY.items()}
    | {
        "num_epochs": 2,
        "batch_size": 20,
        "warmup_epochs": 0.5,
        "data.train_split": "train[:100]",
        "data.validation_split": "train[100:150]",
        "data.test_split": "test[:50]",
    },
    setting={"network": _TINY, "product_size": 64, "copy_bytes": 2**16},
)


class Progress(NamedTuple):
    """State of a part that is under way.

    Attributes:
        body: Markdown.
        left: what it has still to do, like "3 of 5 seeds"; empty at its end.
    """

    body: str
    left: str = ""


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        name: its name on the command line.
        title: its heading.
        steps: measures the part; ends with an exception if some of it failed.
    """

    name: str
    title: str
    steps: Generator[Progress]


def all_parts(size: Size, setting: Setting) -> list[Part]:
    """Lists the parts of the report, the most important first.

    Args:
        size: how much to measure.
        setting: the circumstances.
    """

    def recipe(name: str, at_once: bool = False) -> Part:
        way = "at once (`num_seeds`)" if at_once else "one after another"
        title = f"`{name}.py`, {size.seeds} seeds, {way}"
        steps = _recipe_steps(name, size, at_once)
        return Part(name + ("-at-once" if at_once else ""), title, steps)

    epochs = _contest_steps(cases.epoch(setting, size.examples), size, epochs=True)
    return [
        Part("epochs", f"{size.epochs} epochs of the recipe of `default.py`", epochs),
        recipe("default"),
        *(
            Part(f"train-{b}", f"Training steps, batch {b}", _contest_steps(case, size))
            for b in size.batch_sizes
            for case in [cases.train(setting, b)]
        ),
        recipe("fast"),
        recipe("fast", at_once=True),
        *(
            Part(f"infer-{b}", f"Inference, batch {b}", _contest_steps(case, size))
            for b in size.inference_batch_sizes
            for case in [cases.infer(setting, b)]
        ),
        recipe("best", at_once=True),
        recipe("best"),
    ]


def recipe_config(recipe: str, fields: dict[str, Any]) -> ConfigDict:
    """Makes the config of a recipe with some fields changed.

    Args:
        recipe: its name, like "default".
        fields: values by the names of `config.FIELDS`, like `{"data.name": "mnist"}`.

    Raises:
        UserError: if a value is not right.
    """
    config = importlib.import_module(f"tinyvgg_jax.configs.{recipe}").get_config()
    # A plain dictionary takes a value of any type, and `validated` names the one that is wrong.
    values = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    return validated(values)


def check_fields(size: Size) -> None:
    """Checks the config fields that are set, before anything is measured.

    Raises:
        UserError: if a value is not right.
    """
    for recipe in ("default", "fast", "best"):
        recipe_config(recipe, size.fields)


def chosen_parts(names: list[str] | None, parts: list[Part]) -> list[Part]:
    """Chooses parts by name; "train" stands for "train-32" and so on, None for all.

    Raises:
        UserError: if there is no part of a name.
    """
    if names is None:
        return parts
    chosen = []
    for name in names:
        found = [part for part in parts if part.name == name]
        found = found or [
            part for part in parts if re.fullmatch(rf"{re.escape(name)}-\d+", part.name)
        ]
        if not found:
            known = ", ".join(part.name for part in parts)
            raise UserError(f"unknown part {name!r}; one of {known}.")
        chosen += found
    return chosen


def _contest_steps(case: Case, size: Size, epochs: bool = False) -> Generator[Progress]:
    """Measures a case; with `epochs`, each turn is an epoch."""
    fields, contestants = case
    steps = size.examples // fields["batch_size"] if epochs else None
    rounds = size.epochs if epochs else size.rounds
    results = contest(contestants, fields, rounds, size.seconds, steps)
    entry = entry_of(fields, results)
    notes = "".join(f"- {line}\n" for line in conclusions(entry))
    yield Progress(f"{_contest_table(results, steps)}\n{notes}")
    failed = [result for result in results if result.error]
    if failed:
        names = ", ".join(result.name for result in failed)
        raise RuntimeError(f"{names}: {failed[0].error}")


def _contest_table(results: list[Result], epoch_steps: int | None) -> str:
    """Formats the results of a contest; with the steps of an epoch, by the epoch.

    A failed contestant has no row, since the part names it.
    """
    unit = "epoch, s" if epoch_steps else "step, ms"
    head = ["", "n", "images/s", unit, "peak memory, MiB", "first step, s"]
    if epoch_steps:
        head.insert(4, "all n epochs, s")
    rows = [head]
    for result in results:
        if not result.seconds:
            continue
        times = [one * (epoch_steps or 1e3) for one in result.seconds]
        has_images = result.case["kind"] not in ("matmul", "copy")
        rate = f"{result.case['batch_size'] / result.median:,.0f}" if has_images else ""
        row = [result.name, str(len(times)), rate, _spread(times, 3)]
        if epoch_steps:
            row.append(f"{sum(times):.4g}")
        memory = f"{peak_memory(result) / 2**20:,.0f}"
        rows.append([*row, memory, f"{result.first_step_seconds:.1f}"])
    return _markdown(rows)


def _recipe_steps(recipe: str, size: Size, at_once: bool) -> Generator[Progress]:
    """Trains the seeds of a recipe in a worker's process of its own."""
    case = {
        "recipe": recipe,
        "fields": size.fields,
        "num_seeds": size.seeds if at_once else 1,
        "target": size.target,
    }
    calls = 1 if at_once else size.seeds
    with tempfile.TemporaryDirectory() as folder:
        # The first run compiles, as on a new machine, and the others find its programs.
        fresh = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
            # A worker that is killed leaves its run's folder behind.
            "TMPDIR": folder,
        }
        yield from _runs(Contestant(recipe, _RECIPE_WORKER, case, fresh), calls, size.target)


def _runs(contestant: Contestant, calls: int, target: float) -> Generator[Progress]:
    """Runs a recipe's worker so many times."""
    at_once = contestant.case["num_seeds"] > 1
    with running(contestant, {}) as process:
        for done in range(1, calls + 1):
            process.ask(1)
            left = f"{calls - done} of {calls} seeds" if done < calls else ""
            runs = process.ask("facts")["runs"]
            yield Progress(_recipe_table(runs, target, at_once), left)


def _recipe_table(runs: list[dict[str, Any]], target: float, at_once: bool) -> str:
    """Formats the runs of a recipe: accuracies, and the times of a run and to the target.

    Args:
        runs: as from `recipe_worker.records`.
        target: accuracy on validation, a fraction.
        at_once: whether they trained in one call.
    """
    splits = ("train", "validation", "test", "best_test")
    accuracies = [_mean([run[f"{split}_accuracy"] for run in runs]) for split in splits]
    head = ["n", "train", "validation", "test", "test, epoch best on validation"]
    first, *later = (run["run_seconds"] for run in runs)
    steps = [run["steps_seconds"] for run in runs]
    if at_once:
        head += ["run of all, s", "its training steps, s"]
        times = [f"{first:.4g}", f"{sum(steps):.4g}"]
    else:
        head += ["first run, s", "later runs, s", "training steps of a run, s"]
        times = [f"{first:.4g}", _spread(later, 4), _spread(steps, 4)]
    table = _markdown([head, [str(len(runs)), *accuracies, *times]])
    return f"{table}\n- {_target_line(runs, target, at_once)}\n"


def _target_line(runs: list[dict[str, Any]], target: float, at_once: bool) -> str:
    """Says how long it took to reach the target."""
    goal = f"{target:.0%} on validation"
    reached = [run for run in runs if run["target_epoch"] is not None]
    if not reached:
        return f"{goal}: reached by none of {len(runs)} seeds"
    epochs = sorted(run["target_epoch"] for run in reached)
    parts = [f"reached by {len(reached)} of {len(runs)} seeds, after epoch {epochs[0]}"]
    if epochs[-1] != epochs[0]:
        parts[0] += f" to {epochs[-1]}"
    # One after another, the first seed alone has compiled.
    compiling = reached if at_once else [run for run in reached if run is runs[0]]
    for words, name, some in (
        ("with compilation in", "target_seconds", compiling),
        ("without compilation in", "target_seconds_compiled", reached),
    ):
        times = [run[name] for run in some if run[name] is not None]
        if times:
            parts.append(f"{words} {_spread(times, 4)} s (n = {len(times)})")
    test = _mean([run["test_accuracy"] for run in reached])
    return f"{goal}: {', '.join(parts)}; their accuracy on test, after the last epoch, is {test}"


def _mean(fractions: list[float]) -> str:
    """Formats the mean of fractions in percent, with their standard deviation."""
    mean = f"{statistics.fmean(fractions):.2%}"
    return f"{mean} ± {statistics.stdev(fractions):.2%}" if len(fractions) > 1 else mean


def _spread(values: list[float], digits: int) -> str:
    """Formats the median of values, with the lowest and the highest; nothing if there are none."""
    if not values:
        return ""
    middle, low, high = (
        f"{one:,.{digits}g}" for one in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def _markdown(rows: list[list[str]]) -> str:
    """Formats a table, whose first row is its head."""
    head, *others = ([cell.replace("|", "/") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
