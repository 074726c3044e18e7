"""Ctrl-C, wherever it comes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from tinyvgg_jax import main
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.signals import ctrl_c


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before


class Library:
    """Python calls `__del__` in a place from which no exception gets out."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_ctrl_c_in_a_callback_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), ctrl_c(lambda: None) as pressed:
        library = Library()
        del library
        assert pressed.is_set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.01)


def test_an_error_that_a_library_makes_of_ctrl_c_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise UserError("all checkpoints are damaged") from error
        return 0

    monkeypatch.setitem(main.MODES, "train", main.Mode(run))
    assert main.main(["main", "--mode=train"]) == 130
    assert capsys.readouterr().err == "tinyvgg_jax: interrupted; nothing that was saved is lost.\n"


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c(lambda: None) as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert not pressed.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_library_is_kept_quiet_is_answered() -> None:
    code = (
        "import os, sys; from tinyvgg_jax.export.loaded import quiet\n"
        "with quiet(): os.write(2, b'from C++\\n'); print('interrupted', file=sys.stderr); "
        "os._exit(130)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path: Path) -> None:
    arguments = ["--mode", "predict", "--workdir", str(tmp_path), "x.png"]
    for moment in range(8):
        process = subprocess.Popen(
            [sys.executable, "-m", "tinyvgg_jax.main", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # An extension module that the command line imports; before that, Python itself starts.
        while "_yaml" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
        time.sleep(0.2 * moment)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        # It ended by the signal, or by `main`, or before: there is no run in the folder.
        assert process.returncode in (-signal.SIGINT, 130, 2), errors
        assert len(errors.splitlines()) <= 1 and "Traceback" not in errors
