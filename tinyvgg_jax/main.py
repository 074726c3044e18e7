"""The command line: flags in, one mode called, exit status out."""

import logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import reporting
from tinyvgg_jax.cache import keep_compiled_programs
from tinyvgg_jax.errors import DivergedError, InterruptedRunError, UserError

MODES = ("train", "eval", "prepare")
USAGE = """\
Train Tiny VGG, or go on with a run that was interrupted:
  python -m tinyvgg_jax.main --config configs/default.py [--workdir runs/default]
                             [--config.FIELD=VALUE ...]
Evaluate a checkpoint of a run:
  python -m tinyvgg_jax.main --mode eval --workdir runs/default
                             [--split train|validation|test] [--step N|latest|best]
Only prepare the dataset, say before going offline:
  python -m tinyvgg_jax.main --mode prepare --config configs/default.py
Every field is explained in configs/default.py.
"""

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The config file.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default: runs/NAME-OF-CONFIG.")
_MODE = flags.DEFINE_string("mode", "train", "One of: " + ", ".join(MODES) + ".")
_SPLIT = flags.DEFINE_string("split", "test", "For eval: train, validation or test.")
_STEP = flags.DEFINE_string("step", "latest", "For eval: a number of steps, latest or best.")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0: done. 1: the loss diverged. 2: something the user can put right. 128 + N: signal N, after
    saving.
    """
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "-help", "--helpfull"} & set(argv[1:]):
        print(USAGE, end="")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tinyvgg_jax").setLevel(logging.INFO)
    # Orbax logs every failure with its traceback; it also raises it, and that is what we show.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable
    try:
        _parse(argv)
        {"train": _train, "eval": _evaluate, "prepare": _prepare}[_MODE.value]()
    except UserError as error:
        return _fail(error, 2)
    except DivergedError as error:
        return _fail(error, 1)
    except InterruptedRunError as error:
        return _fail(error, 128 + error.signal_number)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing that was saved is lost.", 130)
    return 0


def _show_unraisable(unraisable: Any) -> None:
    """Leaves out what TensorStore's threads say after a save that failed, and was reported."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fail(message: object, status: int) -> int:
    print("tinyvgg_jax: " + " ".join(str(message).split()), file=sys.stderr)
    return status


def _parse(argv: list[str]) -> None:
    """Parses the flags; whatever is wrong with them or the config file becomes a UserError."""
    for argument in argv[1:]:
        field = re.match(r"--?config\.([^=]*)", argument)
        if field and field[1] not in config_lib.FIELDS:
            nearest = config_lib.suggestion(field[1], config_lib.FIELDS)
            raise UserError(f"unknown config field {field[1]!r}{nearest}")
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # A file that is missing shows only now.
    except flags.Error as error:
        raise UserError(f"{error} (--help shows the usage)") from error
    except OSError as error:
        raise UserError(f"cannot read the config file: {str(error).splitlines()[-1]}") from error
    except (Exception, SystemExit) as error:
        # A config file is Python: anything may come out of it.
        raise UserError(f"the config is not right: {_origin(error)}{error}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r} (--help shows the usage)")
    if _MODE.value not in MODES:
        raise UserError(
            f"unknown mode {_MODE.value!r}; one of {', '.join(MODES)}"
            + config_lib.suggestion(_MODE.value, MODES)
        )


def _origin(error: BaseException) -> str:
    """`FILE:LINE: ERROR: `, if the error comes from a file of the user's."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    libraries = Path(config_flags.__file__).parents[2]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path != Path(__file__) and path.exists() and not path.is_relative_to(libraries):
            return f"{frame.filename}:{frame.lineno}: {type(error).__name__}: "
    return ""


def _workdir() -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    return Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def _config() -> ConfigDict:
    if _CONFIG.value is None:
        raise UserError("pass a config file, like --config configs/default.py.")
    return config_lib.validated(_CONFIG.value)


# The modes import what they need themselves: a mistyped flag is answered at once.


def _prepare() -> None:
    data = _config().data
    from tinyvgg_jax.data import load_splits

    wanted = {name: data[f"{name}_split"] for name in ("train", "validation", "test")}
    splits, info = load_splits(data.name, wanted, data.data_dir, data.source_dir)
    for name, split in splits.items():
        print(f"{name:<12} {len(split):>7,} images of {info.image_shape}  {wanted[name]}")


def _train() -> None:
    config, workdir = _config(), _workdir()
    from tinyvgg_jax.train import train_and_evaluate

    keep_compiled_programs()
    summary = train_and_evaluate(config, workdir)
    print(reporting.summary_table(summary, workdir))


def _evaluate() -> None:
    if _WORKDIR.value is None:
        raise UserError("--mode eval needs --workdir, the folder of a run.")
    step = _STEP.value
    if step not in ("latest", "best") and not (step.isdecimal() and len(step) < 19):
        raise UserError(f"--step must be a number, latest or best, not {step!r}.")
    from tinyvgg_jax.evaluate import evaluate_run

    keep_compiled_programs()
    # With a config, eval looks for the data where that says; all else is the run's own.
    data = {} if _CONFIG.value is None else _CONFIG.value.data
    content = evaluate_run(
        _WORKDIR.value,
        _SPLIT.value,
        int(step) if step.isdecimal() else step,
        data.get("data_dir"),
        data.get("source_dir"),
    )
    print(reporting.evaluation_table(content, _SPLIT.value))


if __name__ == "__main__":
    sys.exit(main())
