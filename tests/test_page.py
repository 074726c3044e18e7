"""The page of a network, in a real browser: Debian's Chromium, driven by Playwright."""

import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_export import NETWORKS, in_jax, params_of, pictures

from tinyvgg_jax import load_predictor, train_and_evaluate
from tinyvgg_jax.configs import quick
from tinyvgg_jax.data import DatasetInfo, load_splits
from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export import export_run
from tinyvgg_jax.export import page as page_export
from tinyvgg_jax.export.page import SplitPredictions, read_page, to_page
from tinyvgg_jax.export.run import FORMATS, Trained
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.pictures import load_picture
from tinyvgg_jax.predict import Predictor
from tinyvgg_jax.report.evaluation import evaluate_checkpoint, evaluation_content
from tinyvgg_jax.report.explain import explain
from tinyvgg_jax.report.page import write_report

PICTURES = sorted((Path(__file__).parent / "pictures").iterdir())
NAMES = ("<img src=x onerror=alert(1)>", "</script><b>", "é & \\u003c", "four", "five")


def make_page(name: str, folder: Path, fit: str = "garment") -> tuple[Path, Predictor, np.ndarray]:
    """Writes the page of an untrained network; returns it, the network and its test images."""
    model, shape = NETWORKS[name]
    model = model.clone(dtype=jnp.float32)
    params = params_of(model, shape)
    names = tuple(NAMES[i % 5] + " " * (i // 5) for i in range(model.num_classes))
    images = pictures(30, shape)
    probabilities = in_jax(model, params, images)
    predicted = probabilities.argmax(axis=1)
    # Every fourth image has another label than the predicted one.
    labels = np.where(np.arange(30) % 4, predicted, (predicted + 1) % model.num_classes)
    card = cards.make_card(shape, names, fit, step=3, validation_accuracy=0.5)
    path = folder / f"{name}.html"
    tested = SplitPredictions(images, labels, probabilities)
    path.write_bytes(to_page(model, params, card, tested, "<i>run\udce9"))
    return path, Predictor(model, params, shape, names, fit), images


@pytest.fixture(autouse=True)
def no_network_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks keep 32 bits, which fewer faults can get into."""
    monkeypatch.setattr(page_export, "_SMALL", 0)


# Without a browser


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_read_back(name: str, tmp_path: Path) -> None:
    path, network, images = make_page(name, tmp_path)
    model, params, card = read_page(path.read_text())
    assert card["image_shape"] == list(network.image_shape)
    expected = network.probabilities(images, 30)
    np.testing.assert_allclose(in_jax(model, params, images), expected, atol=2e-3)


def test_a_network_that_rounding_would_change_keeps_32_bits(tmp_path: Path) -> None:
    model, shape = TinyVGG(widths=(2,), convs_per_block=1, hidden=2, num_classes=2), (4, 4, 1)
    params = params_of(model, shape)
    # If two classes differ by less than 16 bits can tell, the first would be taken.
    params["logits"]["kernel"] = jnp.zeros((2, 2))
    images = pictures(3, shape)
    # And 16 bits have no fractions of large logits, which make the probability 0.65 or 0.73.
    for bias in ([1.0, 1.0 + 1e-5], [1000.2, 1000.8]):
        params["logits"]["bias"] = jnp.array(bias)
        tested = SplitPredictions(images, np.ones(3, int), in_jax(model, params, images))
        card = cards.make_card(shape, ("a", "b"), step=1)
        _, again, card = read_page(to_page(model, params, card, tested, "x").decode())
        assert card["bits"] == 32
        np.testing.assert_array_equal(again["logits"]["bias"], params["logits"]["bias"])


def test_the_images_that_a_page_is_verified_on_decide_about_its_bits() -> None:
    model, shape = NETWORKS["grey"]
    params, images = params_of(model, shape), pictures(40, shape)
    found = np.array(in_jax(model, params, images))
    labels = found.argmax(axis=1)
    kept = SplitPredictions(images[:20], labels[:20], found[:20])
    # As if rounding changed the class of the last one.
    found[-1] = np.roll(found[-1], 1)
    changed = SplitPredictions(images[20:], labels[20:], found[20:])
    card = cards.make_card(shape, tuple("abcde"), step=1)
    trained = Trained(model, params, DatasetInfo(shape, tuple("abcde")), card, kept)
    for verified_on, bits in ((None, 16), (kept, 16), (changed, 32)):
        page = FORMATS["page"].export(trained._replace(verified_on=verified_on)).decode()
        assert read_page(page)[2]["bits"] == bits


def test_a_rounded_network_shows_its_own_predictions() -> None:
    model, shape = NETWORKS["grey"]
    params, images = params_of(model, shape), pictures(40, shape)
    found = in_jax(model, params, images)
    labels = found.argmax(axis=1)
    kept = SplitPredictions(images[:20], labels[:20], found[:20])
    # As if rounding corrected all answers on the test split.
    tested = SplitPredictions(images[20:], labels[20:], np.roll(found[20:], 1, axis=1))
    card = cards.make_card(shape, tuple("abcde"), step=1)
    shown = read_page(to_page(model, params, card, tested, "x", kept).decode())[2]
    assert shown["bits"] == 16 and shown["accuracies"]["test"] == 1
    assert all(example["label"] == example["predicted"] for example in shown["examples"])


def test_what_comes_from_a_run_is_no_markup(tmp_path: Path) -> None:
    text = make_page("grey", tmp_path)[0].read_text()
    assert "<img" not in text and "<b>" not in text and "<i>run" not in text
    # A folder's name may hold bytes that are not valid UTF-8.
    assert "&lt;i&gt;run?" in text and text.count("</script>") == 5


@pytest.mark.parametrize("change", [("weights", b"A", b"B"), ("card", b"four", b"4our")])
def test_a_changed_page_is_noticed(change: tuple[str, bytes, bytes], tmp_path: Path) -> None:
    path = make_page("grey", tmp_path)[0]
    name, old, new = change
    before, start, rest = path.read_bytes().partition(f'id="{name}">'.encode())
    with pytest.raises(ValueError, match="sha256"):
        read_page((before + start + rest.replace(old, new, 1)).decode())
    with pytest.raises(ValueError, match="no page"):
        read_page("<html></html>")


def test_a_small_network_keeps_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_page(make_page("grey", tmp_path)[0].read_text())[2]["bits"] == 16
    monkeypatch.undo()
    assert read_page(make_page("grey", tmp_path)[0].read_text())[2]["bits"] == 32


def test_large_parameters_keep_32_bits_and_those_that_are_no_numbers_are_refused() -> None:
    model, shape = NETWORKS["grey"]
    params = params_of(model, shape)
    images = pictures(3, shape)
    tested = SplitPredictions(images, np.zeros(3, int), in_jax(model, params, images))
    card = cards.make_card(shape, tuple("abcde"), step=1)
    params["logits"]["bias"] = params["logits"]["bias"].at[0].set(1e5)
    assert read_page(to_page(model, params, card, tested, "x").decode())[2]["bits"] == 32
    with pytest.raises(ValueError, match="test split"):
        empty = SplitPredictions(images[:0], np.zeros(0, int), np.zeros((0, model.num_classes)))
        to_page(model, params, card, empty, "x")
    params["logits"]["bias"] = params["logits"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        to_page(model, params, card, tested, "x")


def test_every_class_has_an_example() -> None:
    labels = np.repeat(np.arange(30), 3)
    images = np.zeros((90, 4, 4, 1), np.uint8)
    chosen = page_export._examples(SplitPredictions(images, labels, np.eye(30)[labels]))
    assert set(labels[chosen]) == set(range(30))


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        arguments += ["--use-fake-ui-for-media-stream"]
        with playwright.chromium.launch(executable_path=program, args=arguments) as launched:
            yield launched


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end there was no error in its console, and no request."""
    said: list[str] = []
    pages = []

    def note_request(request: Any) -> None:
        if not request.url.startswith(("file:", "blob:", "data:")):
            said.append(f"request of {request.url}")

    def open_page(path: Path, width: int = 1280, **options: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", note_request)
        page.goto(path.as_uri())
        page.wait_for_selector("#bars li", timeout=20_000)
        page.wait_for_selector("#time:not(:empty)", timeout=20_000)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="module")
def modules(browser: Any) -> Iterator[Any]:
    """A blank page that offers the functions of the modules."""
    script = page_export._script(page_export._MODULES[:-1])
    names = "forward, readLayers, softmax, gradCam, convolutionTerms, poolingTerms, denseTerms"
    page = browser.new_page()
    page.add_script_tag(content=f"{script}\nObject.assign(window, {{ {names} }});", type="module")
    page.wait_for_function("() => 'forward' in window")
    page.evaluate(
        """() => { window.load = (card, weights) => {
          const [height, width, channels] = card.image_shape;
          const bytes = Uint8Array.from(atob(weights), (letter) => letter.charCodeAt(0));
          window.layers = readLayers(card.layers, bytes, card.bits);
          window.run = (pixels) => {
            const data = Float32Array.from(pixels, (value) => value / 255);
            return forward(layers, { name: "input", kind: "input", height, width, channels, data });
          };
        }; }"""
    )
    yield page
    page.close()


def load_network(modules: Any, path: Path) -> None:
    contents = path.read_text()
    weights = contents.partition('id="weights">')[2].partition("<")[0]
    modules.evaluate("([card, weights]) => load(card, weights)", [read_page(contents)[2], weights])


@pytest.fixture(scope="module")
def trained_page(
    tmp_path_factory: pytest.TempPathFactory, real_data: object
) -> tuple[Path, Predictor]:
    """A run on real images, and its page."""
    workdir = tmp_path_factory.mktemp("page") / "a run"
    config = quick.get_config()
    config.num_epochs, config.data.train_split = 1, "train[:12000]"
    config.model.widths = (12, 20, 24)
    train_and_evaluate(config, workdir)
    (path,) = export_run(workdir, ["page"]).files
    return path, load_predictor(workdir)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_jax_computes(name: str, modules: Any, tmp_path: Path) -> None:
    path, network, images = make_page(name, tmp_path)
    load_network(modules, path)
    code = "all => all.map(pixels => [...softmax(run(pixels).at(-1).data)])"
    found = np.array(modules.evaluate(code, [image.ravel().tolist() for image in images]))
    np.testing.assert_allclose(found, network.probabilities(images, 30), atol=2e-3)


def test_it_classifies_test_images_as_jax_does(
    modules: Any, trained_page: tuple[Path, Predictor]
) -> None:
    path, network = trained_page
    load_network(modules, path)
    images = load_splits("fashion_mnist", {"test": "test[:200]"})[0]["test"].images
    code = "all => all.map(pixels => [...softmax(run(pixels).at(-1).data)])"
    found = np.array(modules.evaluate(code, [image.ravel().tolist() for image in images]))
    expected = network.probabilities(images, 200)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


def test_grad_cam_lies_where_the_network_looked(opened: Callable[..., Any], tmp_path: Path) -> None:
    path, network, images = make_page("colour", tmp_path)
    page = opened(path)
    page.check("#grad-cam")
    style = page.eval_on_selector(
        "#saliency", "canvas => [canvas.style.height, canvas.style.width]"
    )
    # Before the last convolution, pooling has left out rows and columns of odd sizes.
    covered = np.multiply(
        explain(network, images[0]).saliency.shape, 2 ** (len(network.model.widths) - 1)
    )
    shares = 100 * covered / np.array(network.image_shape[:2])
    assert (shares < 100).any()
    assert [float(side.removesuffix("%")) for side in style] == pytest.approx(
        shares.tolist(), abs=0.01
    )


@pytest.mark.parametrize("name", ["grey", "colour"])
def test_grad_cam_is_that_of_explain(name: str, modules: Any, tmp_path: Path) -> None:
    path, network, images = make_page(name, tmp_path)
    load_network(modules, path)
    code = """pixels => {
      const stages = run(pixels), logits = stages.at(-1).data;
      return [...gradCam(layers, stages, logits.indexOf(Math.max(...logits))).data];
    }"""
    shown = 0
    for image in images[:5]:
        expected = explain(network, image).saliency
        found = np.reshape(modules.evaluate(code, image.ravel().tolist()), expected.shape)
        np.testing.assert_allclose(found, expected, atol=0.01)
        shown += bool(expected.any())
    assert shown


def test_the_arithmetic_gives_the_values_of_the_stages(modules: Any, tmp_path: Path) -> None:
    path, _, images = make_page("colour", tmp_path)
    load_network(modules, path)
    code = """pixels => {
      const stages = run(pixels), pairs = [];
      stages.slice(1).forEach((stage, i) => {
        const layer = layers.find((one) => one.name === stage.name), input = stages[i];
        for (let c = 0; c < Math.min(3, stage.channels); c++)
          for (const [y, x] of [[0, 0], [stage.height - 1, stage.width - 1]]) {
            const own = stage.data[(y * stage.width + x) * stage.channels + c];
            if (stage.kind === "convolution") {
              const { terms, bias, sum, value } = convolutionTerms(input, layer, c, y, x);
              const total = terms.reduce((all, term) => all + term.total, bias);
              pairs.push([own, value], [total, sum]);
            } else if (stage.kind === "pooling") {
              const { values, largest } = poolingTerms(input, c, y, x);
              pairs.push([own, values[largest]]);
            } else {
              const { sum } = denseTerms(input, layer, c);
              pairs.push([own, stage.kind === "dense" ? Math.max(0, sum) : sum]);
            }
          }
      });
      return pairs;
    }"""
    pairs = np.array(modules.evaluate(code, images[0].ravel().tolist()))
    assert len(pairs) > 50 and np.ptp(pairs) > 0.1
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], atol=1e-4)


