"""The command line, in processes of its own."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, stored

import tinyvgg_jax

CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def small(data_dir: Path) -> list[str]:
    """Flags for a run of seconds."""
    fields = {
        "num_epochs": 2,
        "batch_size": 30,
        "model.widths": "(4,8)",
        "model.hidden": 8,
        "data.name": "bars",
        "data.data_dir": data_dir,
        "data.train_split": "train[:250]",
        "data.validation_split": "train[250:]",
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config", "configs/quick.py", *flags]


def test_train_resume_and_eval(small: list[str], command_line: CommandLine, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    first = command_line(*small, "--workdir", workdir)
    assert first.returncode == 0, first.stderr
    # Results on standard output, nothing else; logs on standard error.
    assert first.stdout.splitlines()[0].split() == ["split", "accuracy", "loss"]
    assert [line.split()[0] for line in first.stdout.splitlines()[1:4]] == [
        "train",
        "validation",
        "test",
    ]
    assert "epoch 2/2" in first.stderr and "epoch" not in first.stdout
    summary = stored(workdir / "summary.json")
    assert f"{summary['test_accuracy']:.2%}" in first.stdout

    again = command_line(*small, f"--workdir={workdir}")
    assert again.returncode == 0 and again.stdout == first.stdout
    assert "finished already" in again.stderr

    evaluated = command_line("--mode", "eval", "--workdir", workdir)
    assert evaluated.returncode == 0, evaluated.stderr
    content = stored(workdir / "evaluation" / "test.json")
    assert content["accuracy"] == summary["test_accuracy"]
    assert f"({content['correct']} of 70)" in evaluated.stdout
    best = command_line("--mode=eval", f"--workdir={workdir}", "--split=train", "--step=best")
    assert best.returncode == 0 and "train: accuracy" in best.stdout

    moved = command_line(*small, "--config.seed=3", "--workdir", workdir)
    assert moved.returncode == 2 and "seed: 3, not 0" in moved.stderr


def test_prepare_says_what_there_is(small: list[str], command_line: CommandLine) -> None:
    result = command_line("--mode", "prepare", *small)
    assert result.returncode == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["train", "250"],
        ["validation", "80"],
        ["test", "70"],
    ]


def test_help_is_short_and_no_error(command_line: CommandLine) -> None:
    result = command_line("--help")
    assert result.returncode == 0 and "--mode eval" in result.stdout


def test_standard_output_may_be_that_of_a_notebook() -> None:
    """Such an object is no file of the system's; `%run -m tinyvgg_jax.main` prints there."""
    code = (
        "import io, sys; from tinyvgg_jax import main; shown = sys.stdout = io.StringIO();"
        "status = main.main(['main.py', '--help']); sys.stdout = sys.__stdout__;"
        "print(shown.getvalue()); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--mode eval" in done.stdout


def test_versions_are_a_short_block(tmp_path: Path) -> None:
    """Versions of the installed libraries, which need not be imported for that, nor be intact."""
    code = (
        "import sys; sys.modules['jax'] = sys.modules['numpy'] = None;"
        "from tinyvgg_jax import main; sys.exit(main.main(['main.py', '--version', 'x']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["tinyvgg_jax", tinyvgg_jax.__version__]
    assert lines[1] == ["Python", platform.python_version()]
    assert {tuple(line) for line in lines[2:]} >= {
        (name, metadata.version(name)) for name in ("jax", "flax", "optax", "orbax-checkpoint")
    }


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error: it must be one line, say who says it, and be all that was printed."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tinyvgg_jax: ")
    assert "Traceback" not in result.stderr
    return lines[0]


BAD_ARGUMENTS: list[tuple[list[str], str]] = [
    (["--config.bach_size=3"], "unknown config field 'bach_size'; did you mean 'batch_size'?"),
    (["--config.model.width=3"], "did you mean 'model.widths'?"),
    (["--config.batch_size=abc"], "invalid literal for int() with base 10: 'abc'"),
    (["--config.batch_size=1.5"], "1.5"),
    (["--config.learning_rate=fast"], "could not convert string to float: 'fast'"),
    (["--config.batch_size=0"], "config.batch_size must be at least 1, not 0"),
    (["--config.batch_size=251"], "more than the 250 examples"),
    (["--config.num_epochs=0"], "config.num_epochs must be at least 1, not 0"),
    (["--config.learning_rate=-1"], "config.learning_rate must be a positive number, not -1.0"),
    (["--config.learning_rate=nan"], "config.learning_rate must be a positive number, not nan"),
    (["--config.model.widths=(4,4,4)"], "5 blocks, which need images of at least 32x32"),
    (["--mode", "trian"], "; did you mean 'train'?"),
    (["--config.data.train_split=tarin"], "unknown split 'tarin' of bars"),
    (["--config.data.test_split=tset"], "unknown split 'tset' of bars"),
    (["--config.data.name=bras"], "no prepared dataset 'bras'"),
    (["--config", "configs/quick.py:x"], "tinyvgg_jax: TypeError: get_config() takes 0 positional"),
    (["--config="], "cannot read the config file: Path to config file is an empty string"),
    (["--workdir=~nobody-here/x"], "there is no user nobody-here on this machine"),
    (["--flagfile=/nope"], "Unable to open flagfile: [Errno 2] No such file or directory: '/nope'"),
    (["--nosuchflag"], "Unknown command line flag 'nosuchflag'"),
    (["stray"], "unexpected argument 'stray'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_leave_no_folder(
    small: list[str],
    command_line: CommandLine,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    result = command_line(*small, "--workdir", tmp_path / "run", *arguments)
    assert message in one_line(result)
    assert result.returncode == 2
    assert not (tmp_path / "run").exists()


BAD_CONFIGS: list[tuple[str, str]] = [
    ("x = 1 +\n", "bad.py:1: invalid syntax"),
    ("def get_config():\n    return nothing\n", "bad.py:2: NameError: name 'nothing' is not"),
    ("x = 1\n", "has no attribute 'get_config'"),
    ("raise SystemExit('no')\n", "no"),
    (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
        "the config has no field 'seed'",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS)
def test_bad_config_files_are_one_line(
    command_line: CommandLine, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(content)
    result = command_line("--config", tmp_path / "bad.py", "--workdir", tmp_path / "run")
    assert message in one_line(result)
    assert result.returncode == 2


def test_a_missing_config_file_is_named(command_line: CommandLine, tmp_path: Path) -> None:
    result = command_line("--config", tmp_path / "none.py")
    assert "cannot read the config file" in one_line(result) and "none.py" in result.stderr
    assert result.returncode == 2
    result = command_line()
    assert "pass a config file" in one_line(result) and result.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "{}"], "holds no run: there is no config.json"),
        (["--workdir", "{}/none"], "holds no run"),
        ([], "--mode eval needs --workdir"),
        (["--workdir", "{}", "--step", "x"], "--step must be a number, latest or best"),
        (["--workdir", "{}", "--split", "tset"], "unknown split 'tset'"),
    ],
)
def test_bad_evals_are_one_line(
    command_line: CommandLine, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [argument.format(tmp_path) for argument in arguments]
    result = command_line("--mode", "eval", *filled)
    assert message in one_line(result)
    assert result.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_workdir_is_said(
    small: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = command_line(*small, "--workdir", tmp_path / "file" / "run")
    assert "cannot write to" in one_line(result) and result.returncode == 2


def test_damaged_idx_files_are_one_line(
    small: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b truncated")
    flags = ["--config.data.name=fashion_mnist", f"--config.data.data_dir={tmp_path / 'tfds'}"]
    flags += [f"--config.data.source_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    result = command_line(*small, *flags)
    assert "train-" in one_line(result) and result.returncode == 2


def test_a_full_disk_is_one_line(
    small: list[str], tmp_path: Path, command_line: CommandLine
) -> None:
    """No file may grow over 20 kB here: the nearest to a full disk that needs no root."""
    assert command_line("--mode", "prepare", *small).returncode == 0
    flags = [*small, "--config.model.hidden=200", "--workdir", str(tmp_path / "run")]
    limited = "ulimit -f 20; trap '' XFSZ; exec \"$@\""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    result = subprocess.run(
        ["bash", "-c", limited, "bash", sys.executable, "-m", "tinyvgg_jax.main", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("tinyvgg_jax: cannot") and str(tmp_path / "run") in last


def test_a_diverging_run_exits_with_1(
    small: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    result = command_line(*small, "--config.learning_rate=1e30", "--workdir", tmp_path / "run")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert "loss is not a finite number at step" in last and "--config.learning_rate" in last


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(
    small: list[str], command_line: CommandLine, tmp_path: Path
) -> None:
    flags = [*small, "--config.num_epochs=100000", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyvgg_jax.main", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output == "" and "Traceback" not in errors
    assert "Run the same command again to go on" in errors.splitlines()[-1]
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert f"interrupted at step {max(steps)};" in errors


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
