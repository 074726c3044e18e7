"""The command line: flags in, one mode called, exit status out."""

# The built-in part of `signal`; importing `signal` takes a while itself.
import _signal  # type: ignore[import-not-found]

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    # Until `main` handles it, Ctrl-C ends the process at once. Python's own handler would print a
    # traceback of the imports that follow.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib
import errno
import io
import json
import logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

import tinyvgg_jax
from tinyvgg_jax import config as config_lib
from tinyvgg_jax.errors import (
    DivergedError,
    InterruptedRunError,
    LostProcessError,
    UserError,
    is_leftover,
)
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.report import terminal
from tinyvgg_jax.signals import ctrl_c

USAGE = """\
Train Tiny VGG, or go on with a run that was interrupted:
  python -m tinyvgg_jax.main --config default [--workdir runs/default]
                             [--config.FIELD=VALUE ...]
On several machines, the same in a process on each; SLURM and Open MPI need no flags:
  python -m tinyvgg_jax.main --config default --coordinator_address HOST:PORT
                             --num_processes N --process_id 0|1|...
Evaluate a checkpoint of a run, and write a report with pictures:
  python -m tinyvgg_jax.main --mode eval --workdir runs/default
                             [--split train|validation|test] [--step N|latest|best]
                             [--flip_averaging]
Predict the classes of pictures, files or folders of them:
  python -m tinyvgg_jax.main --mode predict --workdir runs/default IMAGE...
                             [--json] [--invert auto|yes|no] [--step N|latest|best]
                             [--views N]
  python -m tinyvgg_jax.main --mode predict --model FILE.jax|.onnx|.tflite IMAGE...
Draw how the network sees a picture, its feature maps and where it looked:
  python -m tinyvgg_jax.main --mode explain --workdir runs/default IMAGE
                             [--output FILE.png] [--invert auto|yes|no] [--step N|latest|best]
Compare runs on the same images; with --output, draw them too:
  python -m tinyvgg_jax.main --mode compare RUN RUN... [--output FILE.png]
                             [--split train|validation|test] [--step N|latest|best]
Export a network to other formats, and verify what was written:
  python -m tinyvgg_jax.main --mode export --workdir runs/default
                             --format jax|onnx|litert|torch|page|all [--int8]
                             [--step N|latest|best] [--output FILE] [--no_verify]
List the runs below folders, and how far they are:
  python -m tinyvgg_jax.main --mode list [FOLDER...]
Show the layers of a network, their parameters and multiply-adds:
  python -m tinyvgg_jax.main --mode describe --config default | --workdir runs/default
Only prepare the dataset, for example before going offline:
  python -m tinyvgg_jax.main --mode prepare --config default
Show the versions of this package and its libraries:
  python -m tinyvgg_jax.main --version
A config is a Python file, or the name of one that comes with the package: {recipes}.
Every field is explained in {default}.
"""

_RECIPES = {path.stem: path for path in Path(__file__).with_name("configs").glob("[!_]*.py")}

try:
    _CONFIG = config_flags.DEFINE_config_file(
        "config", help_string="A config file, or a recipe's name.", lock_config=True
    )
except (flags.Error, UnicodeDecodeError) as error:
    # Defining it reads the command line already, with the files that --flagfile names.
    what = terminal.one_line(str(error).removeprefix("ERROR:: "))
    print(f"tinyvgg_jax: {what}", file=sys.stderr)
    sys.exit(2)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default: runs/NAME-OF-CONFIG.")
