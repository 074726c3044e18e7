"""The model under JAX's transformations, beside a network of plain `lax` operations."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG, load_predictor, train_and_evaluate
from tinyvgg_jax.model import ConvReLU, apply
from tinyvgg_jax.report.evaluation import evaluate_checkpoint

MODEL = TinyVGG(widths=(3, 4), convs_per_block=2, hidden=6, num_classes=5)
Loss = Callable[[Any, Array], Array]


def plain_network(params: Any, images: Array) -> Array:
    """`MODEL`, written with `lax` alone."""
    x = images
    for block in (1, 2):
        for layer in (1, 2):
            weights = params[f"conv{block}_{layer}"]
            x = lax.conv_general_dilated(
                x,
                weights["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jnp.maximum(x + weights["bias"].reshape(1, 1, 1, -1), 0)
        B, H, W, C = x.shape
        squares = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
        x = squares.max(axis=(2, 4))
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    x = jnp.maximum(x @ params["dense"]["kernel"] + params["dense"]["bias"][None], 0)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"][None]


def model_network(params: Any, images: Array) -> Array:
    return apply(MODEL, params, images)


def native_network(params: Any, images: Array) -> Array:
    return apply(MODEL.clone(native=True), params, images)


def loss_of(network: Callable[[Any, Array], Array]) -> Loss:
    return lambda params, images: (network(params, images) ** 2).sum()


@pytest.fixture(scope="module")
def images() -> Array:
    return jnp.asarray(np.random.default_rng(1).random((4, 9, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def params(images: Array) -> Any:
    fresh = jax.jit(MODEL.init)(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)
    # Biases begin at zero, which would hide a bias that is left out.
    return jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), fresh
    )


def jvp(loss: Loss, params: Any, images: Array) -> Any:
    return jax.jvp(loss, (params, images), (params, images))


def linearize(loss: Loss, params: Any, images: Array) -> Any:
    value, tangent = jax.linearize(loss, params, images)
    return value, tangent(params, images)


def jacfwd(loss: Loss, params: Any, images: Array) -> Any:
    return jax.jacfwd(loss, argnums=1)(params, images)


def jacrev(loss: Loss, params: Any, images: Array) -> Any:
    return jax.jacrev(loss)(params, images)


def gradient_penalty(loss: Loss, params: Any, images: Array) -> Any:
    def penalty(params: Any) -> Array:
        return (jax.grad(loss, argnums=1)(params, images) ** 2).sum()

    return jax.grad(penalty)(params)


def hessian_vector_product(loss: Loss, params: Any, images: Array) -> Any:
    return jax.jvp(lambda p: jax.grad(loss)(p, images), (params,), (params,))[1]


def reverse_over_forward(loss: Loss, params: Any, images: Array) -> Any:
    return jax.grad(lambda p: jax.jvp(lambda i: loss(p, i), (images,), (images,))[1])(params)


def forward_over_forward(loss: Loss, params: Any, images: Array) -> Any:
    def slope(p: Any) -> Array:
        return jax.jvp(lambda i: loss(p, i), (images,), (images,))[1]

    return jax.jvp(slope, (params,), (params,))


def vmap_over_images(loss: Loss, params: Any, images: Array) -> Any:
    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, images[:, None])


def vmap_over_parameters(loss: Loss, params: Any, images: Array) -> Any:
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    return jax.vmap(jax.grad(loss), in_axes=(0, None))(many, images)


def vmap_over_both(loss: Loss, params: Any, images: Array) -> Any:
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    return jax.vmap(jax.grad(loss))(many, images.reshape(2, 2, *images.shape[1:]))


def remat(loss: Loss, params: Any, images: Array) -> Any:
    return jax.grad(jax.checkpoint(loss))(params, images)


def scan(loss: Loss, params: Any, images: Array) -> Any:
    def step(p: Any, image: Array) -> tuple[Any, Array]:
        value, gradient = jax.value_and_grad(loss)(p, image[None])
        return jax.tree.map(lambda leaf, g: leaf - 0.01 * g, p, gradient), value

    return lax.scan(step, params, images)


def empty_batch(loss: Loss, params: Any, images: Array) -> Any:
    return jax.value_and_grad(loss)(params, images[:0])


def shard_map(loss: Loss, params: Any, images: Array) -> Any:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def total(params: Any, images: Array) -> Array:
        return lax.psum(loss(params, images), "data")

    sharded = jax.shard_map(
        jax.grad(total),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    return jax.jit(sharded)(params, images)


def explicit_mesh_axes(loss: Loss, params: Any, images: Array) -> Any:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        return jax.device_get(jax.jit(jax.grad(loss))(params, images))


@pytest.mark.parametrize(
    "transformation",
    [
        jvp,
        linearize,
        jacfwd,
        jacrev,
        gradient_penalty,
        hessian_vector_product,
        reverse_over_forward,
        forward_over_forward,
        vmap_over_images,
        vmap_over_parameters,
        vmap_over_both,
        remat,
        scan,
        empty_batch,
    ],
)
def test_the_model_is_transformed_like_a_plain_network(
    transformation: Callable[[Loss, Any, Array], Any], params: Any, images: Array
) -> None:
    ours = jax.jit(lambda p, i: transformation(loss_of(model_network), p, i))(params, images)
    theirs = jax.jit(lambda p, i: transformation(loss_of(plain_network), p, i))(params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("transformation", [shard_map, explicit_mesh_axes])
def test_the_model_is_sharded_like_a_plain_network(
    transformation: Callable[[Loss, Any, Array], Any], params: Any, images: Array
) -> None:
    ours = transformation(loss_of(model_network), params, images)
    theirs = jax.grad(loss_of(plain_network))(params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_debug_nans", True),
        ("jax_disable_jit", True),
        ("jax_enable_x64", True),
    ],
)
def test_the_model_works_under_a_stricter_jax(
    setting: str, value: Any, params: Any, images: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = jax.grad(loss_of(plain_network))(params, images)
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        fresh = MODEL.init(jax.random.key(0), images)["params"]
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
        logits = model_network(params, images)
        assert logits.dtype == jnp.float32
        found = jax.grad(loss_of(model_network))(params, images)
        native = jax.grad(loss_of(native_network))(params, images)
    finally:
        jax.config.update(setting, before)
    jax.tree.map(
        lambda *leaves: [
            np.testing.assert_allclose(leaf, leaves[0], rtol=2e-3, atol=1e-4) for leaf in leaves
        ],
        expected,
        found,
        native,
    )


def test_one_artifact_serves_every_platform_and_any_batch(params: Any, images: Array) -> None:
    pytest.importorskip("flatbuffers", reason="JAX needs flatbuffers to serialize a program")
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(model_network), platforms=platforms)(params, shape)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    assert loaded.platforms == platforms
    for count in (1, 3):
        logits = loaded.call(params, images[:count])
        np.testing.assert_allclose(logits, plain_network(params, images[:count]), rtol=1e-4)
    cotangent = jnp.ones((2, MODEL.num_classes))
    # The program of the gradient takes and gives the leaves of trees.
    gradients = loaded.vjp().call(*jax.tree.leaves((params, images[:2], cotangent)))
    expected = jax.tree.leaves(jax.vjp(plain_network, params, images[:2])[1](cotangent))
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)


def test_training_and_prediction_work_under_a_stricter_jax(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_epochs, config.augment.mixup_alpha = 1, 0.1
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        train_and_evaluate(config, tmp_path)
        evaluated = evaluate_checkpoint(tmp_path)
        predictions = load_predictor(tmp_path, "latest")(evaluated.data.images)
    assert (predictions.labels == evaluated.result.predicted).all()


def test_widths_may_be_a_list(params: Any, images: Array) -> None:
    model = TinyVGG(widths=[3, 4], convs_per_block=2, hidden=6, num_classes=5)
    assert model == MODEL
    logits = jax.jit(lambda m, p, i: m.apply({"params": p}, i), static_argnums=0)(
        model, params, images
    )
    np.testing.assert_allclose(logits, plain_network(params, images), rtol=1e-4)


def test_the_native_network_has_the_same_parameters_and_gradients(
    params: Any, images: Array
) -> None:
    found = jax.jit(jax.value_and_grad(loss_of(native_network)))(params, images)
    expected = jax.jit(jax.value_and_grad(loss_of(plain_network)))(params, images)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, expected
    )


def test_the_model_is_plain_unless_it_is_told_otherwise() -> None:
    assert not TinyVGG().native
    assert not ConvReLU(4).native
    assert isinstance(TinyVGG(), nn.Module)
