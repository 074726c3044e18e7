"""Training: the pure step, the epoch loop, and a run from its config to its summary."""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import reporting
from tinyvgg_jax.augment import augment
from tinyvgg_jax.checkpoint import Checkpoints
from tinyvgg_jax.data import DatasetInfo, Split, fits_on_device, load_splits
from tinyvgg_jax.errors import DivergedError, InterruptedRunError, UserError
from tinyvgg_jax.evaluate import SPLITS, evaluate
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.optimizer import learning_rate_schedule, sgd
from tinyvgg_jax.pipeline import DevicePipeline, StreamPipeline
from tinyvgg_jax.profiling import Profile
from tinyvgg_jax.runs import build_model
from tinyvgg_jax.step import Metrics, TrainState, init_state, make_train_step, named_key

logger = logging.getLogger(__name__)

# Calls that may be under way at a time: enough that the device never waits, few enough that
# Ctrl-C is heard at once.
_RUN_AHEAD = 4
_SUMMARY_KEYS = {"dataset", "step", "parameters", "seconds", "device", "versions"} | {
    f"{split}_{kind}" for split in SPLITS for kind in ("accuracy", "loss")
}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run is made of and does not change."""

    config: ConfigDict
    workdir: Path
    splits: dict[str, Split]
    info: DatasetInfo
    model: TinyVGG
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    key: Array

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"]) // self.config.batch_size

    @functools.cached_property
    def pipeline(self) -> StreamPipeline | DevicePipeline:
        settings = self.config.augment.to_dict()
        step = make_train_step(self.model, self.optimizer, functools.partial(augment, **settings))
        key = named_key(self.key, "augment")
        kind = DevicePipeline if self.on_device else StreamPipeline
        return kind(
            lambda state, batch: step(state, batch, key),
            self.splits["train"],
            self.config.batch_size,
            named_key(self.key, "order"),
        )

    @functools.cached_property
    def on_device(self) -> bool:
        """Whether the data stays in the device's memory."""
        wanted = self.config.data.pipeline
        return wanted == "device" or (wanted == "auto" and fits_on_device(self.splits["train"]))


@dataclasses.dataclass
class _Position:
    """Where a run is: all that a checkpoint holds."""

    state: TrainState
    sums: Metrics
    seconds: float  # of training in this epoch so far
    history: list[dict[str, Any]]


def train_and_evaluate(
    config: ConfigDict | Mapping[str, Any], workdir: str | Path
) -> dict[str, Any]:
    """Trains a network, or goes on where an earlier call stopped, and evaluates it.

    Args:
        config: the fields of `configs/default.py`.
        workdir: receives `config.json`, `metrics.jsonl`, `checkpoints/`, TensorBoard's events
            and `summary.json`.

    Returns:
        The summary: accuracies (fractions) and losses (nats) of the last epoch's parameters on
        the train split without augmentation, validation and test; parameters, seconds, device,
        versions.

    Raises:
        UserError: if something in the config, the data or the folder is not right.
        DivergedError: if the loss is no longer finite. The last checkpoint is kept.
        InterruptedRunError: on SIGINT or SIGTERM, after saving. Calling again goes on from there.
    """
    config = config_lib.validated(config)
    workdir = Path(workdir).expanduser().absolute()
    _refuse_another_run(workdir, config)
    run = _assemble(config, workdir)
    with _writing_to(workdir), _alone_in(workdir):
        _describe(run)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            position = _start(run, checkpoints)
            _train(run, position, checkpoints)
        return _finish(run, position)


def _refuse_another_run(workdir: Path, config: ConfigDict) -> None:
    path = workdir / "config.json"
    if path.exists():
        differences = config_lib.differences(config, config_lib.from_file(path))
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differences)}). "
                "Pass another --workdir, or the same config to go on with that run."
            )


