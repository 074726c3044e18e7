import io
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from tinyvgg_jax import Predictor, UserError, load_predictor
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.report.explain import (
    Explanation,
    _draw_prediction,
    draw,
    explain,
    explain_file,
    grad_cam,
)

Trained = tuple[Path, dict[str, Any]]


def test_grad_cam_weighs_features_by_their_mean_gradients() -> None:
    activations = np.zeros((2, 2, 3), np.float32)
    activations[0, 0, 0], activations[0, 1, 1], activations[1, 0, 2] = 2.0, 4.0, 3.0
    gradient = np.zeros((2, 2, 3), np.float32)
    gradient[..., 0], gradient[..., 1] = 1.0, -1.0  # The second feature lowers the logit.
    gradient[0, 0, 2] = 4.0  # Its mean is 1.
    saliency = grad_cam(jnp.asarray(activations), jnp.asarray(gradient))
    np.testing.assert_allclose(saliency, np.array([[2 / 3, 0], [1, 0]]))
    assert (grad_cam(jnp.asarray(activations), jnp.zeros((2, 2, 3))) == 0).all()


def test_it_shows_what_is_on_the_way_to_the_answer() -> None:
    model = TinyVGG(widths=(4, 6), convs_per_block=1, hidden=8, num_classes=5)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    predictor = Predictor(model, params, (16, 16, 1), tuple("abcde"))
    image = np.random.default_rng(0).integers(256, size=(16, 16, 1)).astype(np.uint8)
    seen = explain(predictor, image)
    expected = predictor(image).probabilities[0]
    np.testing.assert_allclose(seen.probabilities, expected, rtol=1e-4)
    assert [maps.shape for maps in seen.feature_maps] == [(8, 8, 4), (4, 4, 6)]
    assert seen.saliency.shape == (8, 8)
    # The probabilities can be computed from the last block's maps.
    hidden = jax.nn.relu(seen.feature_maps[-1].reshape(-1) @ params["dense"]["kernel"])
    logits = hidden @ params["logits"]["kernel"]
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, rtol=1e-4)


def test_the_network_looks_at_the_bar(trained: Trained, data_dir: Path) -> None:
    predictor = load_predictor(trained[0], "latest")
    image = np.full((16, 16, 1), 30, np.uint8)
    image[7:9, 4:12] = 220
    seen = explain(predictor, image)
    assert seen.saliency.max() == pytest.approx(1)
    # The map has half as many rows, and the bar lies in two of them.
    assert seen.saliency.sum(axis=1).argmax() in (3, 4)
    assert seen.probabilities.argmax() == 2


def test_an_explanation_replaces_only_that_of_the_same_image(
    trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run, ignore=shutil.ignore_patterns("explain"))
    pixels = np.full((50, 40), 250, np.uint8)
    pixels[20:30, 5:35] = 10
    bars = pixels.copy()
    bars[5:10, 5:35] = 10
    for folder, suffix, image in (
        ("a", "png", pixels),
        ("b", "png", pixels.T),
        ("b", "bmp", bars),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / folder / f"shirt.{suffix}")
    names = ("a/shirt.png", "b/shirt.png", "a/shirt.png", "b/shirt.bmp", "b/shirt.png")
    written = [explain_file(run, tmp_path / name) for name in names]
    expected = ["shirt.png", "shirt-2.png", "shirt.png", "shirt-3.png", "shirt-2.png"]
    assert written == [run / "explain" / name for name in expected]
    # A file or folder that is no explanation stays, too.
    (run / "explain/shirt.png").write_text("mine")
    (run / "explain/shirt-2.png").unlink()
    (run / "explain/shirt-2.png").mkdir()
    assert explain_file(run, tmp_path / "a/shirt.png") == run / "explain/shirt-4.png"
    assert (run / "explain/shirt.png").read_text() == "mine"


def test_a_picture_is_written(trained: Trained, tmp_path: Path) -> None:
    pixels = np.full((50, 40), 250, np.uint8)
    pixels[20:30, 5:35] = 10
    Image.fromarray(pixels).save(tmp_path / "dark bar.png")
    written = explain_file(trained[0], tmp_path / "dark bar.png", tmp_path / "new" / "seen.png")
    assert written == tmp_path / "new" / "seen.png"
    with Image.open(written) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1200
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        explain_file(trained[0], tmp_path / "dark bar.png", tmp_path / "file" / "seen.png")


@pytest.mark.parametrize("names", [("only",), (60 * "x", "\N{DRESS} $x$")])
def test_any_names_of_classes_can_be_drawn(names: tuple[str, ...]) -> None:
    probabilities = np.linspace(0.6, 0.4, len(names), dtype=np.float32)
    image, maps = np.zeros((8, 8, 1), np.uint8), [np.ones((4, 4, 3), np.float32)]
    figure = draw(Explanation(image, probabilities, maps, np.ones((4, 4), np.float32)), names)
    # A glyph that Matplotlib lacks is a warning, which fails the test.
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    bars = figure.subfigs[0].axes[2]
    assert all(len(label.get_text()) <= 20 for label in bars.get_yticklabels())
    assert len(bars.patches) == len(names)


def test_grad_cam_is_drawn_where_the_network_looked() -> None:
    # Pooling makes 3 rows of 7 and leaves out the last row, so a row of the map stands for two rows
    # of the image; columns likewise.
    explanation = Explanation(
        np.zeros((7, 7, 1), np.uint8),
        np.array([0.6, 0.4], np.float32),
        [np.zeros((3, 3, 1)), np.zeros((1, 1, 1))],
        np.full((3, 3), 0.5, np.float32),
    )
    subfigure = Figure().subfigures()
    assert isinstance(subfigure, SubFigure)
    _draw_prediction(subfigure, explanation, ("a", "b"))
    _, heat_map, _ = subfigure.axes
    drawn = heat_map.images[-1]
    assert tuple(drawn.get_extent()) == (0, 6, 6, 0) and drawn.get_clim() == (0, 1)
    assert heat_map.get_xlim() == (0, 7) and heat_map.get_ylim() == (7, 0)


def test_the_picture_itself_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 200).save(tmp_path / "shirt.png")
    before = (tmp_path / "shirt.png").read_bytes()
    (tmp_path / "link.png").symlink_to("shirt.png")
    for name in ("shirt.png", "link.png"):
        with pytest.raises(UserError, match="is the picture itself"):
            explain_file(trained[0], tmp_path / "shirt.png", tmp_path / name)
    assert (tmp_path / "shirt.png").read_bytes() == before
