"""The list of the runs below a folder. It reads their JSON files only, so that it is immediate."""

import contextlib
import datetime
import json
import logging
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import is_folder, local_path, open_regular
from tinyvgg_jax.report.tables import columns, percentage
from tinyvgg_jax.runs.files import read_json
from tinyvgg_jax.runs.folder import read_summary

logger = logging.getLogger(__name__)

# Folders within a run's folder that hold no runs, but many files.
_OF_A_RUN = {
    "checkpoints",
    "checkpoints.damaged",
    "tensorboard",
    "evaluation",
    "explain",
    "profile",
}


class ListedRun(NamedTuple):
    """A run, by what its JSON files say.

    Attributes:
        workdir: the run's folder.
        dataset: name of the tfds dataset.
        accuracy: accuracy on the split, a fraction; None before the first epoch's end. The mean if
            the run has several seeds.
        split: "test" if the run is finished, else "validation".
        epochs: number of finished epochs; None for several seeds, which are runs of their own.
        num_epochs: number of epochs of the whole run.
        parameters: number of parameters of the network; None if the run is not finished.
        num_seeds: number of seeds.
        changed: when the latest result was written, in seconds since 1970.
    """

    workdir: Path
    dataset: str
    accuracy: float | None
    split: str
    epochs: int | None
    num_epochs: int
    parameters: int | None
    num_seeds: int
    changed: float


def list_runs(folders: Sequence[str | Path]) -> list[ListedRun]:
    """Reads the runs below folders; one that cannot be read is logged, and left out.

    Args:
        folders: folders of runs, or of folders with runs.

    Returns:
        The runs, sorted by their paths.

    Raises:
        UserError: if a folder does not exist, is no folder, or cannot be reached.
    """
    found: dict[Path, ListedRun] = {}
    for folder in map(local_path, folders):
        if not is_folder(folder):
            raise UserError(f"there is no folder {folder}.")
        for workdir in _workdirs(folder):
            try:
                found[workdir] = _read(workdir)
            except UserError as error:
                logger.warning("%s", error)
    if not found:
        logger.warning("There is no run below %s.", ", ".join(map(str, folders)))
    return [found[workdir] for workdir in sorted(found)]


def _workdirs(folder: Path) -> Iterator[Path]:
    """Finds the folders below a folder that hold a config.json, the folder itself included."""

    def unreadable(error: OSError) -> None:
        logger.warning("%s cannot be read: %s", error.filename, error.strerror)

    seen = set()
    # Runs on another disk are often linked to; a link to a folder above would lead round for ever.
    for path, subfolders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        if "config.json" in files:
            subfolders[:] = [name for name in subfolders if name not in _OF_A_RUN]
            yield Path(path)


def _read(workdir: Path) -> ListedRun:
    """Reads a run's JSON files; raises a UserError if its config.json is not one of a run."""
    # The config is not validated, because the names of optimizers and the like come with JAX.
    path = workdir / "config.json"
    config = read_json(path) or {}
    try:
        num_epochs, dataset = operator.index(config["num_epochs"]), str(config["data"]["name"])
        num_seeds = operator.index(config.get("num_seeds", 1))
        changed = path.stat().st_mtime
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a run.") from error
    summary, last = read_summary(workdir), _last_epoch(workdir)
    with contextlib.suppress(OSError):
        changed = (workdir / ("summary.json" if summary else "metrics.jsonl")).stat().st_mtime
    return ListedRun(
        workdir,
        dataset,
        summary["test_accuracy"] if summary else last.get("validation_accuracy"),
        "test" if summary else "validation",
        last.get("epoch", 0) if num_seeds == 1 else None,
        num_epochs,
        summary["parameters"] if summary else None,
        num_seeds,
        changed,
    )


def _last_epoch(workdir: Path) -> dict[str, Any]:
    """Reads the last record of `metrics.jsonl`; empty if there is none, or it is damaged."""
    path = workdir / "metrics.jsonl"
    try:
        with open_regular(path) as file:
            record = json.loads(file.read().splitlines()[-1])
        return {
            "epoch": int(record["epoch"]),
            "validation_accuracy": float(record["validation_accuracy"]),
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        logger.warning("%s is damaged, so its epochs are not shown.", path)
    return {}


def runs_table(runs: Sequence[ListedRun]) -> str:
    """Formats a list of runs for the terminal."""
    head = ["run", "dataset", "accuracy", "", "epochs", "parameters", "seeds", "changed"]
    rows = [head]
    for run in runs:
        changed = datetime.datetime.fromtimestamp(run.changed).astimezone()
        done = "-" if run.epochs is None else f"{run.epochs}"
        rows.append(
            [
                str(run.workdir),
                run.dataset,
                "-" if run.accuracy is None else percentage(run.accuracy),
                "" if run.accuracy is None else run.split,
                f"{run.num_epochs}" if run.split == "test" else f"{done}/{run.num_epochs}",
                "-" if run.parameters is None else f"{run.parameters:,}",
                f"{run.num_seeds}",
                f"{changed:%Y-%m-%d %H:%M}",
            ]
        )
    return "\n".join(columns(rows, left=(0, 1, 3)))