_MODE = flags.DEFINE_string("mode", "train", "What to do, see --help.")
_SPLIT = flags.DEFINE_string("split", "test", "Train, validation or test.")
_STEP = flags.DEFINE_string("step", None, "A number of optimizer steps, latest or best.")
_FLIP_AVERAGING = flags.DEFINE_bool(
    "flip_averaging", False, "For eval: also the accuracy averaged over mirror images."
)
_JSON = flags.DEFINE_bool("json", False, "For predict: an object a line instead of a table.")
_INVERT = flags.DEFINE_string("invert", "auto", "Whether pictures are dark on light.")
_VIEWS = flags.DEFINE_integer("views", 1, "For predict: views of each picture to average over.")
_OUTPUT = flags.DEFINE_string("output", None, "For explain, compare, export: the file to write.")
_FORMAT = flags.DEFINE_string("format", None, "For export: formats, with commas between them.")
_INT8 = flags.DEFINE_bool("int8", False, "For export: quantize to int8.")
_NO_VERIFY = flags.DEFINE_bool("no_verify", False, "For export: do not verify the files.")
_MODEL = flags.DEFINE_string("model", None, "For predict: an exported file.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "For train on several machines: HOST:PORT of the first process."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "For train: number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "For train: number of this process.")


# Errors of a file that cannot grow.
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _show_unraisable(unraisable: Any) -> None:
    """Hides errors that libraries leave behind after a failure that is reported already.

    These are coroutines of Orbax that could not read, and files that could not grow, which
    libraries try to write again when they are closed.
    """
    error = unraisable.exc_value
    full = isinstance(error, OSError) and error.errno in _DISK_FULL
    if not (full or is_leftover(unraisable)):
        sys.__unraisablehook__(unraisable)


def _fail(message: object, status: int) -> int:
    # On a full disk, the exit status and what comes on standard output must do.
    with contextlib.suppress(OSError):
        print("tinyvgg_jax: " + terminal.one_line(message), file=sys.stderr)
    return status


def _interrupted() -> int:
    return _fail("interrupted; nothing that was saved is lost.", 130)


