"""Evaluation of a run's checkpoints, and its JSON file `evaluation/SPLIT.json`."""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.data import (
    SPLITS,
    DatasetInfo,
    Split,
    default_data_dir,
    is_prepared,
    load_splits,
)
from tinyvgg_jax.devices import find_mesh
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.evaluate import Evaluation, evaluate
from tinyvgg_jax.model import count_parameters
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.report.progress import evaluation_progress
from tinyvgg_jax.report.scores import calibration, confusion_matrix, precision_recall_f1
from tinyvgg_jax.runs import seeds
from tinyvgg_jax.runs.files import subfolder, write_json
from tinyvgg_jax.runs.folder import read_config, read_dataset
from tinyvgg_jax.runs.restore import restore_checkpoint, single_run_config
from tinyvgg_jax.runs.run import options_of

logger = logging.getLogger(__name__)


class DataFolders(NamedTuple):
    """Folders of the data on this machine, which replace those of a run's config.

    Attributes:
        data_dir: tfds's folder of datasets; None for the config's, if the dataset is prepared
            there, and otherwise tfds's own.
        source_dir: folder to prepare the dataset from; None for none, whatever the config says.
    """

    data_dir: str | None = None
    source_dir: str | None = None


AS_IN_CONFIG = DataFolders()


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """Evaluation of a run's checkpoint on a split.

    Attributes:
        workdir: the run's folder.
        split: the split's name.
        step: number of optimizer steps of the checkpoint.
        config: the run's config.
        data: the split's examples.
        info: the dataset's image shape and class names.
        parameters: number of parameters of the network.
        history: one record for each finished epoch, as in `metrics.jsonl`, but verified, since the
            checkpoint holds it under its digest.
        result: sums and logits on the images.
        flipped: sums and logits on the mirrored images; None without flip averaging.
        folders: folders of the data that replaced those of the config.
    """

    workdir: Path
    split: str
    step: int
    config: ConfigDict
    data: Split
    info: DatasetInfo
    parameters: int
    history: list[dict[str, Any]]
    result: Evaluation
    flipped: Evaluation | None = None
    folders: DataFolders = AS_IN_CONFIG

    @property
    def flip_averaged_accuracy(self) -> float | None:
        """Accuracy of the mean logits of each image and its mirror image, as a fraction."""
        if self.flipped is None:
            return None
        logits = self.result.logits + self.flipped.logits
        return float((logits.argmax(axis=1) == self.data.labels).mean())


def check_split(split: str) -> None:
    """Checks the name of a split.

    Raises:
        UserError: if it is not "train", "validation" or "test".
    """
    if split not in SPLITS:
        nearest = config_lib.suggestion(split, SPLITS)
        raise UserError(f"unknown split {split!r}; one of {', '.join(SPLITS)}{nearest}")


def load_run_splits(
    config: ConfigDict, splits: Iterable[str], folders: DataFolders = AS_IN_CONFIG
) -> tuple[dict[str, Split], DatasetInfo]:
    """Loads splits as a run's config defines them.

    Args:
        config: the run's config.
        splits: of "train", "validation" and "test" those that are wanted.
        folders: folders of the data that replace those of the run's config.

    Returns:
        The splits by name, and the properties of the dataset.

    Raises:
        UserError: as `load_splits`.
    """
    wanted = {split: config.data[f"{split}_split"] for split in splits}
    return load_splits(
        config.data.name, wanted, *_folders_here(config, folders), options_of(config)
    )


def evaluate_checkpoint(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    folders: DataFolders = AS_IN_CONFIG,
    flip_averaging: bool = False,
    title: str = "",
) -> CheckpointEvaluation:
    """Evaluates a checkpoint of a run; nothing is written.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        split: "train", "validation" or "test", as the run's config defines them.
        step: as in `restore`.
        folders: folders of the data that replace those of the run's config.
        flip_averaging: whether to evaluate the mirrored images too.
        title: the beginning of the progress bar, to name one run among several.

    Returns:
        The evaluation.

    Raises:
        UserError: if there is no such run, checkpoint or split, or the data cannot be loaded.
    """
    check_split(split)
    workdir = local_path(workdir)
    config = single_run_config(workdir)
    model, restored = restore_checkpoint(workdir, config, read_dataset(workdir), step)
    splits, info = load_run_splits(config, [split], folders)
    if info != read_dataset(workdir):
        raise UserError(f"{config.data.name} is not the dataset that {workdir} was trained on.")
    data, title, mesh = splits[split], f"{title}evaluating {split}", find_mesh()
    with evaluation_progress(title, len(data)) as on_progress:
        result = evaluate(model, restored.params, data, on_progress=on_progress, mesh=mesh)
    flipped = None
    if flip_averaging:
        mirrored = Split(np.ascontiguousarray(data.images[:, :, ::-1]), data.labels)
        with evaluation_progress(f"{title}, mirrored", len(data)) as on_progress:
            flipped = evaluate(model, restored.params, mirrored, on_progress=on_progress, mesh=mesh)
    return CheckpointEvaluation(
        workdir,
        split,
        restored.step,
        config,
        data,
        info,
        count_parameters(restored.params),
        restored.progress["history"],
        result,
        flipped,
        folders,
    )


