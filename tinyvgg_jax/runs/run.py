"""A run: its parts, made from its config, and its state between two calls."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from tinyvgg_jax.augment import augment
from tinyvgg_jax.data import SPLITS, DatasetInfo, Split, load_splits
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.keys import named_key
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.optimizer import learning_rate_schedule, make_optimizer
from tinyvgg_jax.pipeline import Keys
from tinyvgg_jax.runs.checkpoint import Checkpoints
from tinyvgg_jax.runs.restore import build_model
from tinyvgg_jax.step import (
    StepSums,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    pack,
    unpack,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, none of which changes while it trains.

    Attributes:
        config: validated.
        workdir: its folder.
        splits: "train", "validation" and "test".
        info: of the dataset.
        model: the network.
        schedule: from the number of steps taken to the learning rate.
        optimizer: the Optax transformation.
    """

    config: ConfigDict
    workdir: Path
    splits: dict[str, Split]
    info: DatasetInfo
    model: TinyVGG
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @functools.cached_property
    def key(self) -> Array:
        """The key that all of the run's keys come from."""
        return jax.random.key(self.config.seed)

    @property
    def keys(self) -> Keys:
        """The keys of the run's epochs."""
        return Keys(order=named_key(self.key, "order"), step=named_key(self.key, "augment"))

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the train split."""
        return len(self.splits["train"]) // self.config.batch_size

    def train_step(self) -> TrainStep:
        """Makes the pure train step that the config describes."""
        config, steps_per_epoch = self.config, self.steps_per_epoch
        settings = config.augment.to_dict()
        mixup_alpha = settings.pop("mixup_alpha")

        def augmentation(key: Array, images: Array, step: Array) -> Array:
            return augment(key, images, step // steps_per_epoch, **settings)

        return make_train_step(
            self.model,
            self.optimizer,
            augmentation,
            label_smoothing=config.label_smoothing,
            mixup_alpha=mixup_alpha,
            ema_decay=config.ema_decay,
        )

    def init(self, key: Array) -> TrainState:
        """Makes the state before the first step; pure."""
        average = self.config.ema_decay > 0
        return init_state(self.model, self.optimizer, key, self.info.image_shape, average)


def make_run(
    config: ConfigDict, workdir: Path, loaded: tuple[dict[str, Split], DatasetInfo] | None = None
) -> Run:
    """Makes the parts of a run.

    Args:
        config: validated.
        workdir: the run's folder; it is neither read nor written.
        loaded: the splits and what the dataset says of itself, where they are loaded already.

    Raises:
        UserError: if the data cannot be had, or the config does not fit them.
    """
    data = config.data
    wanted = {name: data[f"{name}_split"] for name in SPLITS}
    splits, info = loaded or load_splits(data.name, wanted, data.data_dir, data.source_dir)
    size = len(splits["train"])
    if config.batch_size > size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {size:,} examples of "
            f"{data.train_split!r}."
        )
    schedule = learning_rate_schedule(
        config.learning_rate,
        config.learning_rate_decay,
        size // config.batch_size,
        kind=config.schedule,
        num_epochs=config.num_epochs,
        warmup_epochs=config.warmup_epochs,
    )
    optimizer = make_optimizer(
        schedule,
        config.momentum,
        kind=config.optimizer,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        gradient_clipping=config.gradient_clipping,
    )
    model = build_model(config, info).clone(native=True)
    return Run(config, workdir, splits, info, model, schedule, optimizer)


@dataclasses.dataclass
class RunState:
    """Where a run is: everything that changes while it trains, and that a checkpoint holds.

    Attributes:
        train: parameters, optimizer state and step.
        sums: over the steps of the epoch so far.
        seconds: of training in this epoch so far.
        history: the records of the epochs that are over, as in `metrics.jsonl`.
    """

    train: TrainState
    sums: StepSums
    seconds: float
    history: list[dict[str, Any]]

    def save(self, checkpoints: Checkpoints, validation_accuracy: float | None) -> None:
        """Starts saving; errors are those of `Checkpoints.save`."""
        sums = jax.device_get(self.sums)
        progress = {
            "loss": float(sums.loss),
            "correct": int(sums.correct),
            "examples": int(sums.examples),
            "seconds": self.seconds,
            "history": self.history,
        }
        params, rest = pack(self.train)
        checkpoints.save(int(self.train.step), params, rest, progress, validation_accuracy)


def restore_state(run: Run, checkpoints: Checkpoints) -> RunState | None:
    """Restores the newest intact checkpoint of a run; None if it has none yet."""
    abstract = jax.eval_shape(run.init, run.key)
    restored = checkpoints.restore_newest(*pack(abstract))
    if restored is None:
        return None
    progress = restored.progress
    sums = StepSums(
        jnp.float32(progress["loss"]),
        jnp.int32(progress["correct"]),
        jnp.int32(progress["examples"]),
        jnp.int32(0),
    )
    state = unpack(restored.step, restored.params, restored.opt_state)
    return RunState(state, sums, progress["seconds"], progress["history"])


def first_state(run: Run) -> RunState:
    """Makes the state of a run that begins."""
    return RunState(jax.jit(run.init)(named_key(run.key, "init")), StepSums.zero(), 0.0, [])
