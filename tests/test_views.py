"""Answers averaged over several views of each image."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES
from PIL import Image

from tinyvgg_jax import UserError, load_predictor
from tinyvgg_jax.augment import rotate
from tinyvgg_jax.data import load_splits
from tinyvgg_jax.predict import predict_files
from tinyvgg_jax.views import Averaged, View, choose_views, saw_mirror_images, show

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]
Trained = tuple[Path, dict[str, Any]]


class Recorder:
    """Classifier that keeps the images it is asked about, and answers with their brightness."""

    image_shape = (28, 28, 1)
    class_names = ("dark", "light")
    fit = "garment"

    def __init__(self) -> None:
        self.asked: list[np.ndarray] = []

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray:
        self.asked.append(batch)
        light = batch.mean(axis=(1, 2, 3), dtype=np.float32) / 255
        return np.stack([1 - light, light], axis=1)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(5, 28, 28, 1), dtype=np.uint8)


def test_the_answer_is_the_mean_over_the_views(images: np.ndarray) -> None:
    recorder, views = Recorder(), choose_views(7)
    answer = Averaged(recorder, views).probabilities(images, 2)
    assert len(recorder.asked) == 7
    each = [Recorder().probabilities(show(images, view, 2), 2) for view in views]
    np.testing.assert_allclose(answer, np.mean(each, axis=0), rtol=1e-6)
    np.testing.assert_allclose(answer.sum(axis=1), 1, rtol=1e-6)


def test_the_first_views_are_the_image_and_its_mirror_image(images: np.ndarray) -> None:
    first, smaller, third, _ = choose_views(4)
    np.testing.assert_array_equal(show(images, first, 64), images)
    assert smaller.scale < 1 and not smaller.mirrored
    np.testing.assert_array_equal(show(images, third, 64), images[:, :, ::-1])
    views = choose_views(16)
    assert len(set(views)) == 16
    assert choose_views(5) == views[:5]


def test_a_view_turns_and_shrinks_like_an_augmentation(images: np.ndarray) -> None:
    turned = show(images, View(15, 1.0, False), 2)
    expected = np.asarray(rotate(jnp.asarray(images) / 255, jnp.full(5, 15.0)))
    np.testing.assert_allclose(turned / 255, expected, atol=0.51 / 255)
    # The border of a shrunken image is black.
    small = show(np.full_like(images, 255), View(0, 0.5, False), 64)
    assert (small[:, :6] == 0).all() and (small[:, 8:20, 8:20] == 255).all()


def test_without_mirror_images_in_training_none_is_shown() -> None:
    assert not any(view.mirrored for view in choose_views(8, mirror=False))
    for number, mirror in ((0, True), (17, True), (9, False)):
        with pytest.raises(UserError, match="--views must be from 1 to"):
            choose_views(number, mirror)
    assert saw_mirror_images({"augment": {"horizontal_flip": True}})
    assert saw_mirror_images({"augment": {"horizontal_flip": False, "alternating_flip": True}})
    for config in ({"augment": {"horizontal_flip": False}}, {"augment": 1}, {}, None, "x"):
        assert not saw_mirror_images(config)


def test_the_command_line_averages(
    trained: Trained, data_dir: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    split = load_splits("bars", {"test": "test"}, str(data_dir))[0]["test"]
    for index in range(3):
        Image.fromarray(split.images[index, ..., 0]).save(tmp_path / f"{index}.png")
    run = ("--mode=predict", f"--workdir={trained[0]}", "--step=latest", "--json")
    done = command_line(*run, "--views=3", tmp_path)
    assert done.returncode == 0, done.stderr
    predictor = load_predictor(trained[0], "latest")
    mirror = saw_mirror_images(json.loads((trained[0] / "config.json").read_text()))
    averaged = Averaged(predictor, choose_views(3, mirror))
    expected = [answer.to_json(CLASSES) for answer in predict_files(averaged, [tmp_path])]  # type: ignore[union-attr]
    for line, wanted in zip(done.stdout.splitlines(), expected, strict=True):
        said = json.loads(line)
        assert said["class"] == wanted["class"]
        assert said["probability"] == pytest.approx(wanted["probability"], abs=1e-5)
    refused = command_line(*run, "--views=99", tmp_path)
    assert refused.returncode == 2
    assert "--views must be from 1 to" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
