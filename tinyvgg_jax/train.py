"""Training: a run, or several at once, from its config to its summary."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import reporting, seeds
from tinyvgg_jax.augment import augment
from tinyvgg_jax.checkpoint import Checkpoints, Restored
from tinyvgg_jax.data import DatasetInfo, Split, fits_on_device, load_splits
from tinyvgg_jax.errors import DivergedError, InterruptedRunError, UserError
from tinyvgg_jax.evaluate import SPLITS, evaluate
from tinyvgg_jax.keys import named_key
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.optimizer import learning_rate_schedule, make_optimizer
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.pipeline import DevicePipeline, Keys, StreamPipeline
from tinyvgg_jax.profiling import Profile
from tinyvgg_jax.runs import build_model
from tinyvgg_jax.step import Metrics, TrainState, TrainStep, init_state, make_train_step

logger = logging.getLogger(__name__)

_SUMMARY_KEYS = {"dataset", "step", "parameters", "seconds", "device", "versions"} | {
    f"{split}_{kind}" for split in SPLITS for kind in ("accuracy", "loss")
}
# How file systems, mostly of networks, say that they have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
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
        kind = DevicePipeline if self.on_device else StreamPipeline
        return kind(self.step, self.splits["train"], self.config.batch_size, self.keys)

    @property
    def keys(self) -> Keys:
        return Keys(order=named_key(self.key, "order"), step=named_key(self.key, "augment"))

    @property
    def step(self) -> TrainStep:
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


@dataclasses.dataclass(frozen=True)
class _Member:
    """One of the runs that are trained together; mostly the only one."""

    run: _Run
    position: _Position
    checkpoints: Checkpoints


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
    # A run is float32, or bfloat16, by its config, whatever JAX_ENABLE_X64 says of new arrays.
    with jax.enable_x64(False):
        return _train_and_evaluate(config_lib.validated(config), local_path(workdir).absolute())


def _train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    if config.num_seeds == 1:
        return _train_alone(config, workdir)
    _refuse_another_run(workdir, config)
    members = {workdir / name: one for name, one in seeds.members(config).items()}
    # What is wrong with the config shows here, before the folder is the config's.
    first, one = next(iter(members.items()))
    _assemble(one, first)
    with _writing_to(workdir), _alone_in(workdir):
        reporting.write_atomically(workdir / "config.json", config_lib.to_json(config))
        summaries = _train_seeds(members)
        summary = seeds.summarise(summaries)
        reporting.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _train_alone(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    return _train_together({workdir: config})[0]


def _train_seeds(members: dict[Path, ConfigDict]) -> list[dict[str, Any]]:
    """All at once on an accelerator, if there is room; else one after another."""
    if _at_once(members):
        try:
            return _train_together(members)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            logger.warning("The device has no room for all seeds at once; one after another.")
    return [_train_alone(config, workdir) for workdir, config in members.items()]


def _at_once(members: dict[Path, ConfigDict]) -> bool:
    # A CPU is busy with one network already, and convolutions with a kernel for each image of
    # a batch are slow there.
    wanted = next(iter(members.values())).data.pipeline
    return jax.default_backend() != "cpu" and wanted != "stream"


def _train_together(members: dict[Path, ConfigDict]) -> list[dict[str, Any]]:
    """Trains runs that differ in their seeds only, in one program, and gives their summaries."""
    with contextlib.ExitStack() as stack:
        together = []
        splits = None
        for workdir, config in members.items():
            _refuse_another_run(workdir, config)
            run = _assemble(config, workdir, splits)
            splits = (run.splits, run.info)
            stack.enter_context(_writing_to(workdir))
            stack.enter_context(_alone_in(workdir))
            _describe(run)
            together.append(run)
        with contextlib.ExitStack() as open_checkpoints:
            started = []
            for run in together:
                checkpoints = Checkpoints(run.workdir / "checkpoints")
                open_checkpoints.enter_context(checkpoints)
                started.append(_Member(run, _start(run, checkpoints), checkpoints))
            steps = {int(member.position.state.step) for member in started}
            # An interruption between two saves leaves some behind.
            for group in [started] if len(steps) == 1 else [[member] for member in started]:
                _train(group)
        return [_finish(member.run, member.position) for member in started]


def _refuse_another_run(workdir: Path, config: ConfigDict) -> None:
    path = workdir / "config.json"
    with _writing_to(workdir):
        is_run, has_checkpoints = path.exists(), (workdir / "checkpoints").exists()
    if has_checkpoints and not is_run:
        raise UserError(
            f"{workdir} holds checkpoints, but no config.json that says of what. Put it back, or "
            "pass another --workdir."
        )
    if is_run:
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
    if path.exists() and path.read_bytes() != dataset.encode():
        raise UserError(
            f"{run.workdir} holds a run on other data than {run.config.data.name} is here: see "
            f"{path}, unless that is damaged. Pass another --workdir, or the right "
            "--config.data.data_dir."
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
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "The file system of %s has no locks (%s), so nothing keeps a second process from "
                "training there too.",
                workdir,
                error.strerror,
            )
        yield


@contextlib.contextmanager
def _writing_to(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror or error}.") from error


def _assemble(
    config: ConfigDict, workdir: Path, loaded: tuple[dict[str, Split], DatasetInfo] | None = None
) -> _Run:
    data = config.data
    wanted = {name: data[f"{name}_split"] for name in SPLITS}
    splits, info = loaded or load_splits(data.name, wanted, data.data_dir, data.source_dir)
    size = len(splits["train"])
    if config.batch_size > size:
        raise UserError(
            f"config.batch_size is {config.batch_size:,}, more than the {size:,} examples of "
            f"{config.data.train_split!r}."
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
    return _Run(
        config=config,
        workdir=workdir,
        splits=splits,
        info=info,
        model=build_model(config, info).clone(native=True),
        schedule=schedule,
        optimizer=optimizer,
        key=jax.random.key(config.seed),
    )


def _start(run: _Run, checkpoints: Checkpoints) -> _Position:
    """The newest checkpoint's position, or the beginning."""
    init = functools.partial(
        init_state,
        run.model,
        run.optimizer,
        image_shape=run.info.image_shape,
        average=run.config.ema_decay > 0,
    )
    key = named_key(run.key, "init")
    abstract = jax.eval_shape(init, key)
    restored = checkpoints.restore_newest(abstract.params, _besides(abstract))
    if restored is None:
        return _Position(jax.jit(init)(key), Metrics.zero(), 0.0, [])
    progress = restored.progress
    history = progress["history"]
    reporting.write_history(run.workdir / "metrics.jsonl", history)
    logger.info("Going on from step %d in %s.", restored.step, run.workdir)
    return _Position(
        state=_state(restored),
        sums=Metrics(
            jnp.float32(progress["loss"]),
            jnp.int32(progress["correct"]),
            jnp.int32(progress["examples"]),
            jnp.int32(0),
        ),
        seconds=progress["seconds"],
        history=history,
    )


