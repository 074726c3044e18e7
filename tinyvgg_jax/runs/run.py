"""A run: its data, network and optimizer, made from its config; and its state."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinyvgg_jax import processes
from tinyvgg_jax.augment import augment
from tinyvgg_jax.config import with_splits
from tinyvgg_jax.data import (
    SPLITS,
    Dataset,
    DatasetInfo,
    Options,
    Split,
    decode_splits,
    default_data_dir,
    find_dataset,
    is_prepared,
    require_same_source,
)
from tinyvgg_jax.devices import (
    REPLICATED,
    Share,
    find_mesh,
    on_each,
    replicate,
    require_even_batches,
)
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.keys import named_key
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.optimizer import freeze, learning_rate_schedule, make_optimizer
from tinyvgg_jax.pipeline import Keys
from tinyvgg_jax.runs.checkpoint import Checkpoints
from tinyvgg_jax.runs.folder import steps_taken
from tinyvgg_jax.runs.restore import abstract_params, build_model
from tinyvgg_jax.runs.transfer import (
    fitting_layers,
    frozen_layers,
    require_run,
    trained_network,
)
from tinyvgg_jax.step import (
    StepSums,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    pack,
    unpack,
)

logger = logging.getLogger(__name__)


class Work(NamedTuple):
    """Numbers of images that runs have still to be trained on, and to be evaluated on."""

    train: int
    evaluation: int

    def plus(self, other: "Work") -> "Work":
        """Adds the work of other runs."""
        return Work(self.train + other.train, self.evaluation + other.evaluation)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that stay the same while it trains.

    Attributes:
        config: the validated config.
        workdir: the run's folder.
        splits: the examples of "train", "validation" and "test".
        info: the dataset's image shape and class names.
        model: the network.
        schedule: the learning rate as a function of the number of steps taken.
        optimizer: the Optax transformation.
        mesh: the devices that share the work; None for a single one.
        source: the parameters, by layer, that this run takes from a trained one; None if it takes
            none, or has begun already.
    """

    config: ConfigDict
    workdir: Path
    splits: dict[str, Split]
    info: DatasetInfo
    model: TinyVGG
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh | None = None
    source: Any = None

    @functools.cached_property
    def key(self) -> Array:
        """The PRNG key of the run's seed, from which all its keys are derived."""
        return jax.random.key(self.config.seed, impl="threefry2x32")

    @property
    def keys(self) -> Keys:
        """The keys of the data order and of the random changes in a step."""
        return Keys(order=named_key(self.key, "order"), step=named_key(self.key, "augment"))

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the train split; the remainder is left out."""
        return len(self.splits["train"]) // self.config.batch_size

    def work_left(self, step: int) -> Work:
        """Counts the images of all steps, validations and the closing evaluation after a step.

        Args:
            step: number of optimizer steps taken.
        """
        num_epochs, sizes = self.config.num_epochs, {k: len(v) for k, v in self.splits.items()}
        validations = num_epochs - step // self.steps_per_epoch
        return Work(
            (num_epochs * self.steps_per_epoch - step) * self.config.batch_size,
            validations * sizes["validation"] + sum(sizes.values()),
        )

    def train_step(self, shared: bool = False) -> TrainStep:
        """Makes the pure train step of the config: `(state, batch, key) -> (state, sums)`.

        Args:
            shared: whether several devices share each batch.
        """
        config, steps_per_epoch = self.config, self.steps_per_epoch
        settings = config.augment.to_dict()
        mixup_alpha = settings.pop("mixup_alpha")

        def augmentation(
            key: Array, images: Array, step: Array, share: Share | None = None
        ) -> Array:
            return augment(key, images, step // steps_per_epoch, share, **settings)

        return make_train_step(
            self.model,
            self.optimizer,
            augmentation,
            label_smoothing=config.label_smoothing,
            mixup_alpha=mixup_alpha,
            ema_decay=config.ema_decay,
            shared=shared,
        )

    def init(self, key: Array) -> TrainState:
        """Makes the state before the first step, as a pure function of a key."""
        average = self.config.ema_decay > 0
        return init_state(self.model, self.optimizer, key, self.info.image_shape, average)


def options_of(config: ConfigDict) -> Options:
    """Returns how a config's pictures become images."""
    return Options(config.data.image_size, config.data.channels, config.data.fit)


def find_data(config: ConfigDict) -> ConfigDict:
    """Finds, or prepares, the dataset of a config, and completes its splits.

    A source that is not read, because the dataset is prepared already, is named in one line.

    Raises:
        UserError: if it cannot be found, or was prepared from something else.
    """
    data, options = config.data, options_of(config)
    was_prepared = is_prepared(data.name, data.data_dir or default_data_dir())
    dataset = find_dataset(data.name, data.data_dir, data.source_dir, options)
    # The options are checked after preparing too, since IDX files have a size of their own.
    require_same_source(dataset, data.source_dir if was_prepared else None, options)
    if was_prepared and data.source_dir is not None:
        logger.info(
            "%s is prepared in %s already; %s is not read again.",
            data.name,
            dataset.folder,
            data.source_dir,
        )
    return with_splits(config, dataset.default_splits())