def give(page: Any, path: Path) -> None:
    """Chooses a file, and waits for its answer."""
    page.set_input_files("#file", path)
    page.wait_for_selector(f'#about:text("{path.name}")', timeout=20_000)


def shares(page: Any) -> dict[str, float]:
    """Reads the probabilities from the column of classes."""
    code = "all => all.map(button => [...button.children].map(part => part.textContent))"
    found = page.eval_on_selector_all(".column.output .map", code)
    return {name: float(share.removesuffix(" %")) / 100 for name, share in found}


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_prepared_as_in_python(
    path: Path, opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    file, network = trained_page
    page = opened(file)
    give(page, path)
    picture = load_picture(path, network.image_shape)
    code = """() => { const canvas = document.getElementById("image");
      const { data } = canvas.getContext("2d").getImageData(0, 0, 28, 28);
      return [...data].filter((_, i) => i % 4 === 0);
    }"""
    pixels = np.reshape(page.evaluate(code), (28, 28))
    assert np.abs(pixels - picture.pixels[..., 0].astype(int)).mean() < 1.5
    labels, probabilities, names = network(picture.pixels)
    found = shares(page)
    assert max(found, key=found.__getitem__) == names[labels[0]]
    np.testing.assert_allclose(list(found.values()), probabilities[0], atol=0.03)
    assert ("inverted" in page.inner_text("#about")) == picture.inverted


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_are_fitted_as_for_the_networks_training(
    fit: str, opened: Callable[..., Any], tmp_path: Path
) -> None:
    path, network, _ = make_page("colour", tmp_path, fit)
    height, width, _ = network.image_shape
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(5, 9, 3), dtype=np.uint8))
    coarse.resize((190, 110)).save(tmp_path / "wide.png")
    page = opened(path)
    give(page, tmp_path / "wide.png")
    code = f"""() => {{ const canvas = document.getElementById("image");
      return [...canvas.getContext("2d").getImageData(0, 0, {width}, {height}).data];
    }}"""
    pixels = np.reshape(page.evaluate(code), (height, width, 4))[..., :3]
    picture = load_picture(tmp_path / "wide.png", network.image_shape, fit=fit)
    assert np.abs(pixels - picture.pixels.astype(int)).max() <= 2
    assert np.abs(pixels - np.roll(picture.pixels, 1, axis=1).astype(int)).max() > 20


