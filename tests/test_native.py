import concurrent.futures
import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tinyvgg_jax import native
from tinyvgg_jax.convolution import convolution_relu


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that did not ask for the compiled convolutions yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "available", native.available.__wrapped__)
    return tmp_path / "tinyvgg_jax" / "native"


@pytest.fixture
def compiled() -> None:
    """The functions, registered: where the tests run, there is a C compiler."""
    assert native.available()


@pytest.mark.usefixtures("compiled")
def test_runs_are_equal_bit_for_bit() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (32, 14, 14, 64))
    kernel = jax.random.normal(keys[1], (3, 3, 64, 128))
    gradient, bias = jax.random.normal(keys[2], (32, 14, 14, 128)), jnp.ones(128)
    output = jax.jit(native.convolution_relu)(images, kernel, bias)
    share, maxima = jax.jit(native.convolution_relu_pool)(images, kernel, bias)
    of_input = partial(native.input_gradient, shape=images.shape)
    calls: list[tuple[Callable[..., Any], tuple[Array, ...]]] = [
        (native.convolution_relu, (images, kernel, bias)),
        (native.convolution_relu_pool, (images, kernel, bias)),
        (of_input, (gradient, output, kernel)),
        (of_input, (share, maxima, kernel)),
        (native.parameter_gradient, (images, gradient, output)),
        (native.parameter_gradient, (images, share, maxima)),
    ]
    for function, arguments in calls:
        compiled = jax.jit(function)
        first = compiled(*arguments)
        for _ in range(5):
            jax.tree.map(np.testing.assert_array_equal, compiled(*arguments), first)


@pytest.mark.usefixtures("compiled")
def test_calls_from_many_threads_at_once() -> None:
    images = jax.random.normal(jax.random.key(0), (8, 12, 12, 16))
    kernels = jax.random.normal(jax.random.key(1), (8, 3, 3, 16, 32))
    call = jax.jit(native.convolution_relu)
    expected = [np.asarray(call(images, kernel, jnp.zeros(32))) for kernel in kernels]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call, images, kernels[i % 8], jnp.zeros(32)) for i in range(64)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(), expected[i % 8])


def test_it_is_compiled_once_and_kept(forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native._load()
    assert [path.suffix for path in forgetful.iterdir()] == [".so"]
    monkeypatch.setattr(native, "_compile", None)
    native._load()


def test_a_damaged_library_is_compiled_again(forgetful: Path) -> None:
    native._load()
    (library,) = forgetful.iterdir()
    library.unlink()
    library.write_bytes(b"not a library")
    assert isinstance(native._load(), ctypes.CDLL)
    assert library.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_is_done_without(
    forgetful: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forgetful.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert isinstance(native._load(), ctypes.CDLL)
    assert "not kept" in caplog.text


@pytest.mark.parametrize("compiler", ["none", "one that fails"])
def test_without_a_compiler_xla_does_it(
    forgetful: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler == "one that fails":
        (tmp_path / "cc").write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    with caplog.at_level(logging.INFO):
        assert not native.available()
    assert "several times slower" in caplog.text
    assert ("no C compiler" if compiler == "none" else "no licence") in caplog.text
    output = convolution_relu(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)), jnp.ones(1))
    np.testing.assert_array_equal(output.ravel(), [5, 5, 5, 5])


def test_it_can_be_turned_off(forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYVGG_JAX_NATIVE", "0")
    assert not native.available()
    assert not forgetful.exists()


@pytest.mark.slow
def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    code = "from tinyvgg_jax import native; raise SystemExit(not native.available())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "tinyvgg_jax" / "native").iterdir())) == 1