def _show(text: str) -> None:
    """Prints lines at once, since whoever reads them may wait for each."""
    try:
        print(terminal.lines(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise UserError(f"cannot write to standard output: {error.strerror}.") from error


def _show_path(title: str, path: Path) -> None:
    # A name may hold a line break, after which it could say anything.
    _show(title + terminal.printable(str(path)))


def _drop_output() -> None:
    """Lets Python find nothing to complain about when it closes standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags and returns what else there is, the paths.

    Whatever is wrong with flags or the config file becomes a UserError.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    for argument in argv[1:]:
        field = re.match(r"--?config\.([^=]*)", argument)
        if field and field[1] not in config_lib.FIELDS:
            nearest = config_lib.suggestion(field[1], config_lib.FIELDS)
            raise UserError(f"unknown config field {field[1]!r}{nearest}")
    argv = _with_recipes(argv)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # A file that is missing shows only now.
    except flags.Error as error:
        # It may hold a whole traceback, of which the last line says what was wrong.
        what = str(error).strip().splitlines()[-1]
        raise UserError(f"{what} (--help shows the usage)") from error
    except OSError as error:
        # After what the library says around it.
        what = str(error).splitlines()[-1].rpartition("failure to load: ")[2]
        raise UserError(f"cannot read the config file: {what}") from error
    except (Exception, SystemExit) as error:
        # A config file is Python: anything may come out of it.
        raise UserError(f"the config is not right: {_origin(error)}{error}") from error
    mode = MODES.get(_MODE.value)
    if mode is None:
        raise UserError(
            f"unknown mode {_MODE.value!r}; one of {', '.join(MODES)}"
            + config_lib.suggestion(_MODE.value, MODES)
        )
    if _MODE.value != "train":
        for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
            if flag.value is not None:
                raise UserError(f"--{flag.name} is for training, not for --mode {_MODE.value}.")
    if len(rest) > 1 and not mode.paths:
        raise UserError(f"unexpected argument {rest[1]!r} (--help shows the usage)")
    if len(rest) == 1 and mode.paths and not mode.paths.startswith("["):
        raise UserError(f"--mode {_MODE.value} needs {mode.paths} (see --help).")
    return rest[1:]


def _with_recipes(argv: list[str]) -> list[str]:
    """Replaces a recipe's bare name, as in `--config quick`, by the path of its file."""
    result = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            break
        if flag in ("--config", "-config") and equals:
            result[i] = f"{flag}={_config_file(value)}"
        elif flag in ("--config", "-config") and i + 1 < len(argv):
            result[i + 1] = _config_file(argv[i + 1])
    return result


def _config_file(value: str) -> str:
    """The path of a recipe if the value is a bare name, else the value."""
    if "://" in value:
        return str(local_path(value))
    if not value or "/" in value or ".py" in value:
        return value
    if value not in _RECIPES:
        raise UserError(
            f"unknown recipe {value!r}; one of {', '.join(sorted(_RECIPES))}, or a .py file"
            + config_lib.suggestion(value, _RECIPES)
        )
    return str(_RECIPES[value])


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
        return local_path(_WORKDIR.value)
    return Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def _config() -> ConfigDict:
    if _CONFIG.value is None:
        raise UserError("pass a config file or a recipe's name, like --config default.")
    return config_lib.validated(_CONFIG.value)


def _start_jax() -> None:
    from tinyvgg_jax.system import enable_compilation_cache, require_device

    require_device()
    enable_compilation_cache()


def _existing_workdir() -> Path:
    if _WORKDIR.value is None:
        raise UserError(f"--mode {_MODE.value} needs --workdir, the folder of a run.")
    return local_path(_WORKDIR.value)


def _step(default: str) -> int | str:
    step = default if _STEP.value is None else _STEP.value
    if step not in ("latest", "best") and not (step.isdecimal() and len(step) < 19):
        raise UserError(f"--step must be a number, latest or best, not {step!r}.")
    return int(step) if step.isdecimal() else step


def _invert() -> str:
    if _INVERT.value not in ("auto", "yes", "no"):
        raise UserError(f"--invert must be auto, yes or no, not {_INVERT.value!r}.")
    return _INVERT.value


def _data_folders() -> Any:
    """Folders of the data by the config that is given beside the run, if one is."""
    from tinyvgg_jax.report.evaluation import DataFolders

    data = {} if _CONFIG.value is None else _CONFIG.value.data
    return DataFolders(data.get("data_dir"), data.get("source_dir"))


# The modes. Each imports what it needs itself, so that a mistyped flag is answered at once.


def _train(_: list[str]) -> int:
    config, workdir = _config(), _workdir()
    from tinyvgg_jax import processes
    from tinyvgg_jax.report.tables import summary_table
    from tinyvgg_jax.train import train_and_evaluate

    def abandon(message: str) -> None:
        os._exit(_fail(message, 2))

    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, abandon)
    _start_jax()
    if not processes.is_first():
        # The first process speaks for all, except for errors that it knows nothing of.
        logging.getLogger("tinyvgg_jax").setLevel(logging.ERROR)
    try:
        summary = train_and_evaluate(config, workdir)
    except BaseException as error:
        if processes.count() == 1:
            raise
        if processes.is_agreed(error):
            if processes.is_first():
                raise
            status = _report(error, False, silent=True)
            assert status is not None
            return status
        status = _report(error, False)
        if status is None:
            traceback.print_exc()
        sys.stderr.flush()
        # JAX would wait for the other processes, which may be gone or wait for this one.
        os._exit(1 if status is None else status)
    if processes.is_first():
        _show(summary_table(summary, workdir))
    return 0


def _prepare(_: list[str]) -> int:
    config = _config()
    from tinyvgg_jax.data import SPLITS, load_splits
    from tinyvgg_jax.runs.run import find_data

    data = find_data(config).data
    wanted = {name: data[f"{name}_split"] for name in SPLITS}
    splits, info = load_splits(data.name, wanted, data.data_dir, data.source_dir)
    for name, split in splits.items():
        _show(f"{name:<12} {len(split):>7,} images of {info.image_shape}  {wanted[name]}")
    return 0


def _evaluate(_: list[str]) -> int:
    workdir, step, split = _existing_workdir(), _step("latest"), _SPLIT.value
    from tinyvgg_jax.report import evaluation, tables
    from tinyvgg_jax.report.page import write_report, write_seeds_report
    from tinyvgg_jax.runs.folder import read_config

    _start_jax()
    evaluation.check_split(split)
    arguments = (workdir, split, step, _data_folders(), _FLIP_AVERAGING.value)
    # The figures are printed before they are written, since a run may lie in a read-only folder.
    if read_config(workdir).num_seeds > 1:
        each = evaluation.evaluate_each_seed(*arguments)
        content = evaluation.seeds_content(each)
        _show(tables.seeds_table(content, split))
        for one in each:
            own = evaluation.evaluation_content(one)
            evaluation.write_evaluation(one.workdir, split, own)
            write_report(one, own)
        evaluation.write_evaluation(workdir, split, content)
        _show_path("report: ", write_seeds_report(workdir, each, content))
        return 0
    evaluated = evaluation.evaluate_checkpoint(*arguments)
    content = evaluation.evaluation_content(evaluated)
    _show(tables.evaluation_table(content, split))
    evaluation.write_evaluation(workdir, split, content)
    _show_path("report: ", write_report(evaluated, content))
    return 0


def _predict(paths: list[str]) -> int:
    step, invert = _step("best"), _invert()
    if _MODEL.value is None:
        workdir = _existing_workdir()
    elif _WORKDIR.value is None:
        file = local_path(_MODEL.value)
    else:
        raise UserError("--mode predict takes either --model or --workdir.")
    from tinyvgg_jax.export import load
    from tinyvgg_jax.predict import Classifier, load_predictor, predict_files
    from tinyvgg_jax.report.tables import PredictionTable
    from tinyvgg_jax.runs.folder import read_config
    from tinyvgg_jax.views import Averaged, choose_views, saw_mirror_images

    _start_jax()
    predictor: Classifier
    if _MODEL.value is None:
        predictor, config = load_predictor(workdir, step), read_config(workdir).to_dict()
    else:
        predictor = exported = load(file)
        config = exported.card.get("config")
    views = choose_views(_VIEWS.value, saw_mirror_images(config))
    if len(views) > 1:
        predictor = Averaged(predictor, views)
    status = 0
    table = None if _JSON.value else PredictionTable(predictor.class_names)
    for answer in predict_files(predictor, paths, invert):
        if isinstance(answer, UserError):
            status = _fail(answer, 1)
        elif table is None:
            _show(json.dumps(answer.to_json(predictor.class_names)))
        else:
            _show(table.row(str(answer.path), answer.probabilities, answer.inverted))
    return status


def _explain(paths: list[str]) -> int:
    workdir, step, invert = _existing_workdir(), _step("best"), _invert()
    if len(paths) > 1:
        raise UserError(f"--mode explain takes one picture, not {len(paths)}.")
    from tinyvgg_jax.report.explain import explain_file

    _start_jax()
    _show_path("", explain_file(workdir, paths[0], _OUTPUT.value, invert, step))
    return 0


def _compare(paths: list[str]) -> int:
    step = _step("latest")
    output = None if _OUTPUT.value is None else local_path(_OUTPUT.value)
    from tinyvgg_jax.report.compare import compare_runs, comparison_table, write_comparison

    _start_jax()
    comparison = compare_runs(paths, _SPLIT.value, step, _data_folders())
    _show(comparison_table(comparison))
    if output is not None:
        _show_path("plot: ", write_comparison(comparison, output))
    return 0


def _export(_: list[str]) -> int:
    workdir, step = _existing_workdir(), _step("best")
    if _FORMAT.value is None:
        raise UserError("--mode export needs --format, see --help.")
    from tinyvgg_jax.export import run

    formats = run.formats_of(_FORMAT.value, _INT8.value)
    if _OUTPUT.value is not None and len(formats) > 1:
        raise UserError(f"--output names one file, and {len(formats)} formats are to be written.")
    _start_jax()
    exported = run.export_run(
        workdir,
        formats,
        step,
        int8=_INT8.value,
        output=_OUTPUT.value,
        verified=not _NO_VERIFY.value,
        folders=_data_folders(),
    )
    if exported.table:
        _show(exported.table)
    for file in exported.files:
        _show_path("written: ", file)
    if exported.torch_module:
        _show(f"The PyTorch module that it loads into:\n\n{exported.torch_module}")
    return 0


def _list(paths: list[str]) -> int:
    from tinyvgg_jax.report.listing import list_runs, runs_table

    _show(runs_table(list_runs(paths or ["runs"])))
    return 0


def _describe(_: list[str]) -> int:
    if (_WORKDIR.value is None) == (_CONFIG.value is None):
        raise UserError("--mode describe needs either --config or --workdir.")
    config = _config() if _WORKDIR.value is None else None
    from tinyvgg_jax.report import describe

    _start_jax()
    if config is None:
        model, shape = describe.model_of_run(_existing_workdir())
    else:
        model, shape = describe.model_of_config(config)
    _show(describe.layers_table(describe.describe_model(model, shape), shape))
    return 0


def _versions() -> str:
    """Lists the versions of this package, of Python and of the libraries that it stands on."""
    from tinyvgg_jax.report.recipe import library_versions

    python = {"tinyvgg_jax": tinyvgg_jax.__version__, "Python": platform.python_version()}
    return "\n".join(f"{name} {version}" for name, version in (python | library_versions()).items())


class Mode(NamedTuple):
    """A mode of the command line.

    Attributes:
        run: takes the paths on the command line and returns the exit status.
        paths: what these paths are, in brackets if they may be left out; empty for a mode that
            takes none.
    """

    run: Callable[[list[str]], int]
    paths: str = ""


MODES = {
    "train": Mode(_train),
    "eval": Mode(_evaluate),
    "predict": Mode(_predict, "IMAGE..."),
    "explain": Mode(_explain, "IMAGE"),
    "compare": Mode(_compare, "RUN RUN..."),
    "export": Mode(_export),
    "list": Mode(_list, "[FOLDER...]"),
    "describe": Mode(_describe),
    "prepare": Mode(_prepare),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0: done. 1: the loss diverged, or some of the pictures could not be read. 2: something the user
    can put right. 128 + N: signal N, after saving what there was to save.
    """
    argv = sys.argv if argv is None else argv
    _set_up_output()
    with ctrl_c(lambda: os._exit(_interrupted())) as pressed:
        try:
            if {"--help", "-h", "-help", "--helpfull"} & set(argv[1:]):
                recipes = ", ".join(sorted(_RECIPES))
                _show(USAGE.format(recipes=recipes, default=_RECIPES["default"]).rstrip())
                return 0
            if "--version" in argv[1:]:
                _show(_versions())
                return 0
            paths = _parse(argv)
            return MODES[_MODE.value].run(paths)
        except BaseException as error:
            status = _report(error, pressed.is_set())
            if status is None:
                raise
            return status


def _set_up_output() -> None:
    """Sets up standard output, logging and plots for a program, which a notebook sets up itself."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Whoever started this has closed it.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(terminal.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("tinyvgg_jax").setLevel(logging.INFO)
    # Orbax logs every failure with its traceback; it also raises it, and that is what we show.
    for library in ("absl", "asyncio", "PIL"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable
    # The name of a file may hold what this terminal cannot show, or bytes that are no text at all.
    # In a notebook standard output is an object of another kind, which takes any text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # A notebook names a backend of its own, which is not there outside of it. Nothing is shown in
    # a window here.
    os.environ["MPLBACKEND"] = "agg"


def _report(error: BaseException, interrupted: bool, silent: bool = False) -> int | None:
    """Prints an error that is not a fault of the program in one line.

    Args:
        error: the error.
        interrupted: whether Ctrl-C was pressed, out of which libraries make errors of their own.
        silent: whether to print nothing, because another process does.

    Returns:
        The exit status; None if the error is a fault of the program.
    """
    statuses = {UserError: 2, DivergedError: 1, LostProcessError: 1}
    if isinstance(error, InterruptedRunError):
        statuses = {InterruptedRunError: 128 + error.signal_number}
    elif interrupted or isinstance(error, KeyboardInterrupt):
        return _interrupted()
    for kind, status in statuses.items():
        if isinstance(error, kind):
            return status if silent else _fail(error, status)
    if isinstance(error, BrokenPipeError):
        # Whoever reads the output, like `head`, has seen enough.
        _drop_output()
        return 128 + signal.SIGPIPE
    return None


if __name__ == "__main__":
    sys.exit(main())
