import concurrent.futures
import ctypes
import logging
import os
import platform
import shutil
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

from tinyvgg_jax import cache
from tinyvgg_jax.benchmark.processor import find_processor
from tinyvgg_jax.ops import winograd
from tinyvgg_jax.ops.convolution import convolution_relu


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that did not ask for the compiled convolutions yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(winograd, "available", winograd.available.__wrapped__)
    return tmp_path / "tinyvgg_jax" / "native"


@pytest.fixture
def compiled() -> None:
    """The functions, registered: where the tests run, there is a C compiler."""
    assert winograd.available()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_are_equal_bit_for_bit(dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (32, 14, 14, 64), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, 64, 128), dtype)
    gradient, bias = jax.random.normal(keys[2], (32, 14, 14, 128), dtype), jnp.ones(128, dtype)
    output = jax.jit(winograd.convolution_relu)(images, kernel, bias)
    share, maxima = jax.jit(winograd.convolution_relu_pool)(images, kernel, bias)
    of_input = partial(winograd.input_gradient, shape=images.shape)
    calls: list[tuple[Callable[..., Any], tuple[Array, ...]]] = [
        (winograd.convolution_relu, (images, kernel, bias)),
        (winograd.convolution_relu_pool, (images, kernel, bias)),
        (of_input, (gradient, output, kernel)),
        (of_input, (share, maxima, kernel)),
        (winograd.parameter_gradient, (images, gradient, output)),
        (winograd.parameter_gradient, (images, share, maxima)),
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
    call = jax.jit(winograd.convolution_relu)
    expected = [np.asarray(call(images, kernel, jnp.zeros(32))) for kernel in kernels]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(call, images, kernels[i % 8], jnp.zeros(32)) for i in range(64)]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(), expected[i % 8])