def _folders_here(config: ConfigDict, given: DataFolders) -> DataFolders:
    """Chooses the folders of a run's data: those that are given, else its config's if they serve.

    A run's folder may come from another machine or a stranger. So nothing is prepared in a folder
    that only its config names, nor is anything prepared from its source.
    """
    data_dir = config.data.data_dir
    if given.data_dir is None and data_dir and not is_prepared(config.data.name, data_dir):
        data_dir = default_data_dir()
        logger.warning(
            "%s, which the run's config names, holds no %s that can be read here; %s is used.",
            config.data.data_dir,
            config.data.name,
            data_dir,
        )
    return DataFolders(given.data_dir or data_dir, given.source_dir)


def evaluation_content(evaluated: CheckpointEvaluation) -> dict[str, Any]:
    """Makes the content of `evaluation/SPLIT.json`.

    Returns:
        `accuracy`, `loss` (mean, in nats), `count`, `correct`, `step`,
        `expected_calibration_error`; `confusion`, `[num_classes][num_classes]` counts with a row
        for each true class; `per_class`, a list of `class`, `accuracy`, `count`, `correct`,
        `precision`, `recall` and `f1`; and with flip averaging `flip_averaged_accuracy`. All
        accuracies and scores are fractions.
    """
    result = evaluated.result
    names = evaluated.info.class_names
    confusion = confusion_matrix(evaluated.data.labels, result.predicted, len(names))
    content = {
        "accuracy": result.accuracy,
        "loss": result.mean_loss,
        "count": result.count,
        "correct": result.correct,
        "step": evaluated.step,
        "expected_calibration_error": calibration(
            result.probabilities, evaluated.data.labels
        ).expected_error,
        "per_class": _per_class(confusion, names),
        "confusion": confusion.tolist(),
    }
    if evaluated.flipped is not None:
        content["flip_averaged_accuracy"] = evaluated.flip_averaged_accuracy
    return content


def _per_class(confusion: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Makes `per_class` of `evaluation_content`.

    Args:
        confusion: `[C, C]` int, as from `confusion_matrix`.
        names: C names.
    """
    counts = confusion.sum(axis=1).tolist()
    correct = np.diagonal(confusion).tolist()
    scores = np.stack(precision_recall_f1(confusion), axis=1).tolist()
    return [
        {
            "class": name,
            "accuracy": right / count if count else None,
            "count": count,
            "correct": right,
            **dict(zip(("precision", "recall", "f1"), score, strict=True)),
        }
        for name, right, count, score in zip(names, correct, counts, scores, strict=True)
    ]


def write_evaluation(workdir: Path, split: str, content: dict[str, Any]) -> None:
    """Writes `evaluation/SPLIT.json` into a run's folder.

    Args:
        workdir: the run's folder.
        split: the split's name.
        content: as from `evaluation_content` or `seeds_content`.

    Raises:
        UserError: if the file cannot be written.
    """
    write_json(subfolder(workdir, "evaluation") / f"{split}.json", content)


def evaluate_each_seed(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    folders: DataFolders = AS_IN_CONFIG,
    flip_averaging: bool = False,
) -> list[CheckpointEvaluation]:
    """Evaluates the runs of all seeds in a folder, or its only run.

    Args and errors are those of `evaluate_checkpoint`.

    Raises:
        UserError: also if some seeds have not begun, or their latest steps differ.
    """
    workdir = local_path(workdir)
    config = read_config(workdir)
    folders = _folders_here(config, folders)
    evaluated = [
        evaluate_checkpoint(folder, split, step, folders, flip_averaging, title)
        for folder, title in zip(seeds.folders(workdir, config), seeds.titles(config), strict=True)
    ]
    steps = [one.step for one in evaluated]
    # A mean over trained and half-trained networks would say nothing about the recipe.
    if step == "latest" and len(set(steps)) > 1:
        raise UserError(
            f"the seeds in {workdir} stand at different steps ({', '.join(map(str, steps))}). Run "
            "its command again to finish them, or pass --step best."
        )
    return evaluated


def seeds_content(each: list[CheckpointEvaluation]) -> dict[str, Any]:
    """Makes the content of `evaluation/SPLIT.json` in the folder of several seeds.

    The ensemble predicts the class with the highest mean of the runs' probabilities.

    Args:
        each: the evaluations of the seeds, as from `evaluate_each_seed`.

    Returns:
        `accuracy` and `loss`, which are means; `seeds`, the `seeds.statistics_of` accuracy, loss
        and, with flip averaging, `flip_averaged_accuracy`; `ensemble` with its `accuracy`,
        `correct` and `count`; and `confusion` and `per_class` as in `evaluation_content`, summed
        over the seeds.
    """
    contents = [evaluation_content(one) for one in each]
    # The class with the highest sum is the class with the highest mean.
    total = sum(one.result.probabilities for one in each)
    correct = int((np.argmax(total, axis=1) == each[0].data.labels).sum())
    count = each[0].result.count
    measured = ["accuracy", "loss"]
    if each[0].flipped is not None:
        measured.append("flip_averaged_accuracy")
    found = {
        name: seeds.statistics_of([one[name] for one in contents], name != "loss")
        for name in measured
    }
    confusion = sum(np.asarray(one["confusion"]) for one in contents)
    assert isinstance(confusion, np.ndarray)
    return {
        "accuracy": found["accuracy"]["mean"],
        "loss": found["loss"]["mean"],
        "seeds": found,
        "ensemble": {"accuracy": correct / count, "correct": correct, "count": count},
        "per_class": _per_class(confusion, each[0].info.class_names),
        "confusion": confusion.tolist(),
    }
