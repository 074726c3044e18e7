"""Folders of any name, on machines of any kind."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from tinyvgg_jax import UserError, restore, train_and_evaluate
from tinyvgg_jax.cache import cache_dir
from tinyvgg_jax.paths import local_path, open_regular

CommandLine = Callable[..., subprocess.CompletedProcess[str]]
Trained = tuple[Path, dict[str, Any]]


def test_a_path_is_what_a_person_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local_path("runs/a") == Path("runs/a")
    assert local_path(Path("/x/y z")) == Path("/x/y z")
    assert local_path("~/runs") == tmp_path / "runs"
    assert local_path("file:///x/y%20z") == Path("/x/y z")
    assert local_path("file://localhost/x") == Path("/x")
    (tmp_path / "odd:").mkdir()
    assert local_path(Path("odd:/x")) == Path("odd:/x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gs://bucket/run", "gs://bucket/run is not on this machine"),
        ("s3://bucket/run", "is not on this machine"),
        ("gs://[x]/run", "is not on this machine"),
        ("file://[x]/run", "is not on this machine"),
        (Path("gs://bucket/run"), "is not on this machine"),
        ("file://elsewhere/x", "is not on this machine"),
        ("~nobody-here/x", "there is no user nobody-here on this machine"),
        ("", "empty"),
    ],
)
def test_a_path_on_another_machine_is_an_error(name: str | Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        local_path(name)


def test_a_regular_file_is_opened_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path / "file", str(tmp_path / "link")):
        with open_regular(path) as file:
            assert file.read() == b"bytes"
            assert not os.get_inheritable(file.fileno())


def test_what_is_not_a_regular_file_is_refused_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # The name of a socket must be short.
    os.mkfifo("fifo")
    Path("link to fifo").symlink_to("fifo")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name in ("fifo", "link to fifo", "socket", os.devnull):
        with pytest.raises(OSError, match="not a regular file") as raised:
            open_regular(name)
        assert raised.value.strerror == "not a regular file"
        assert raised.value.filename == name
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular("missing")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular("loop")


def test_a_file_that_becomes_a_fifo_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    before, opened, really_open = (tmp_path / "file").stat(), [], os.open

    def recording_open(path: str, flags: int) -> int:
        opened.append(really_open(path, flags))
        return opened[-1]

    monkeypatch.setattr(Path, "stat", lambda _: before)
    monkeypatch.setattr(os, "open", recording_open)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "fifo")
    (descriptor,) = opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.fixture
def bars(config: ConfigDict) -> list[str]:
    """Flags that train on the small dataset."""
    names = ("name", "data_dir", "train_split", "validation_split")
    return [
        "--config=configs/quick.py",
        "--config.num_epochs=1",
        *(f"--config.data.{name}={config.data[name]}" for name in names),
    ]


@pytest.mark.parametrize("flag", ["--workdir", "--config.data.data_dir"])
def test_an_address_elsewhere_is_refused_at_once_and_makes_no_folder(
    flag: str, command_line: CommandLine, tmp_path: Path
) -> None:
    workdir = f"--workdir={tmp_path / 'run'}"
    done = command_line("--config=configs/quick.py", workdir, f"{flag}=gs://bucket/x")
    assert done.returncode == 2
    assert "gs://bucket/x is not on this machine" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "gs:").exists()


@pytest.mark.parametrize("name", ["[a] b", "back\\slash", "größe"])
def test_a_run_in_a_folder_of_any_name_is_trained_restored_and_resumed(
    config: ConfigDict, tmp_path: Path, name: str
) -> None:
    workdir = tmp_path / name / "run"
    config.num_epochs = 1
    summary = train_and_evaluate(config, workdir)
    assert restore(workdir)[0].widths == (4, 8)
    (workdir / "summary.json").unlink()
    assert train_and_evaluate(config, workdir)["test_loss"] == summary["test_loss"]


def test_a_locale_without_the_letters_of_a_path_harms_nothing(
    trained: Trained, tmp_path: Path, command_line: CommandLine
) -> None:
    workdir = tmp_path / "größe"
    shutil.copytree(trained[0], workdir)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command_line("--mode=eval", f"--workdir={workdir}", env=os.environ | plain)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == sorted(
        path.name for path in (trained[0] / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("name", ["q'\"$\\x$", os.fsdecode(b"lat\xe9")])
def test_a_terminal_without_the_letters_of_a_path_harms_nothing(
    trained: Trained, tmp_path: Path, command_line: CommandLine, name: str
) -> None:
    workdir = tmp_path / name
    shutil.copytree(trained[0], workdir)
    strict = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    for arguments in (
        ["--mode=eval", f"--workdir={workdir}"],
        ["--mode=compare", workdir, trained[0], f"--output={tmp_path / 'plot.png'}"],
        ["--mode=explain", f"--workdir={workdir}", "tests/pictures/t-shirt.jpg"],
    ):
        done = command_line(*arguments, env=strict)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert (tmp_path / "plot.png").exists()


def test_a_flag_file_may_name_a_recipe_and_must_be_text(
    tmp_path: Path, command_line: CommandLine
) -> None:
    (tmp_path / "flags").write_text("--config=quik\n")
    done = command_line(f"--flagfile={tmp_path / 'flags'}")
    assert done.returncode == 2
    assert "did you mean 'quick'?" in done.stderr
    (tmp_path / "flags").write_bytes(b"\xff\xfe\n")
    done = command_line(f"--flagfile={tmp_path / 'flags'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_under_x64_a_run_is_evaluated_and_resumed_as_ever(
    trained: Trained, tmp_path: Path, command_line: CommandLine
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    done = command_line("--mode=eval", f"--workdir={workdir}", env=environment)
    assert done.returncode == 0, done.stderr
    assert f"{trained[1]['test_accuracy']:.2%}" in done.stdout
    (workdir / "summary.json").unlink()
    program = (
        "import json, sys; from tinyvgg_jax import train_and_evaluate as t;"
        "print(json.dumps(t(json.load(open(sys.argv[1] + '/config.json')), sys.argv[1])))"
    )
    resumed = subprocess.run(
        [sys.executable, "-c", program, str(workdir)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["test_accuracy"] == trained[1]["test_accuracy"]
    assert not (workdir / "checkpoints.damaged").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_training_under_x64_is_training_in_float32(
    config: ConfigDict, tmp_path: Path, optimizer: str
) -> None:
    config.num_epochs, config.optimizer, config.ema_decay = 1, optimizer, 0.9
    expected = train_and_evaluate(config, tmp_path / "32")
    jax.config.update("jax_enable_x64", True)
    try:
        found = train_and_evaluate(config, tmp_path / "64")
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found["test_loss"] == expected["test_loss"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_training_warns_and_goes_on(
    config: ConfigDict,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path)
    assert "has no locks" in caplog.text


def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(
    trained: Trained, tmp_path: Path, command_line: CommandLine
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    # A file in the place of the folder stands for a disk that may only be read.
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    (workdir / "evaluation").write_text("")
    done = command_line("--mode=eval", f"--workdir={workdir}")
    assert done.returncode == 2
    assert f"{trained[1]['test_accuracy']:.2%}" in done.stdout
    assert "cannot write to" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "ipympl"])
def test_a_notebooks_plotting_backend_is_no_hindrance(
    trained: Trained, tmp_path: Path, command_line: CommandLine, backend: str
) -> None:
    environment = os.environ | {"MPLBACKEND": backend}
    shutil.copytree(trained[0], tmp_path / "run")
    done = command_line("--mode=eval", f"--workdir={tmp_path / 'run'}", env=environment)
    assert done.returncode == 0, done.stderr


def one_line_without_a_gpu(done: subprocess.CompletedProcess[str]) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU, so that nothing is missing")
    assert done.returncode == 2
    assert "tinyvgg_jax: JAX finds no device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--mode=eval"], ["--mode=predict", "tests/pictures/t-shirt.jpg"]]
)
def test_a_device_that_is_not_there_is_one_line(
    trained: Trained, command_line: CommandLine, arguments: list[str]
) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = command_line(*arguments, f"--workdir={trained[0]}", env=environment)
    one_line_without_a_gpu(done)


def test_training_without_the_device_is_one_line(
    bars: list[str], tmp_path: Path, command_line: CommandLine
) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "gpu"}
    one_line_without_a_gpu(command_line(*bars, f"--workdir={tmp_path}", env=environment))


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "gs://bucket/cache")
    assert cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/tinyvgg_jax")


AS_NOBODY = """
import pwd, sys
def nobody(*_): raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = nobody
from tinyvgg_jax import main
sys.exit(main.main(["main", *sys.argv[1:]]))
"""


def test_a_user_without_home_and_name_trains_and_evaluates(bars: list[str], tmp_path: Path) -> None:
    of_the_user = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    environment = {name: os.environ[name] for name in os.environ if name not in of_the_user}

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    trained = run(*bars, f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    evaluated = run("--mode=eval", f"--workdir={tmp_path / 'run'}")
    assert evaluated.returncode == 0, evaluated.stderr
    homeless = run("--config=configs/quick.py", f"--workdir={tmp_path / 'other'}")
    assert homeless.returncode == 2
    assert "no home folder to keep datasets in; pass --config.data.data_dir" in homeless.stderr
    assert len(homeless.stderr.splitlines()) == 1
