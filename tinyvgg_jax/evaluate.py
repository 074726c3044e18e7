"""Exact metrics of parameters on a split."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import seeds
from tinyvgg_jax.data import (
    Batch,
    DatasetInfo,
    Split,
    fits_on_device,
    load_splits,
    padded_batches,
    resident,
)
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.metrics import calibration, confusion_matrix, precision_recall_f1
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.runs import restore_checkpoint, run_config, run_info, single_run_config
from tinyvgg_jax.step import to_float

# On an accelerator, and on a CPU: enough to keep it busy, and little for its memory.
_BATCH_SIZES = (2000, 500)
SPLITS = ("train", "validation", "test")
# Batches that may be under way at a time, so that their images do not fill the memory.
_RUN_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What parameters make of a split, every example counted once.

    Attributes:
        loss: sum of the cross-entropies, in nats.
        correct_per_class: `[num_classes]` int, of the examples of each class.
        count_per_class: `[num_classes]` int.
        logits: `[N, num_classes]` float32, in the order of the split.
    """

    loss: float
    correct_per_class: np.ndarray
    count_per_class: np.ndarray
    logits: np.ndarray

    @property
    def correct(self) -> int:
        return int(self.correct_per_class.sum())

    @property
    def count(self) -> int:
        return int(self.count_per_class.sum())

    @property
    def accuracy(self) -> float:
        """A fraction."""
        return self.correct / self.count

    @property
    def mean_loss(self) -> float:
        """In nats."""
        return self.loss / self.count

    @property
    def predicted(self) -> np.ndarray:
        """`[N]` int, the class of the highest logit of each example."""
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """`[N, num_classes]` float64, each row summing to 1."""
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def evaluate(
    model: TinyVGG, params: Any, split: Split, batch_size: int | None = None
) -> Evaluation:
    """Evaluates parameters on all examples of a split.

    Args:
        model: the network.
        params: its parameters.
        split: N examples.
        batch_size: examples at a time, by default what suits the device; the result does not
            depend on it, but for the rounding of the loss.

    Returns:
        The sums.
    """
    # No gradient is taken here.
    model = model.clone(native=True)
    on_cpu = jax.default_backend() == "cpu"
    size = min(batch_size or _BATCH_SIZES[on_cpu], len(split))
    # On a CPU, batch by batch: nothing is gained by one long call, which could not be stopped.
    run = _evaluate_streamed if on_cpu or not fits_on_device(split) else _evaluate_resident
    losses, correct, counts, logits = run(model, params, split, size)
    return Evaluation(
        float(np.sum(losses, dtype=np.float64)),
        np.sum(correct, axis=0),
        np.sum(counts, axis=0),
        np.concatenate(logits)[: len(split)],
    )


# Of n batches: losses [n], correct and counts of the classes [n, num_classes], logits
# [n, batch_size, num_classes].
Sums = tuple[Any, Any, Any, Any]


def _evaluate_streamed(model: TinyVGG, params: Any, split: Split, batch_size: int) -> Sums:
    sums: list[Any] = []
    for batch, count in padded_batches(split, batch_size):
        sums.append(_evaluate_batch(model, params, batch, np.arange(batch_size) < count))
        if len(sums) > _RUN_AHEAD:
            jax.block_until_ready(sums[-_RUN_AHEAD])
    losses, correct, counts, logits = zip(*jax.device_get(sums), strict=True)
    return losses, correct, counts, logits


def _evaluate_resident(model: TinyVGG, params: Any, split: Split, batch_size: int) -> Sums:
    sums: Sums = jax.device_get(_evaluate_all(model, params, resident(split), batch_size))
    return sums


@partial(jax.jit, static_argnums=(0, 3))
def _evaluate_all(model: TinyVGG, params: Any, data: Batch, batch_size: int) -> Sums:
    """All batches in one call."""
    last = len(data.labels) - 1

    def body(_: None, start: Array) -> tuple[None, Sums]:
        index = start + jnp.arange(batch_size)
        chosen = jnp.minimum(index, last)
        batch = Batch(data.images[chosen], data.labels[chosen])
        return None, _evaluate_batch(model, params, batch, index <= last)

    return jax.lax.scan(body, None, jnp.arange(0, last + 1, batch_size))[1]