def _describe(run: _Run) -> None:
    """Writes what says whose the folder is: config.json and dataset.json."""
    sizes = {name: len(split) for name, split in run.splits.items()}
    content = dataclasses.asdict(run.info) | {"num_examples": sizes}
    dataset = json.dumps(content, indent=2) + "\n"
    path = run.workdir / "dataset.json"
    if path.exists() and path.read_text() != dataset:
        raise UserError(
            f"{run.workdir} holds a run on other data than {run.config.data.name} is here: see "
            f"{path}. Pass another --workdir, or the right --config.data.data_dir."
        )
    reporting.write_atomically(run.workdir / "dataset.json", dataset)
    reporting.write_atomically(run.workdir / "config.json", config_lib.to_json(run.config))


@contextlib.contextmanager
def _alone_in(workdir: Path) -> Iterator[None]:
    """Makes the folder and keeps a second run out of it; the lock ends with the process."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {workdir}.") from None
        yield


@contextlib.contextmanager
def _writing_to(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror or error}.") from error


def _assemble(config: ConfigDict, workdir: Path) -> _Run:
    wanted = {name: config.data[f"{name}_split"] for name in ("train", "validation", "test")}
    splits, info = load_splits(
        config.data.name, wanted, config.data.data_dir, config.data.source_dir
    )
    size = len(splits["train"])
    if config.batch_size > size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {size:,} examples of "
            f"{config.data.train_split!r}."
        )
    schedule = learning_rate_schedule(
        config.learning_rate, config.learning_rate_decay, size // config.batch_size
    )
    return _Run(
        config=config,
        workdir=workdir,
        splits=splits,
        info=info,
        model=build_model(config, info),
        schedule=schedule,
        optimizer=sgd(schedule, config.momentum),
        key=jax.random.key(config.seed),
    )


def _start(run: _Run, checkpoints: Checkpoints) -> _Position:
    """The newest checkpoint's position, or the beginning."""
    shape = run.info.image_shape
    init = functools.partial(init_state, run.model, run.optimizer, image_shape=shape)
    key = named_key(run.key, "init")
    abstract = jax.eval_shape(init, key)
    restored = checkpoints.restore_newest(abstract.params, abstract.opt_state)
    if restored is None:
        return _Position(jax.jit(init)(key), Metrics.zero(), 0.0, [])
    progress = restored.progress
    history = progress["history"]
    reporting.write_history(run.workdir / "metrics.jsonl", history)
    logger.info("Going on from step %d in %s.", restored.step, run.workdir)
    return _Position(
        state=TrainState(jnp.int32(restored.step), restored.params, restored.opt_state),
        sums=Metrics(
            jnp.float32(progress["loss"]),
            jnp.int32(progress["correct"]),
            jnp.int32(progress["examples"]),
            jnp.int32(0),
        ),
        seconds=progress["seconds"],
        history=history,
    )


def _save(position: _Position, checkpoints: Checkpoints, accuracy: float | None) -> None:
    sums = jax.device_get(position.sums)
    progress = {
        "loss": float(sums.loss),
        "correct": int(sums.correct),
        "examples": int(sums.examples),
        "seconds": position.seconds,
        "history": position.history,
    }
    state = position.state
    checkpoints.save(int(state.step), state.params, state.opt_state, progress, accuracy)


def _train(run: _Run, position: _Position, checkpoints: Checkpoints) -> None:
    """Trains to the last epoch, changing `position`."""
    from tensorboardX import SummaryWriter

    num_epochs = run.config.num_epochs
    first = len(position.history)
    if first == num_epochs:
        return
    writer = SummaryWriter(
        str(run.workdir / "tensorboard"), purge_step=int(position.state.step) + 1 if first else None
    )
    with _stop_signal() as received, contextlib.closing(writer):
        for epoch in range(first, num_epochs):
            _train_epoch(run, position, epoch, received)
            if (
                received
                and int(position.sums.examples) < run.steps_per_epoch * run.config.batch_size
            ):
                _save(position, checkpoints, None)
                _leave(position, run, received[0])
            record = _end_epoch(run, position, epoch)
            _save(position, checkpoints, record["validation_accuracy"])
            reporting.write_history(run.workdir / "metrics.jsonl", position.history)
            reporting.tensorboard_scalars(writer, record)
            logger.info("%s", reporting.epoch_line(record, num_epochs))
            if received and epoch + 1 < num_epochs:
                _leave(position, run, received[0])