def _besides(state: TrainState) -> Any:
    """What a checkpoint holds of a state besides the parameters that are evaluated."""
    if state.average is None:
        return state.opt_state
    return {"opt_state": state.opt_state, "params": state.params}


def _state(restored: Restored) -> TrainState:
    step, besides = jnp.int32(restored.step), restored.opt_state
    if isinstance(besides, dict) and besides.keys() == {"opt_state", "params"}:
        return TrainState(step, besides["params"], besides["opt_state"], restored.params)
    return TrainState(step, restored.params, besides)


def _save(member: _Member, accuracy: float | None) -> None:
    position = member.position
    sums = jax.device_get(position.sums)
    progress = {
        "loss": float(sums.loss),
        "correct": int(sums.correct),
        "examples": int(sums.examples),
        "seconds": position.seconds,
        "history": position.history,
    }
    state = position.state
    step, besides = int(state.step), _besides(state)
    member.checkpoints.save(step, state.evaluated, besides, progress, accuracy)


def _train(members: list[_Member]) -> None:
    """Trains to the last epoch, changing the members' positions; all are at the same step."""
    from tensorboardX import SummaryWriter

    run, position = members[0].run, members[0].position
    num_epochs, first = run.config.num_epochs, len(position.history)
    if first == num_epochs:
        return
    pipeline = run.pipeline if len(members) == 1 else _pipeline_of_all(members)
    profile = Profile(run.workdir / "profile" if run.config.profile else None)
    with _stop_signal() as received, contextlib.closing(profile), contextlib.ExitStack() as stack:
        writers = []
        for member in members:
            # Of an earlier end, if there was one.
            (member.run.workdir / "summary.json").unlink(missing_ok=True)
            folder = str(member.run.workdir / "tensorboard")
            purge_step = int(position.state.step) + 1 if first else None
            writers.append(SummaryWriter(folder, purge_step=purge_step))
            stack.callback(writers[-1].close)
        for epoch in range(first, num_epochs):
            _train_epoch(members, pipeline, epoch, received, profile)
            examples = run.steps_per_epoch * run.config.batch_size
            if received and int(position.sums.examples) < examples:
                for member in members:
                    _save(member, None)
                _leave(members, received[0])
            records = [_end_epoch(member.run, member.position, epoch) for member in members]
            for member, record, writer in zip(members, records, writers, strict=True):
                _save(member, record["validation_accuracy"])
                history = member.position.history
                reporting.write_history(member.run.workdir / "metrics.jsonl", history)
                reporting.tensorboard_scalars(writer, record)
            logger.info("%s", reporting.epoch_line(records, num_epochs))
            if received and epoch + 1 < num_epochs:
                _leave(members, received[0])


