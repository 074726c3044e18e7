from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from tinyvgg_jax import convolution, native
from tinyvgg_jax.convolution import convolution_relu

# Batch, height, width, input and output channels, kernel height and width.
MODEL_SHAPES = [
    (2, 28, 28, 1, 64, 3, 3),
    (2, 28, 28, 64, 64, 3, 3),
    (2, 14, 14, 64, 128, 3, 3),
    (2, 14, 14, 128, 128, 3, 3),
    (3, 7, 7, 128, 256, 3, 3),
    (3, 7, 7, 256, 256, 3, 3),
]
ODD_SHAPES = [
    (3, 14, 14, 16, 8, 3, 3),
    (5, 7, 9, 3, 4, 3, 3),
    (1, 1, 1, 1, 1, 3, 3),
    (1, 3, 1, 33, 17, 3, 3),
    (37, 28, 27, 5, 13, 3, 3),  # several chunks of tiles, the last of them not full
    (1, 2, 5, 2, 3, 5, 1),
    (4, 6, 6, 2, 3, 2, 4),
]


@pytest.fixture(params=["native", "patches"])
def formulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes on a CPU: compiled C, or XLA's operations alone."""
    if request.param == "native":
        assert native.available(), "a C compiler is needed to test the compiled convolutions"
    else:
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)


def reference(images: Array, kernel: Array, bias: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return jax.nn.relu(y + bias)


def draw(shape: tuple[int, ...], dtype: str) -> tuple[tuple[Array, Array, Array], Array]:
    """Images, kernel and bias; and a gradient of the output."""
    b, h, w, c_in, c_out, k_h, k_w = shape
    rng = np.random.default_rng(0)
    shapes = [(b, h, w, c_in), (k_h, k_w, c_in, c_out), (c_out,), (b, h, w, c_out)]
    images, kernel, bias, gradient = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return (images, kernel, bias), gradient


Function = Callable[[Array, Array, Array], Array]


def with_gradients(function: Function, *arguments: Array) -> list[Array]:
    """The value, and the gradients where the last of `arguments` is the output's."""

    @jax.jit
    def both(cotangent: Array, *arguments: Array) -> list[Array]:
        value, vjp = jax.vjp(function, *arguments)
        return [value, *vjp(cotangent)]

    return both(arguments[-1], *arguments[:-1])


def assert_as_xla(shape: tuple[int, ...], dtype: str, tolerance: float) -> None:
    """Compares with XLA's float32 result, up to `tolerance` times the largest value."""
    arguments, cotangent = draw(shape, dtype)
    wide = [argument.astype(jnp.float32) for argument in arguments]
    # Where the sum is zero but for rounding, ReLU's derivative may differ: leave these out.
    ours, theirs = jax.jit(convolution_relu)(*arguments), jax.jit(reference)(*wide)
    cotangent = jnp.where((ours > 0) == (theirs > 0), cotangent, 0)
    for a, b in zip(
        with_gradients(convolution_relu, *arguments, cotangent),
        with_gradients(reference, *wide, cotangent.astype(jnp.float32)),
        strict=True,
    ):
        assert a.dtype == dtype
        scale = float(jnp.abs(b).max(initial=1e-9))
        np.testing.assert_allclose(a.astype(jnp.float32) / scale, b / scale, atol=tolerance)


@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_values_and_gradients_are_those_of_xla(shape: tuple[int, ...], formulation: str) -> None:
    assert_as_xla(shape, "float32", 3e-6)


@pytest.mark.parametrize("shape", [MODEL_SHAPES[2], ODD_SHAPES[1]])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_other_dtypes(
    shape: tuple[int, ...], dtype: str, tolerance: float, formulation: str
) -> None:
    assert_as_xla(shape, dtype, tolerance)


def test_no_images_give_no_outputs(formulation: str) -> None:
    assert_as_xla((0, 4, 4, 2, 3, 3, 3), "float32", 0)


def test_what_is_not_a_number_stays_none(formulation: str) -> None:
    (images, kernel, bias), _ = draw((1, 6, 6, 2, 3, 3, 3), "float32")
    output = convolution_relu(images.at[0, 5, 5, 0].set(jnp.nan), kernel, bias)
    assert jnp.isnan(output[0, 4:, 4:]).all()
    assert jnp.isfinite(output[0, :2, :2]).all()


def test_chunks_of_every_size_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    arguments, cotangent = draw((6, 4, 4, 2, 3, 3, 3), "float32")
    expected = jax.vjp(reference, *arguments)[1](cotangent)[1]
    for pixels in (1, 16, 32, 48, 96, 1000):
        monkeypatch.setattr(convolution, "_PIXELS_PER_CHUNK", pixels)
        gradient = jax.vjp(convolution_relu, *arguments)[1](cotangent)[1]
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_kernels(formulation: str) -> None:
    (images, kernel, bias), cotangent = draw((2, 6, 6, 2, 3, 3, 3), "float32")
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradient(kernel: Array) -> Array:
        def loss(k: Array) -> Array:
            return (convolution_relu(images, k, bias) ** 2 * cotangent).sum()

        return jax.grad(loss)(kernel)

    expected = jnp.stack([gradient(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.vmap(gradient)(kernels), expected, rtol=1e-4, atol=1e-3)
