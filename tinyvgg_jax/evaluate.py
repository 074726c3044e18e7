"""Exact metrics of parameters on a split, and restoring them from a run's folder."""

import dataclasses
import json
import operator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.checkpoint import Checkpoints, Restored
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
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.step import to_float

# On an accelerator, and on a CPU: enough to keep it busy, and little for its memory.
_BATCH_SIZES = (2000, 500)
SPLITS = ("train", "validation", "test")
# Batches that may be under way at a time, so that their images do not fill the memory.
_RUN_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, every example counted once.

    Attributes:
        loss: sum of the cross-entropies, in nats.
        correct_per_class: `[num_classes]` int, of the examples of each class.
        count_per_class: `[num_classes]` int.
    """

    loss: float
    correct_per_class: np.ndarray
    count_per_class: np.ndarray

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
    on_cpu = jax.default_backend() == "cpu"
    size = min(batch_size or _BATCH_SIZES[on_cpu], len(split))
    # On a CPU, batch by batch: nothing is gained by one long call, which could not be stopped.
    run = _evaluate_streamed if on_cpu or not fits_on_device(split) else _evaluate_resident
    losses, correct, counts = run(model, params, split, size)
    return Evaluation(
        float(np.sum(losses, dtype=np.float64)), np.sum(correct, axis=0), np.sum(counts, axis=0)
    )


Sums = tuple[Any, Any, Any]  # losses [n], correct and counts of the classes [n, num_classes]


def _evaluate_streamed(model: TinyVGG, params: Any, split: Split, batch_size: int) -> Sums:
    sums: list[Any] = []
    for batch, count in padded_batches(split, batch_size):
        sums.append(_evaluate_batch(model, params, batch, np.arange(batch_size) < count))
        if len(sums) > _RUN_AHEAD:
            jax.block_until_ready(sums[-_RUN_AHEAD])
    losses, correct, counts = zip(*jax.device_get(sums), strict=True)
    return losses, correct, counts


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
    """The sums over the examples of a batch that are real, not padding."""
    logits = apply(model, params, to_float(batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = real & (logits.argmax(axis=-1) == batch.labels)
    of_class = jax.nn.one_hot(batch.labels, model.num_classes, dtype=jnp.int32)
    return (
        jnp.where(real, losses, 0).sum(),
        (of_class * right[:, None]).sum(axis=0),
        (of_class * real[:, None]).sum(axis=0),
    )


def build_model(config: ConfigDict, info: DatasetInfo) -> TinyVGG:
    """The network that a config describes, for a dataset.

    Raises:
        UserError: if the images are too small for its blocks.
    """
    smallest = 2 ** len(config.model.widths)
    if min(info.image_shape[:2]) < smallest:
        raise UserError(
            f"config.model.widths has {len(config.model.widths)} blocks, which need images of at "
            f"least {smallest}x{smallest} pixels; {config.data.name} has "
            f"{info.image_shape[0]}x{info.image_shape[1]}."
        )
    return TinyVGG(
        widths=tuple(config.model.widths),
        convs_per_block=config.model.convs_per_block,
        hidden=config.model.hidden,
        num_classes=len(info.class_names),
        dtype=jnp.dtype(config.dtype),
    )


def abstract_params(model: TinyVGG, image_shape: tuple[int, int, int]) -> Any:
    """Shapes and dtypes of the model's parameters, without computing any."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def restore(workdir: str | Path, step: int | str = "best") -> tuple[TinyVGG, Any]:
    """Restores a trained network from a run's folder; needs no dataset.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        step: a number of optimizer steps that has a checkpoint, "best" (by validation
            accuracy) or "latest".

    Returns:
        `(model, params)`, ready for `model.apply({"params": params}, images)` with images
        `[B, H, W, C]` in [0, 1].

    Raises:
        UserError: if there is no run, no such checkpoint, or it is damaged.
    """
    workdir = Path(workdir).expanduser()
    model, restored = _restore(workdir, run_config(workdir), run_info(workdir), step)
    return model, restored.params


def run_config(workdir: Path) -> ConfigDict:
    """The config of the run in a folder."""
    return config_lib.from_file(workdir / "config.json")


def run_info(workdir: Path) -> DatasetInfo:
    """What the run in a folder knew of its dataset."""
    try:
        content = json.loads((workdir / "dataset.json").read_text())
        height, width, channels = (operator.index(n) for n in content["image_shape"])
        return DatasetInfo((height, width, channels), tuple(content["class_names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir} holds no readable dataset.json: {error}") from error


def _restore(
    workdir: Path, config: ConfigDict, info: DatasetInfo, step: int | str
) -> tuple[TinyVGG, Restored]:
    model = build_model(config, info)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no checkpoint yet.")
    with Checkpoints(folder, read_only=True) as checkpoints:
        return model, checkpoints.restore_params(step, abstract_params(model, info.image_shape))


def evaluate_run(
    workdir: str | Path,
    split: str = "test",
    step: int | str = "latest",
    data_dir: str | None = None,
    source_dir: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes `evaluation/SPLIT.json` into its folder.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        split: "train", "validation" or "test", as the run's config defines them.
        step: as in `restore`.
        data_dir: tfds's folder, where it is not the config's.
        source_dir: likewise.

    Returns:
        What was written: `accuracy`, `loss`, `count`, `correct`, `step`, and `per_class`, a
        list of `class`, `accuracy`, `count` and `correct`. Accuracies are fractions.

    Raises:
        UserError: if there is no such run, checkpoint or split.
    """
    workdir = Path(workdir).expanduser()
    if split not in SPLITS:
        raise UserError(
            f"unknown split {split!r}; one of {', '.join(SPLITS)}"
            + config_lib.suggestion(split, SPLITS)
        )
    config = run_config(workdir)
    model, restored = _restore(workdir, config, run_info(workdir), step)
    splits, info = load_splits(
        config.data.name,
        {split: config.data[f"{split}_split"]},
        data_dir or config.data.data_dir,
        source_dir or config.data.source_dir,
    )
    if info != run_info(workdir):
        raise UserError(f"{config.data.name} is not the dataset that {workdir} was trained on.")
    result = evaluate(model, restored.params, splits[split])
    content = {
        "accuracy": result.accuracy,
        "loss": result.mean_loss,
        "count": result.count,
        "correct": result.correct,
        "step": restored.step,
        "per_class": [
            {
                "class": name,
                "accuracy": int(correct) / int(count) if count else None,
                "count": int(count),
                "correct": int(correct),
            }
            for name, correct, count in zip(
                info.class_names, result.correct_per_class, result.count_per_class, strict=True
            )
        ],
    }
    folder = workdir / "evaluation"
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from error
    return content