def every_result(dtype: str) -> list[Array]:
    """The results of all four functions, for channels that fill no vector and no pair."""
    keys = jax.random.split(jax.random.key(0), 4)
    images = jax.random.normal(keys[0], (5, 7, 6, 19), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, 19, 37), dtype) / 8
    bias = jax.random.normal(keys[2], (37,), dtype)
    output = winograd.convolution_relu(images, kernel, bias)
    pooled, maxima = winograd.convolution_relu_pool(images, kernel, bias)
    results = [output, pooled]
    for gate in (jnp.ones_like(output), jnp.full_like(maxima, 6)):
        gradient = jax.random.normal(keys[3], gate.shape, dtype)
        results.append(winograd.input_gradient(gradient, gate, kernel, images.shape))
        results.extend(winograd.parameter_gradient(images, gradient, gate))
    return results


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
@pytest.mark.parametrize(
    ("option", "instructions"),
    [
        ("-mno-avx", "AVX2"),
        pytest.param("-mno-avx512f", "AVX-512F", marks=pytest.mark.slow),
        pytest.param("-mno-avx512bf16", "AVX512_BF16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("compiled")
def test_processors_with_shorter_vectors_agree(
    option: str, instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions not in find_processor().instructions:
        pytest.skip(f"this processor has no {instructions} to leave out")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {winograd._compiler()} "$@" {option}\n')
    compiler.chmod(0o755)
    winograd._compile(str(compiler), tmp_path / "winograd.so")
    library = ctypes.CDLL(str(tmp_path / "winograd.so"))
    expected = {dtype: every_result(dtype) for dtype in ("float32", "bfloat16")}
    call, name = winograd._call, f"{{}}_{option}"
    for target in winograd._TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(name.format(target), handler, platform="cpu")
    monkeypatch.setattr(winograd, "_call", lambda target, *a: call(name.format(target), *a))
    for dtype, tolerance in (("float32", 3e-6), ("bfloat16", 1e-2)):
        for a, b in zip(every_result(dtype), expected[dtype], strict=True):
            assert a.dtype == dtype
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(
                a.astype(jnp.float32) / scale, b.astype(jnp.float32) / scale, atol=tolerance
            )


def test_it_is_compiled_once_and_kept(forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winograd._load()
    assert [path.suffix for path in forgetful.iterdir()] == [".so"]
    monkeypatch.setattr(winograd, "_compile", None)
    winograd._load()


def test_every_file_that_is_compiled_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library of other sources is another one, so that none is used that is out of date."""
    identity = partial(winograd._identity, winograd._compiler())
    before = identity()
    for file in (winograd._SOURCE, *winograd._HEADERS):
        (tmp_path / file.name).write_text(file.read_text() + "\n")
    with monkeypatch.context() as patched:
        patched.setattr(winograd, "_SOURCE", tmp_path / winograd._SOURCE.name)
        assert identity() != before
    with monkeypatch.context() as patched:
        changed = tmp_path / winograd._HEADERS[-1].name
        patched.setattr(winograd, "_HEADERS", (*winograd._HEADERS[:-1], changed))
        assert identity() != before
    assert identity() == before


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("library") / "winograd.so"
    winograd._compile(winograd._compiler(), library)
    return library


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, compiled_once: Path) -> list[Path]:
    """Compiles at once, and lists what was compiled."""
    calls: list[Path] = []

    def compile_again(_: str, library: Path) -> None:
        calls.append(library)
        shutil.copyfile(compiled_once, library)

    monkeypatch.setattr(winograd, "_compile", compile_again)
    return calls


def half_zeros(raw: bytes) -> bytes:
    return raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)


# Each of the first three would end the process if it were loaded.
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:4096],
        lambda raw: raw[: len(raw) // 2],
        half_zeros,
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda _: b"not a library",
        # Another library, whole, but not this one.
        lambda raw: raw[:-32] + b"of another version",
        None,
    ],
    ids=["cut", "half", "half zeros", "flipped", "text", "another", "folder"],
)
def test_a_damaged_library_is_compiled_again(
    forgetful: Path, quick_compiler: list[Path], damage: Callable[[bytes], bytes] | None
) -> None:
    winograd._load()
    (library,) = forgetful.iterdir()
    raw = library.read_bytes()
    library.unlink()  # It is loaded, and must not be written to.
    library.mkdir() if damage is None else library.write_bytes(damage(raw))
    assert isinstance(winograd._load(), ctypes.CDLL)
    assert len(quick_compiler) == 2
    assert library.read_bytes() == raw and list(forgetful.iterdir()) == [library]


def test_a_damaged_library_that_cannot_be_replaced_is_compiled_elsewhere(
    forgetful: Path, quick_compiler: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> Path:
        raise OSError("Read-only file system")

    winograd._load()
    (library,) = forgetful.iterdir()
    library.unlink()
    library.write_bytes(b"damaged")
    monkeypatch.setattr(cache, "keep", read_only)
    loaded = winograd._load()
    assert all(hasattr(loaded, target) for target in winograd._TARGETS)
    assert not loaded._name.startswith(str(forgetful))
    assert library.read_bytes() == b"damaged"


def test_a_cache_that_cannot_be_written_is_done_without(
    forgetful: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forgetful.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert isinstance(winograd._load(), ctypes.CDLL)
    assert "not kept" in caplog.text


def test_where_there_is_a_compiler_it_compiles_them() -> None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    if any(name and shutil.which(name) for name in names):
        assert winograd.available()


@pytest.fixture
def install_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None], None]:
    """Makes a shell script the only compiler of this machine, or leaves it none."""

    def install(script: str | None) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        if script is not None:
            (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "cc").chmod(0o755)

    return install


REFUSES = """\
echo 'winograd.c: In function f:' >&2
echo 'winograd.c:7:3: error: unknown type name' >&2
echo 'winograd.c:9:1: error: what follows from the first' >&2
exit 1"""


@pytest.mark.parametrize(
    ("script", "level", "message"),
    [
        (None, logging.INFO, "no C compiler"),
        (REFUSES, logging.WARNING, "cc failed: winograd.c:7:3: error: unknown type name"),
        ("echo no licence >&2; exit 1", logging.WARNING, "cc failed: no licence"),
        ("exit 3", logging.WARNING, "cc failed: exit status 3"),
        # The last argument is the library's name.
        ('for name; do :; done; echo text > "$name"', logging.WARNING, ".so: "),
    ],
    ids=["no compiler", "errors", "no error line", "silence", "not a library"],
)
@pytest.mark.usefixtures("forgetful")
def test_xla_does_it_where_nothing_is_compiled_and_a_failure_is_a_warning(
    install_compiler: Callable[[str | None], None],
    caplog: pytest.LogCaptureFixture,
    script: str | None,
    level: int,
    message: str,
) -> None:
    install_compiler(script)
    with caplog.at_level(logging.DEBUG, "tinyvgg_jax"):
        assert not winograd.available()
    (record,) = caplog.records
    assert record.levelno == level
    assert "several times slower" in record.getMessage() and message in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    assert "what follows" not in record.getMessage()
    output = convolution_relu(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)), jnp.ones(1))
    np.testing.assert_array_equal(output.ravel(), [5, 5, 5, 5])


def test_it_can_be_turned_off_and_says_nothing(
    forgetful: Path,
    monkeypatch: pytest.MonkeyPatch,
    install_compiler: Callable[[str | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    install_compiler(REFUSES)
    monkeypatch.setenv("TINYVGG_JAX_NATIVE", "0")
    with caplog.at_level(logging.DEBUG, "tinyvgg_jax"):
        assert not winograd.available()
    assert not caplog.records
    assert not forgetful.exists()


@pytest.mark.slow
def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    code = "from tinyvgg_jax.ops import winograd; raise SystemExit(not winograd.available())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "tinyvgg_jax" / "native").iterdir())) == 1