def test_names_are_text(opened: Callable[..., Any], tmp_path: Path) -> None:
    path, network, _ = make_page("grey", tmp_path)
    page = opened(path)
    assert list(shares(page)) == list(network.class_names)
    assert page.inner_text("h1") == page.title().partition(":")[0] == "<i>run?"
    assert page.query_selector_all("#examples .wrong")


def make_bad_files(folder: Path) -> dict[str, Path]:
    """Makes files that are no usable pictures, by a part of the sentence about each."""
    (folder / "notes.txt").write_text("a few words")
    (folder / "empty.png").touch()
    Image.new("1", (20_000, 20_000)).save(folder / "large.png")
    Image.new("L", (5, 5)).save(folder / "small.png")
    Image.new("L", (60, 60), 90).save(folder / "grey.png")
    return {
        "20,000 x 20,000 pixels": folder / "large.png",
        "5 x 5 pixels is too small": folder / "small.png",
        "alike": folder / "grey.png",
        "no picture": folder / "notes.txt",
        "no picture ": folder / "empty.png",
    }


def test_what_is_no_picture_is_a_sentence_and_the_page_goes_on(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor], tmp_path: Path
) -> None:
    page = opened(trained_page[0])
    for part, path in make_bad_files(tmp_path).items():
        page.set_input_files("#file", path)
        page.wait_for_selector(f'#problem:text("{part.strip()}")', timeout=60_000)
        # The sentence gives way to the next answer.
        page.set_input_files("#file", PICTURES[-1])
        page.wait_for_selector("#problem:empty", state="attached", timeout=20_000)
        assert page.inner_text("#about").startswith(PICTURES[-1].name)