def make_run(
    config: ConfigDict,
    workdir: Path,
    splits: dict[str, Split] | None = None,
    *,
    shares_batches: bool = True,
) -> Run:
    """Makes the parts of a run from its config.

    Args:
        config: a validated config.
        workdir: the run's folder; it is neither read nor written here.
        splits: the splits, if a run of another seed has loaded them already.
        shares_batches: whether several devices share each batch; otherwise each has whole runs.

    Returns:
        The run.

    Raises:
        UserError: if the data cannot be loaded, or the config does not fit them.
    """
    mesh = find_mesh(config.num_devices)
    data = config.data
    dataset = find_dataset(data.name, data.data_dir, data.source_dir, options_of(config))
    config = with_splits(config, dataset.default_splits())
    data = config.data
    size = dataset.num_examples(data.train_split)
    if config.batch_size > size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {size:,} examples of "
            f"{data.train_split!r}."
        )
    if shares_batches:
        require_even_batches(config.batch_size, mesh)
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
    model = build_model(config, dataset.info).clone(native=True)
    layers = abstract_params(model, dataset.info.image_shape)
    optimizer = freeze(optimizer, frozen_layers(layers, config.freeze))
    # Decoding may take a while, so it comes after everything that may be wrong with the config.
    if splits is None:
        wanted = {name: data[f"{name}_split"] for name in SPLITS}
        _warn_of_shared_examples(dataset, wanted)
        splits = decode_splits(dataset, wanted)
    return Run(config, workdir, splits, dataset.info, model, schedule, optimizer, mesh)


def with_source(run: Run) -> Run:
    """Reads the trained run that a run starts from, if it does; one that has begun does not.

    Raises:
        UserError: if it cannot be read, or nothing of it fits.
    """
    if run.config.init_from is None or steps_taken(run.workdir):
        return run
    # Reading the checkpoint is a matter of all processes, which must not begin with some of them.
    source_name = run.config.init_from
    processes.together(lambda: require_run(source_name))
    trained = trained_network(source_name)
    layers = abstract_params(run.model, run.info.image_shape)
    source = trained.params
    if trained.class_names != run.info.class_names:
        # The last layer tells classes apart, and these are others.
        source = {layer: params for layer, params in source.items() if layer != "logits"}
    taken = fitting_layers(layers, source, run.config.init_from)
    random = sorted(frozen_layers(layers, run.config.freeze) - set(taken))
    if random:
        logger.warning(
            "config.freeze keeps %s, which %s does not have: as random as they begin.",
            ", ".join(random),
            run.config.init_from,
        )
    return dataclasses.replace(run, source={layer: source[layer] for layer in taken})


def _warn_of_shared_examples(dataset: Dataset, wanted: dict[str, str]) -> None:
    """Warns, in one line, if a network is to be evaluated on examples that it is trained on."""
    train, *others = SPLITS
    shared = {name: dataset.num_shared(wanted[train], wanted[name]) for name in others}
    found = [
        f"{count:,} with the {name} split {wanted[name]!r}"
        for name, count in shared.items()
        if count
    ]
    if found:
        logger.warning(
            "The train split %r shares examples with another: %s. An accuracy on them does not say "
            "how well the network does on new images.",
            wanted[train],
            " and ".join(found),
        )


@dataclasses.dataclass
class RunState:
    """The state of a run: everything that changes while it trains, and that checkpoints hold.

    Attributes:
        train: parameters, optimizer state and step.
        sums: sums of loss, correct predictions and examples over the current epoch so far.
        seconds: training time of the current epoch so far.
        history: one record for each finished epoch, as in `metrics.jsonl`.
    """

    train: TrainState
    sums: StepSums
    seconds: float
    history: list[dict[str, Any]]

    def save(self, checkpoints: Checkpoints, validation_accuracy: float | None) -> None:
        """Starts to save a checkpoint; arguments and errors are those of `Checkpoints.save`."""
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
    """Restores a run's state from its newest intact checkpoint; None if it has none yet.

    Raises:
        UserError: as `Checkpoints.restore_newest` does.
    """
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
    state, sums = replicate((state, sums), run.mesh)
    return RunState(state, sums, progress["seconds"], progress["history"])


def first_state(run: Run) -> RunState:
    """Makes the state of a run before its first step."""
    # Every device computes the same initial parameters, so none has to send them.
    init = jax.jit(on_each(run.init, run.mesh, (REPLICATED,)))
    state = init(replicate(named_key(run.key, "init"), run.mesh))
    if run.source is not None:
        params, source = state.params | run.source, run.config.init_from
        new = [layer for layer in params if layer not in run.source]
        words = f"Starting from {source}, with its layers {', '.join(run.source)}"
        logger.info("%s; new: %s.", words, ", ".join(new) or "none")
        # The optimizer's state does not depend on the parameters' values.
        average = None if state.average is None else jax.tree.map(jnp.copy, params)
        state = replicate(state._replace(params=params, average=average), run.mesh)
    return RunState(state, replicate(StepSums.zero(), run.mesh), 0.0, [])
