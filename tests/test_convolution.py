import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from tinyvgg_jax.ops import convolution, winograd
from tinyvgg_jax.ops.convolution import convolution_relu, convolution_relu_pool
from tinyvgg_jax.ops.pooling import lean_max_pool_2x2

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
    """Selects the formulation of a convolution on a CPU: compiled C, or XLA's operations alone."""
    if request.param == "native":
        assert winograd.available(), "a C compiler is needed to test the compiled convolutions"
    else:
        monkeypatch.setattr(winograd, "available", lambda: False)
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
    # A function of its own, or `jit` would return what it compiled for another formulation.
    ours = jax.jit(lambda *arguments: convolution_relu(*arguments))(*arguments)
    theirs = jax.jit(reference)(*wide)
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


@pytest.mark.parametrize("shape", MODEL_SHAPES[:2] + ODD_SHAPES[:5])
def test_bfloat16_in_c(shape: tuple[int, ...]) -> None:
    assert winograd.available()
    # Half the distance of neighbouring bfloat16 numbers is 2e-3 times their size.
    assert_as_xla(shape, "bfloat16", 1e-2)


def test_no_images_give_no_outputs(formulation: str) -> None:
    assert_as_xla((0, 4, 4, 2, 3, 3, 3), "float32", 0)


@pytest.mark.parametrize("function", [convolution_relu, convolution_relu_pool])
def test_where_the_images_are_black_the_output_is_the_bias(
    function: Function, formulation: str
) -> None:
    # A garment on black. With rounding errors from the pixels nearby, ReLU would let some of them
    # through where the bias is zero, as it is at first, and the bias would receive a gradient.
    arguments, _ = draw((8, 16, 16, 1, 8, 3, 3), "float32")
    images = jnp.zeros_like(arguments[0]).at[:, 4:10, 5:11].set(arguments[0][:, 4:10, 5:11])
    output = function(images, arguments[1], jnp.zeros(8))
    side = 16 // output.shape[1]
    black = jnp.ones((16, 16), bool).at[3:11, 4:12].set(False)
    black = black.reshape(16 // side, side, 16 // side, side).all(axis=(1, 3))
    assert (output[:, black] == 0).all()
    assert (output[:, ~black] > 0).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_a_number_stays_none(dtype: str, formulation: str) -> None:
    (images, kernel, bias), _ = draw((1, 6, 6, 2, 3, 3, 3), dtype)
    output = convolution_relu(images.at[0, 5, 5, 0].set(jnp.nan), kernel, bias)
    assert jnp.isnan(output[0, 4:, 4:]).all()
    assert jnp.isfinite(output[0, :2, :2]).all()


def test_chunks_of_every_size_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "available", lambda: False)
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


def one_after_the_other(images: Array, kernel: Array, bias: Array) -> Array:
    return lean_max_pool_2x2(convolution_relu(images, kernel, bias))


def assert_pooled_alike(*arguments: Array, tolerance: float = 3e-6) -> None:
    """The fused operation against its two parts: equal values, gradients but for rounding."""
    cotangent = jnp.asarray(
        np.random.default_rng(1).normal(size=one_after_the_other(*arguments).shape),
        arguments[0].dtype,
    )
    fused = with_gradients(convolution_relu_pool, *arguments, cotangent)
    parts = with_gradients(one_after_the_other, *arguments, cotangent)
    np.testing.assert_array_equal(fused[0], parts[0])
    for a, b in zip(fused[1:], parts[1:], strict=True):
        assert a.dtype == b.dtype
        scale = float(jnp.abs(b).max(initial=1e-9))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


# Without the C code it is its two parts, so there is nothing to compare.
in_c = pytest.mark.parametrize("formulation", ["native"], indirect=True)


@in_c
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_with_pooling(shape: tuple[int, ...], formulation: str) -> None:
    assert_pooled_alike(*draw(shape, "float32")[0])


@in_c
@pytest.mark.parametrize("shape", [(2, 6, 6, 2, 3, 3, 3), ODD_SHAPES[1], MODEL_SHAPES[3]])
def test_with_pooling_in_another_dtype(shape: tuple[int, ...], formulation: str) -> None:
    arguments, _ = draw(shape, "bfloat16")
    np.testing.assert_array_equal(
        convolution_relu_pool(*arguments), one_after_the_other(*arguments)
    )
    # The maxima are those of the rounded pixels, many of which are equal, in both.
    assert_pooled_alike(*arguments, tolerance=1e-2)


