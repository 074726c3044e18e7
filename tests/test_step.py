from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyvgg_jax import TinyVGG
from tinyvgg_jax.augment import augment
from tinyvgg_jax.data import Batch
from tinyvgg_jax.keys import named_key
from tinyvgg_jax.model import apply
from tinyvgg_jax.optimizer import learning_rate_schedule, make_optimizer
from tinyvgg_jax.step import StepSums, TrainState, init_state, make_train_step, update_average

SMALL = TinyVGG(widths=(4, 8), convs_per_block=1, hidden=8, num_classes=5)


def no_augmentation(key: jax.Array, images: jax.Array, step: jax.Array) -> jax.Array:
    return images


def initial(optimizer: optax.GradientTransformation) -> TrainState:
    init = partial(init_state, SMALL, optimizer, image_shape=(16, 16, 1))
    return jax.jit(init)(jax.random.key(0))


def draw_batch(size: int = 6) -> Batch:
    images = jax.random.randint(jax.random.key(1), (size, 16, 16, 1), 0, 256).astype(jnp.uint8)
    return Batch(images, jnp.arange(size) % 5)


def test_one_step_is_pinned() -> None:
    """If you meant to change the model, its initialisation, the loss or the step, update this."""
    optimizer = make_optimizer(learning_rate_schedule(0.01, 0.9, 10), 0.9)
    state = initial(optimizer)
    rotated = partial(augment, rotation_degrees=10.0, horizontal_flip=True)
    step = jax.jit(make_train_step(SMALL, optimizer, rotated))
    state, first = step(state, draw_batch(), jax.random.key(2))
    state, second = step(state, draw_batch(), jax.random.key(2))
    losses = [float(metrics.loss / metrics.examples) for metrics in (first, second)]
    assert losses == pytest.approx(PINNED_LOSSES, rel=1e-5)
    assert int(state.step) == 2


PINNED_LOSSES = [1.6623083, 1.6507007]


def test_the_step_is_gradient_descent_on_the_mean_cross_entropy() -> None:
    optimizer = optax.sgd(0.1)
    state = initial(optimizer)
    batch = draw_batch()

    def mean_loss(params: Any) -> jax.Array:
        logits = apply(SMALL, params, batch.images / 255)
        picked = jax.nn.log_softmax(logits)[jnp.arange(6), batch.labels]
        return -picked.mean()

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    step = jax.jit(make_train_step(SMALL, optimizer, no_augmentation))
    after, metrics = step(state, batch, jax.random.key(0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.params, expected)
    assert float(metrics.loss) == pytest.approx(6 * float(loss), rel=1e-6)
    right = apply(SMALL, state.params, batch.images / 255).argmax(-1) == batch.labels
    assert (int(metrics.correct), int(metrics.examples)) == (int(right.sum()), 6)


def test_the_augmentation_gets_a_key_of_its_own_at_each_step_and_images_in_0_to_1() -> None:
    seen: list[tuple[bytes, float]] = []

    def spy(key: jax.Array, images: jax.Array, step: jax.Array) -> jax.Array:
        seen.append((jax.random.key_data(key).tobytes(), float(images.max())))
        return images

    optimizer = optax.sgd(0.1)
    state = initial(optimizer)
    step = make_train_step(SMALL, optimizer, spy)
    for _ in range(3):
        state, _ = step(state, draw_batch(), jax.random.key(0))
    assert len({key for key, _ in seen}) == 3
    assert all(0.9 < largest <= 1 for _, largest in seen)


def test_metrics_add_and_remember_the_first_divergence() -> None:
    a = StepSums(jnp.float32(1), jnp.int32(2), jnp.int32(3), jnp.int32(0))
    b = StepSums(jnp.float32(10), jnp.int32(20), jnp.int32(30), jnp.int32(7))
    c = b._replace(diverged_at=jnp.int32(8))
    total = StepSums.zero().plus(a).plus(b).plus(c)
    assert [float(value) for value in total] == [21, 42, 63, 7]


def test_keys_of_different_names_differ() -> None:
    keys = [named_key(jax.random.key(0), name) for name in ("init", "order", "augment")]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3


def first_step(
    model: TinyVGG = SMALL, average: bool = False, **settings: Any
) -> tuple[TrainState, TrainState, StepSums]:
    """The state before and after a step of gradient descent, and its metrics."""
    optimizer = optax.sgd(0.1)
    init = partial(init_state, model, optimizer, image_shape=(16, 16, 1), average=average)
    state = jax.jit(init)(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer, no_augmentation, **settings))
    return state, *step(state, draw_batch(), jax.random.key(0))


def test_label_smoothing_spreads_a_share_of_each_target() -> None:
    state, _, metrics = first_step(label_smoothing=0.2)
    batch = draw_batch()
    log_p = jax.nn.log_softmax(apply(SMALL, state.params, batch.images / 255))
    targets = 0.8 * jax.nn.one_hot(batch.labels, 5) + 0.2 / 5
    assert float(metrics.loss) == pytest.approx(-float((targets * log_p).sum()), rel=1e-5)


def test_mixup_reaches_the_loss() -> None:
    _, plain, before = first_step()
    _, mixed, after = first_step(mixup_alpha=1.0)
    assert float(before.loss) != float(after.loss)
    kernel = ("conv1_1", "kernel")
    assert not np.allclose(
        plain.params[kernel[0]][kernel[1]], mixed.params[kernel[0]][kernel[1]], atol=1e-6
    )


def test_the_average_of_the_parameters_follows_them() -> None:
    before, after, _ = first_step(average=True, ema_decay=0.999)
    assert after.evaluated is after.average and before.average is not None
    # After the first step the decay is 2 / 11, whatever is asked for.
    expected = jax.tree.map(lambda o, n: 2 / 11 * o + 9 / 11 * n, before.params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), after.average, expected)
    late = before._replace(step=jnp.int32(1_000_000))
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(SMALL, optimizer, no_augmentation, ema_decay=0.9))
    after, _ = step(late, draw_batch(), jax.random.key(0))
    expected = jax.tree.map(lambda o, n: 0.9 * o + 0.1 * n, before.params, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.average, expected)
    assert first_step()[1].evaluated is not None and first_step()[1].average is None


def test_the_average_of_what_stays_the_same_stays_the_same() -> None:
    """As that of a frozen layer must, to the last bit, wherever it is computed."""
    frozen = jax.random.normal(jax.random.key(0), (10_000,))
    for decay, step in ((0.9, 1), (0.9, 10**6), (0.998, 700), (0.998, 10**6)):
        average = jax.jit(update_average)(frozen, frozen, jnp.int32(step), decay)
        np.testing.assert_array_equal(average, frozen)


def test_dropout_is_another_at_each_step_and_only_in_training() -> None:
    model = SMALL.clone(dropout=0.5)
    optimizer = optax.sgd(0.0)
    init = partial(init_state, model, optimizer, image_shape=(16, 16, 1))
    state = jax.jit(init)(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer, no_augmentation))
    losses = []
    for _ in range(3):
        state, metrics = step(state, draw_batch(), jax.random.key(0))
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3
    images = draw_batch().images / 255
    expected = apply(SMALL, state.params, images)
    np.testing.assert_array_equal(apply(model, state.params, images), expected)
