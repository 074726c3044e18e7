"""The convolutions of `winograd.c` as JAX functions; the first call of `available` compiles them.

They need a C compiler (`$CC`, `cc`, `gcc` or `clang`). If there is none, or it fails, which logs a
warning, `available` returns False and the caller uses XLA's own operations. Setting
`TINYVGG_JAX_NATIVE=0` in the environment turns them off.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tinyvgg_jax import cache
from tinyvgg_jax.ops.varying import vary_alike

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("winograd.c")
# They are included by the source, which is all that is compiled.
_HEADERS = tuple(sorted(_SOURCE.parent.glob("*.h")))
_TARGETS = (
    "tinyvgg_convolution_relu",
    "tinyvgg_convolution_relu_pool",
    "tinyvgg_input_gradient",
    "tinyvgg_parameter_gradient",
)
# -fno-trapping-math lets the compiler vectorise conditions. None of these lets it reorder a sum or
# assume that there is no NaN, as -ffast-math would.
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
# A compiler that takes longer than this hangs; it usually takes a few seconds.
_COMPILE_SECONDS = 120


def convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `relu(convolution(images, kernel) + bias)` with stride 1 and SAME padding.

    Args:
        images: `[B, H, W, C]`, float32 or bfloat16.
        kernel: `[3, 3, C, O]`, the same dtype.
        bias: `[O]`, the same dtype.

    Returns:
        `[B, H, W, O]`, the same dtype.
    """
    shape = (*images.shape[:3], kernel.shape[3])
    return _call("tinyvgg_convolution_relu", _like(images, shape), images, kernel, bias)


def convolution_relu_pool(images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """Computes `convolution_relu` with 2x2 max pooling, and which pixels are the maxima.

    Args:
        images: `[B, H, W, C]`, float32 or bfloat16.
        kernel: `[3, 3, C, O]`, the same dtype.
        bias: `[O]`, the same dtype.

    Returns:
        The pooled output, `[B, H // 2, W // 2, O]`, the same dtype, and a uint8 mask of its shape.
        Bit 2i + j of the mask is set if pixel (i, j) of the 2x2 square is the maximum. No bit is
        set if the maximum is not positive, because then ReLU lets no gradient through.
    """
    B, H, W, _ = images.shape
    shape = (B, H // 2, W // 2, kernel.shape[3])
    results = (_like(images, shape), jax.ShapeDtypeStruct(shape, jnp.uint8))
    return _call("tinyvgg_convolution_relu_pool", results, images, kernel, bias)


def input_gradient(gradient: Array, gate: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """Computes the gradient of the images of one of the two operations above.

    Args:
        gradient: the output's gradient, float32 or bfloat16. With pooling, each square's gradient
            divided by its number of maxima, because each of them receives an equal part.
        gate: where the gradient goes through, of the shape of `gradient`: the output of
            `convolution_relu`, the dtype of `gradient`, or the mask of `convolution_relu_pool`.
        kernel: `[3, 3, C, O]`, the dtype of `gradient`.
        shape: `(B, H, W, C)`, the shape of the images.

    Returns:
        `[B, H, W, C]`, the dtype of `gradient`.
    """
    return _call("tinyvgg_input_gradient", _like(gradient, shape), gradient, gate, kernel)


def parameter_gradient(images: Array, gradient: Array, gate: Array) -> tuple[Array, Array]:
    """Computes the gradients of kernel and bias of one of the two operations above.

    Args:
        images: `[B, H, W, C]`, the dtype of `gradient`.
        gradient: as for `input_gradient`.
        gate: as for `input_gradient`.

    Returns:
        `[3, 3, C, O]` and `[O]`, the same dtype.
    """
    C_in, C_out = images.shape[3], gradient.shape[3]
    results = (_like(images, (3, 3, C_in, C_out)), _like(images, (C_out,)))
    return _call("tinyvgg_parameter_gradient", results, images, gradient, gate)


def _like(array: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _result(array: jax.ShapeDtypeStruct, kind: Any) -> jax.ShapeDtypeStruct:
    """Describes a result that varies over the mesh axes of an operand of type `kind`."""
    axes = kind.manual_axis_type
    if not axes.varying:
        return array
    # JAX checks the axes against a mesh, which it takes from the sharding.
    mesh = kind.sharding.mesh
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding, manual_axis_type=axes)


def _call(target: str, results: Any, *arguments: Array) -> Any:
    arguments = vary_alike(*arguments)
    results = jax.tree.map(partial(_result, kind=jax.typeof(arguments[0])), results)
    # Under vmap the calls run one after another, because each of them uses all cores already.
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(*arguments)


class _NoCompilerError(OSError):
    """This machine has no C compiler."""


@functools.cache
def available() -> bool:
    """Tells whether the functions above can be used; the first call compiles and registers them."""
    if os.environ.get("TINYVGG_JAX_NATIVE") == "0":
        return False
    try:
        library = _load()
        for target in _TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        # Having no compiler is normal; a compiler that fails deserves a warning.
        logger.log(
            logging.INFO if isinstance(error, _NoCompilerError) else logging.WARNING,
            "Convolutions run as XLA compiles them, several times slower on a CPU: %s",
            str(error).strip(),
        )
        return False
    return True


def _load() -> ctypes.CDLL:
    """Loads the shared library from the cache folder, or compiles it and keeps it there."""
    compiler = _compiler()
    name = f"native/{hashlib.sha256(repr(_identity(compiler)).encode()).hexdigest()[:16]}.so"
    kept = cache.find(name)
    if kept is not None:
        # It may be intact and not load, from a folder where nothing may be executed.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(os.fspath(kept))
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / Path(name).name
        _compile(compiler, library)
        loaded = ctypes.CDLL(os.fspath(library))
        try:
            cache.keep(name, lambda file: file.write(library.read_bytes()))
        except OSError as error:
            logger.info("The compiled convolutions are not kept for the next start: %s", error)
    return loaded


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise _NoCompilerError("no C compiler (cc, gcc or clang) was found")


def _identity(compiler: str) -> list[str]:
    """Lists everything that the compiled code depends on, including this processor's features.

    A home folder may be shared by machines with different processors.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    stat = Path(compiler).stat()
    return [
        *(file.read_text(encoding="utf-8") for file in (_SOURCE, *_HEADERS)),
        *_FLAGS,
        compiler,
        str(stat.st_mtime_ns),
        jax.__version__,
        platform.machine(),
        features,
    ]


def _compile(compiler: str, library: Path) -> None:
    include = f"-I{jax.ffi.include_dir()}"
    # The messages are searched for the word "error" below, so they must be in English.
    environment = os.environ | {"LC_ALL": "C"}
    # Some compilers do not know -march=native for their processor; then they do without.
    for processor in (["-march=native"], []):
        command = [compiler, *_FLAGS, *processor, include, str(_SOURCE), "-o", str(library)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            check=False,
            env=environment,
        )
        if done.returncode == 0:
            return
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error:" in line), lines[-1])
    raise OSError(f"{compiler} failed: {first}")