@partial(jax.jit, static_argnums=0)
def _evaluate_batch(model: TinyVGG, params: Any, batch: Batch, real: Array) -> Sums:
    """The sums over the examples of a batch that are real, not padding; and all logits."""
    logits = apply(model, params, to_float(batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = real & (logits.argmax(axis=-1) == batch.labels)
    of_class = jax.nn.one_hot(batch.labels, model.num_classes, dtype=jnp.int32)
    return (
        jnp.where(real, losses, 0).sum(),
        (of_class * right[:, None]).sum(axis=0),
        (of_class * real[:, None]).sum(axis=0),
        logits,
    )


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A checkpoint of a run and what it makes of a split.

    Attributes:
        workdir: the run's folder.
        split: the split's name.
        step: optimizer steps of the checkpoint.
        data: the split's examples.
        info: of the dataset.
        parameters: number of the network's parameters.
        result: the metrics.
        flipped: likewise of the mirrored images, None unless asked for.
    """

    workdir: Path
    split: str
    step: int
    data: Split
    info: DatasetInfo
    parameters: int
    result: Evaluation
    flipped: Evaluation | None = None

    @property
    def flip_averaged_accuracy(self) -> float | None:
        """Of the mean logits of each image and its mirror image."""
        if self.flipped is None:
            return None
        logits = self.result.logits + self.flipped.logits
        return float((logits.argmax(axis=1) == self.data.labels).mean())


def check_split(split: str) -> None:
    """Raises a UserError unless a run has a split of this name."""
    if split not in SPLITS:
        nearest = config_lib.suggestion(split, SPLITS)
        raise UserError(f"unknown split {split!r}; one of {', '.join(SPLITS)}{nearest}")


def evaluate_checkpoint(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    data_dir: str | None = None,
    source_dir: str | None = None,
    flip_averaging: bool = False,
) -> Evaluated:
    """Evaluates a checkpoint of a run and writes nothing; see `evaluate_run`."""
    check_split(split)
    workdir = local_path(workdir)
    config = single_run_config(workdir)
    model, restored = restore_checkpoint(workdir, config, run_info(workdir), step)
    splits, info = load_splits(
        config.data.name,
        {split: config.data[f"{split}_split"]},
        data_dir or config.data.data_dir,
        source_dir or config.data.source_dir,
    )
    if info != run_info(workdir):
        raise UserError(f"{config.data.name} is not the dataset that {workdir} was trained on.")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(restored.params))
    data = splits[split]
    result = evaluate(model, restored.params, data)
    flipped = None
    if flip_averaging:
        mirrored = Split(np.ascontiguousarray(data.images[:, :, ::-1]), data.labels)
        flipped = evaluate(model, restored.params, mirrored)
    return Evaluated(workdir, split, restored.step, data, info, parameters, result, flipped)


def evaluate_run(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    data_dir: str | None = None,
    source_dir: str | None = None,
    flip_averaging: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes `evaluation/SPLIT.json` into its folder.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        split: "train", "validation" or "test", as the run's config defines them.
        step: as in `restore`.
        data_dir: tfds's folder, where it is not the config's.
        source_dir: likewise.
        flip_averaging: whether to find also the accuracy of the mean of both views of an image.

    Returns:
        What was written; see `evaluation_content`.

    Raises:
        UserError: if there is no such run, checkpoint or split.
    """
    evaluated = evaluate_checkpoint(workdir, split, step, data_dir, source_dir, flip_averaging)
    content = evaluation_content(evaluated)
    write_evaluation(evaluated.workdir, split, content)
    return content


def evaluation_content(evaluated: Evaluated) -> dict[str, Any]:
    """Makes the content of `evaluation/SPLIT.json`.

    Returns:
        `accuracy`, `loss`, `count`, `correct`, `step`,
        `expected_calibration_error`, `confusion` (`[num_classes][num_classes]` counts, a row for
        each true class), and `per_class`, a list of `class`, `accuracy`, `count`, `correct`,
        `precision`, `recall` and `f1`. Accuracies and the like are fractions. Where mirrored
        images were evaluated too, `flip_averaged_accuracy`.
    """
    result, names = evaluated.result, evaluated.info.class_names
    confusion = confusion_matrix(evaluated.data.labels, result.predicted, len(names))
    scores = np.stack(precision_recall_f1(confusion), axis=1)
    content = {
        "accuracy": result.accuracy,
        "loss": result.mean_loss,
        "count": result.count,
        "correct": result.correct,
        "step": evaluated.step,
        "expected_calibration_error": calibration(
            result.probabilities, evaluated.data.labels
        ).expected_error,
        "per_class": [
            {
                "class": name,
                "accuracy": int(correct) / int(count) if count else None,
                "count": int(count),
                "correct": int(correct),
                **dict(zip(("precision", "recall", "f1"), map(float, score), strict=True)),
            }
            for name, correct, count, score in zip(
                names, result.correct_per_class, result.count_per_class, scores, strict=True
            )
        ],
        "confusion": confusion.tolist(),
    }
    if evaluated.flipped is not None:
        content["flip_averaged_accuracy"] = evaluated.flip_averaged_accuracy
    return content


def write_evaluation(workdir: Path, split: str, content: dict[str, Any]) -> None:
    """Writes `evaluation/SPLIT.json` into a run's folder.

    Raises:
        UserError: if that cannot be written.
    """
    folder = workdir / "evaluation"
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from error


def evaluate_seeds(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    data_dir: str | None = None,
    source_dir: str | None = None,
    flip_averaging: bool = False,
) -> dict[Path, dict[str, Any]]:
    """Evaluates all runs of a run of several seeds, and their ensemble, and writes nothing.

    Args and errors are those of `evaluate_run`.

    Returns:
        For the folder of each seed its `evaluation_content`; and for `workdir` `accuracy` and
        `loss` (means), `seeds` (of both, and where asked for of `flip_averaged_accuracy`, as in
        `seeds.statistics_of`), and `ensemble`: `accuracy`, `correct` and `count` of the mean of
        the runs' probabilities.
    """
    check_split(split)
    workdir = local_path(workdir)
    contents: dict[Path, dict[str, Any]] = {}
    total = None
    for folder in seeds.folders(workdir, run_config(workdir)):
        evaluated = evaluate_checkpoint(folder, split, step, data_dir, source_dir, flip_averaging)
        contents[folder] = evaluation_content(evaluated)
        probabilities = evaluated.result.probabilities
        total = probabilities if total is None else total + probabilities
    assert total is not None
    correct = int((total.argmax(axis=1) == evaluated.data.labels).sum())
    count = evaluated.result.count
    measured = ("accuracy", "loss") + ("flip_averaged_accuracy",) * flip_averaging
    found = {
        name: seeds.statistics_of([one[name] for one in contents.values()]) for name in measured
    }
    contents[workdir] = {
        "accuracy": found["accuracy"]["mean"],
        "loss": found["loss"]["mean"],
        "seeds": found,
        "ensemble": {"accuracy": correct / count, "correct": correct, "count": count},
    }
    return contents