def test_a_dropped_and_a_pasted_file_are_taken(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0])
    content = base64.b64encode(PICTURES[-1].read_bytes()).decode()
    code = """([content, name, type, kind]) => {
      const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      if (type) data.items.add(new File([bytes], name, { type }));
      else data.setData("text/plain", "a few words");
      const event = kind === "drop"
        ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
      document.body.dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(code, [content, f"{kind}.jpg", "image/jpeg", kind])
        page.wait_for_selector(f'#about:text("{kind}.jpg")')
        page.evaluate(code, [content, "", "", kind])
        page.wait_for_selector('#problem:text("There is no picture in this")')


def test_of_two_choices_the_later_one_counts(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor], tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    pixels = np.zeros((4000, 6000), np.uint8)
    pixels[1000:3000, 1000:5000] = 200
    Image.fromarray(pixels).save(large)
    page = opened(trained_page[0])
    page.set_input_files("#file", large)
    give(page, PICTURES[-1])
    page.wait_for_timeout(1500)
    assert page.inner_text("#about").startswith(PICTURES[-1].name)
    # The inversion is that of the drawing, which is the latest choice.
    page.click("#draw")
    page.click("#pad")
    page.wait_for_selector('#about:text("A drawing")')
    page.select_option("#invert", "yes")
    page.wait_for_selector('#about:text("A drawing, inverted")')
    page.click("#clear")
    page.wait_for_selector('#problem:text("alike")')


def test_the_camera_is_off_when_something_else_was_chosen_meanwhile(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0], permissions=["camera"])
    page.evaluate(
        """() => { const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
          window.tracks = [];
          navigator.mediaDevices.getUserMedia = async (wish) => {
            await new Promise((resolve) => setTimeout(resolve, 500));
            const stream = await ask(wish);
            tracks.push(...stream.getTracks());
            return stream;
          }; }"""
    )
    page.click("#camera")
    page.click("#draw")
    page.wait_for_timeout(1500)
    assert page.evaluate("() => tracks.map(track => track.readyState)") == ["ended"]
    assert page.is_hidden("#video") and page.is_visible("#pad")


def test_the_camera_and_a_drawing_are_classified_live(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0], permissions=["camera"])
    page.click("#camera")
    page.wait_for_selector('#about:text("The camera")')
    page.click("#draw")
    assert page.is_hidden("#video") and page.is_visible("#pad")
    box = page.query_selector("#pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 180, steps=8)
    page.mouse.up()
    page.wait_for_selector('#about:text("A drawing")')
    page.click("#examples button >> nth=2")
    page.wait_for_selector('#about:text("Test image 3")')
    assert page.is_hidden("#pad")


def test_a_tap_on_the_pad_draws_a_disc(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0])
    page.click("#draw")
    page.click("#pad")
    page.wait_for_selector('#about:text("A drawing")')
    code = """pad => pad.getContext("2d").getImageData(0, 0, pad.width, pad.height).data
      .filter((value, i) => i % 4 === 0 && value > 127).length"""
    # As wide as a line: the area of a disc with a diameter of 22 pixels.
    assert page.eval_on_selector("#pad", code) == pytest.approx(np.pi * 11**2, rel=0.05)


def focused(page: Any) -> str:
    """Returns the label of the element with the keyboard's focus."""
    code = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
    return str(page.evaluate(code))