def _train_epoch(run: _Run, position: _Position, epoch: int, received: list[int]) -> None:
    """Takes the epoch's remaining steps; fewer if a signal is received."""
    first_step = int(position.state.step) - epoch * run.steps_per_epoch
    progress = reporting.Progress(
        epoch + 1, run.config.num_epochs, first_step, run.steps_per_epoch, run.config.batch_size
    )
    profile = Profile(run.workdir / "profile" if run.config.profile else None)
    under_way: deque[Array] = deque()
    start = time.perf_counter()
    with contextlib.closing(progress), contextlib.closing(profile):
        for now in run.pipeline.epoch(position.state, position.sums, epoch, first_step):
            position.state, position.sums = now.state, now.sums
            under_way.append(now.done)
            if len(under_way) > _RUN_AHEAD:
                under_way.popleft().block_until_ready()
            if progress.is_due():
                so_far = _checked(now.sums, run)
                examples = int(so_far.examples)
                loss, accuracy = float(so_far.loss) / examples, int(so_far.correct) / examples
                progress.show(now.step, loss, accuracy)
            profile.after_call(now.done)
            if received:
                break
        _checked(position.sums, run)
    position.seconds += time.perf_counter() - start


def _checked(sums: Metrics, run: _Run) -> Metrics:
    """The sums as NumPy scalars, waiting for the device; an error where a loss was not finite."""
    fetched: Metrics = jax.device_get(sums)
    if fetched.diverged_at:
        raise _diverged("training", int(fetched.diverged_at), run)
    return fetched


def _diverged(which: str, step: int, run: _Run) -> DivergedError:
    return DivergedError(
        f"the {which} loss is not a finite number at step {step}. What was saved before is "
        f"kept in {run.workdir}. Try a lower --config.learning_rate in another --workdir.",
        step,
    )


def _end_epoch(run: _Run, position: _Position, epoch: int) -> dict[str, Any]:
    """Validates, adds the epoch's record to the history and begins the next one's sums."""
    sums = jax.device_get(position.sums)
    step = int(position.state.step)
    validation = evaluate(run.model, position.state.params, run.splits["validation"])
    if not math.isfinite(validation.loss):
        raise _diverged("validation", step, run)
    record = {
        "epoch": epoch + 1,
        "step": step,
        "learning_rate": float(run.schedule(step - 1)),
        "train_loss": float(sums.loss) / int(sums.examples),
        "train_accuracy": int(sums.correct) / int(sums.examples),
        "validation_loss": validation.mean_loss,
        "validation_accuracy": validation.accuracy,
        "seconds": position.seconds,
        "images_per_second": int(sums.examples) / position.seconds,
    }
    position.history.append(record)
    position.sums, position.seconds = Metrics.zero(), 0.0
    return record


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list; a second one acts as it would have without us."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Who started us in the background may have had Ctrl-C ignored; then it stays so.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        received.append(number)
        restore()
        logger.info("Received %s; saving ...", signal.Signals(number).name)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


def _leave(position: _Position, run: _Run, number: int) -> None:
    raise InterruptedRunError(
        f"interrupted at step {int(position.state.step)}; everything is saved in {run.workdir}. "
        "Run the same command again to go on from there.",
        number,
    )


def _finish(run: _Run, position: _Position) -> dict[str, Any]:
    """Evaluates the last parameters on every split and writes summary.json, unless it is there."""
    path = run.workdir / "summary.json"
    step = int(position.state.step)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        summary: dict[str, Any] = json.loads(path.read_text())
        if summary.keys() >= _SUMMARY_KEYS and summary["step"] == step:
            logger.info("This run is finished already.")
            return summary
    logger.info("Evaluating ...")
    summary = {}
    for name, split in run.splits.items():
        result = evaluate(run.model, position.state.params, split)
        summary[f"{name}_accuracy"] = result.accuracy
        summary[f"{name}_loss"] = result.mean_loss
    summary |= {
        "dataset": run.config.data.name,
        "step": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(position.state.params)),
        "seconds": sum(record["seconds"] for record in position.history),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    reporting.write_atomically(path, json.dumps(summary, indent=2) + "\n")
    return summary