def _pipeline_of_all(members: list[_Member]) -> DevicePipeline:
    run = members[0].run
    keys = _stacked([member.run.keys for member in members])
    return DevicePipeline(run.step, run.splits["train"], run.config.batch_size, keys)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _train_epoch(
    members: list[_Member],
    pipeline: StreamPipeline | DevicePipeline,
    epoch: int,
    received: list[int],
    profile: Profile,
) -> None:
    """Takes the epoch's remaining steps; fewer if a signal is received."""
    run, positions = members[0].run, [member.position for member in members]
    first_step = int(positions[0].state.step) - epoch * run.steps_per_epoch
    start = time.perf_counter()
    if len(positions) == 1:
        state, sums = positions[0].state, positions[0].sums
    else:
        state, sums = _stacked([(position.state, position.sums) for position in positions])
    state, sums = _run_epoch(run, pipeline, epoch, first_step, (state, sums), received, profile)
    seconds = (time.perf_counter() - start) / len(members)
    for index, position in enumerate(positions):
        if len(positions) == 1:
            position.state, position.sums = state, sums
        else:
            # Its part of everything; also of the time.
            mine = jax.tree.map(lambda leaf, index=index: leaf[index], (state, sums))
            position.state, position.sums = mine
        position.seconds += seconds


def _run_epoch(
    run: _Run,
    pipeline: StreamPipeline | DevicePipeline,
    epoch: int,
    first_step: int,
    start: tuple[TrainState, Metrics],
    received: list[int],
    profile: Profile,
) -> tuple[TrainState, Metrics]:
    """Takes steps and shows the progress, until the epoch's end or a signal."""
    progress = reporting.Progress(
        epoch + 1, run.config.num_epochs, first_step, run.steps_per_epoch, run.config.batch_size
    )
    state, sums = start
    with contextlib.closing(progress):
        for now in pipeline.epoch(state, sums, epoch, first_step):
            state, sums = now.state, now.sums
            if progress.is_due():
                so_far = _checked(sums, run)
                examples = so_far.examples.sum()
                loss, accuracy = so_far.loss.sum() / examples, so_far.correct.sum() / examples
                progress.show(now.step, float(loss), float(accuracy))
            profile.after_call(now.done)
            if received:
                break
        _checked(sums, run)
    return state, sums


def _checked(sums: Metrics, run: _Run) -> Metrics:
    """The sums as NumPy's, waiting for the device; an error where a loss was not finite."""
    fetched: Metrics = jax.device_get(sums)
    if fetched.diverged_at.any():
        raise _diverged("training", int(fetched.diverged_at.max()), run)
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
    validation = evaluate(run.model, position.state.evaluated, run.splits["validation"])
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


def _leave(members: list[_Member], number: int) -> None:
    run, position = members[0].run, members[0].position
    where = run.workdir if len(members) == 1 else run.workdir.parent
    raise InterruptedRunError(
        f"interrupted at step {int(position.state.step)}; everything is saved in {where}. "
        "Run the same command again to go on from there.",
        number,
    )


def _finish(run: _Run, position: _Position) -> dict[str, Any]:
    """Evaluates the last parameters on every split and writes summary.json, unless it is there."""
    path = run.workdir / "summary.json"
    step = int(position.state.step)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if summary.keys() >= _SUMMARY_KEYS and summary["step"] == step:
            logger.info("This run is finished already.")
            return summary
    logger.info("Evaluating ...")
    summary = {}
    for name, split in run.splits.items():
        result = evaluate(run.model, position.state.evaluated, split)
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