@in_c
def test_equal_maxima_share_the_gradient(formulation: str) -> None:
    # Without texture all four of a square are equal, as on the black around a garment.
    images, kernel, bias = jnp.zeros((1, 4, 6, 2)), jnp.ones((3, 3, 2, 20)), jnp.ones(20)
    # The maximum -1 is one of ReLU's zeros, and so is 0.
    assert_pooled_alike(images, kernel, bias.at[::3].set(-1).at[1::3].set(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_pooling_what_is_not_a_number_stays_none(dtype: str, formulation: str) -> None:
    (images, kernel, bias), _ = draw((1, 8, 8, 2, 3, 3, 3), dtype)
    # A pixel that the squares around see with another of their four.
    for row, column in ((4, 4), (4, 5), (5, 4), (5, 5)):
        output = convolution_relu_pool(images.at[0, row, column].set(jnp.nan), kernel, bias)
        seen = jnp.zeros((4, 4), bool)
        for h in range(row - 1, row + 2):
            for w in range(column - 1, column + 2):
                seen = seen.at[h // 2, w // 2].set(True)
        assert jnp.isnan(output[0][seen]).all()


@pytest.mark.parametrize("function", [convolution_relu, convolution_relu_pool])
def test_relu_lets_not_even_infinity_through(function: Function, formulation: str) -> None:
    (images, kernel, _), _ = draw((1, 8, 8, 2, 3, 3, 3), "float32")
    # Only the last channel is alive.
    output, vjp = jax.vjp(function, images, kernel, jnp.array([-100.0, -100.0, 100.0]))
    gradient = jnp.ones(output.shape).at[..., :2].set(jnp.inf)
    for leaf in vjp(gradient):
        assert jnp.isfinite(leaf).all()


def test_with_pooling_under_vmap(formulation: str) -> None:
    (images, kernel, bias), _ = draw((2, 6, 6, 2, 3, 3, 3), "float32")

    def gradient(kernel: Array) -> Array:
        return jax.grad(lambda k: (convolution_relu_pool(images, k, bias) ** 2).sum())(kernel)

    kernels = jnp.stack([kernel, 2 * kernel])
    expected = jnp.stack([gradient(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.vmap(gradient)(kernels), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", [convolution_relu, convolution_relu_pool])
def test_other_platforms_get_what_is_xlas_alone(function: Function, dtype: str) -> None:
    assert winograd.available()
    arguments, _ = draw((2, 6, 6, 2, 3, 3, 3), dtype)
    gradient = jax.jit(jax.grad(lambda *a: function(*a).sum(), argnums=(0, 1, 2)))
    for platform, calls_c in (("cpu", True), ("cuda", False)):
        lowered = gradient.trace(*arguments).lower(lowering_platforms=(platform,))
        assert ("tinyvgg_" in lowered.as_text()) == calls_c


def test_the_fused_operation_of_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced on a machine with a C compiler, and lowered for a device that has no use for it.
    assert winograd.available()
    choose = lax.platform_dependent

    def as_elsewhere(*arguments: Array, default: Function, **platforms: Function) -> Array:
        return choose(*arguments, default=default)

    monkeypatch.setattr(lax, "platform_dependent", as_elsewhere)
    for shape in MODEL_SHAPES[1:3] + ODD_SHAPES[:2]:
        assert_pooled_alike(*draw(shape, "float32")[0])


def test_the_fused_operation_keeps_a_byte_for_each_square() -> None:
    assert winograd.available()
    (images, kernel, bias), _ = draw((2, 8, 8, 3, 16, 3, 3), "float32")
    _, vjp = jax.vjp(convolution_relu_pool, images, kernel, bias)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(vjp)}
    assert kept == {
        (images.shape, "float32"),
        (kernel.shape, "float32"),
        ((2, 4, 4, 16), "uint8"),
    }


# On a GPU


def test_kernel_gradients_of_several_runs_are_what_xla_knows_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The groups are of the batch; with groups of features, XLA would run them forwards."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def loss(kernel: Array, images: Array) -> Array:
        return convolution_relu(images, kernel, jnp.zeros(8)).sum()

    runs = (jnp.zeros((5, 3, 3, 4, 8)), jnp.zeros((5, 16, 12, 12, 4)))
    gradients = jax.jit(jax.vmap(jax.grad(loss)))
    text = gradients.trace(*runs).lower(lowering_platforms=("cuda",)).as_text()
    pattern = r"batch_group_count = (\d+) : i64.*feature_group_count = (\d+) : i64"
    assert sorted(re.findall(pattern, text)) == [("1", "5"), ("5", "1")]


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None)])
def test_kernel_gradients_of_several_runs_are_those_of_each(axes: tuple[int | None, ...]) -> None:
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 6, 3), (3, 3, 3, 4), (2, 7, 6, 4))
    arrays = [
        jnp.asarray(rng.standard_normal(shape if axis is None else (5, *shape)), jnp.float32)
        for shape, axis in zip(shapes, axes, strict=True)
    ]
    found = jax.vmap(convolution._kernel_gradient, in_axes=axes)(*arrays)
    for run in range(5):
        own = [a if axis is None else a[run] for a, axis in zip(arrays, axes, strict=True)]
        expected = convolution._kernel_gradient(*own)
        np.testing.assert_allclose(found[run], expected, rtol=1e-5, atol=1e-5)