def test_the_keyboard_alone_reaches_the_arithmetic(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0])
    page.keyboard.press("Tab")
    assert focused(page).startswith("Test image 1: ")
    page.keyboard.press("ArrowRight")
    assert focused(page).startswith("Test image 2: ")
    page.keyboard.press("Enter")
    page.wait_for_selector('#about:text("Test image 2")')
    for _ in range(60):
        page.keyboard.press("Tab")
        if ", map " in focused(page):
            break
    assert focused(page).startswith("conv3_1, map ")
    page.keyboard.press("ArrowLeft")
    assert focused(page).startswith("pool2, map ")
    assert "the largest of" in page.inner_text("#sum")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    chosen = focused(page)
    assert chosen.startswith("conv2_1, map ")
    page.keyboard.press("Enter")
    assert "The arrow keys choose a pixel" in focused(page)
    before = page.inner_text("#sum")
    page.keyboard.press("ArrowDown" if "Row 1," in before else "ArrowUp")
    assert "ReLU gives" in before and page.inner_text("#sum") != before
    page.focus(".source")
    page.keyboard.press("Enter")
    assert focused(page).startswith("pool1, map ") and "arrow keys" in focused(page)
    page.keyboard.press("Escape")
    assert focused(page).startswith("pool1, map ") and "arrow keys" not in focused(page)
    # Escape leads back from details without pixels, too.
    page.focus(".column.output .map >> nth=1")
    page.keyboard.press("Enter")
    assert focused(page) == "detail-title"
    page.keyboard.press("Escape")
    assert focused(page).startswith("Trouser: ")
    assert not page.query_selector(".pinned")


def test_wide_layers_show_the_most_active_maps_first(
    opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0])
    maps = page.locator(".column").nth(3).locator(".map")
    means = [float(m.get_attribute("aria-label").split()[6].rstrip(",")) for m in maps.all()]
    assert len(means) == 8 and means == sorted(means, reverse=True) and means[0] > means[-1]
    page.locator(".column").nth(3).locator(".more").click()
    assert maps.count() == 20


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_screen(
    width: int, scheme: str, opened: Callable[..., Any], trained_page: tuple[Path, Predictor]
) -> None:
    page = opened(trained_page[0], width, color_scheme=scheme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click(".column.pooling .map >> nth=1")
    box = page.query_selector("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_the_report_links_to_it(trained: tuple[Path, object], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / "export").mkdir(exist_ok=True)
    (workdir / "export" / "page.html").touch()
    evaluated = evaluate_checkpoint(workdir, "test", "latest")
    report = write_report(evaluated, evaluation_content(evaluated)).read_text()
    assert 'href="../export/page.html"' in report
