import dataclasses
import datetime
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import CLASSES, stored
from ml_collections import ConfigDict
from PIL import Image

import tinyvgg_jax
from tinyvgg_jax import train_and_evaluate
from tinyvgg_jax.config import FIELDS, validated
from tinyvgg_jax.data import DatasetInfo, Split
from tinyvgg_jax.report import page, plots
from tinyvgg_jax.report.evaluation import (
    CheckpointEvaluation,
    DataFolders,
    evaluate_checkpoint,
    evaluation_content,
)
from tinyvgg_jax.report.page import write_report
from tinyvgg_jax.report.recipe import curves_note, recipe
from tinyvgg_jax.report.scores import Calibration, accuracy_interval, top_confusions
from tinyvgg_jax.report.tables import columns, percentage, summary_table

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def run(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "a <run> & more"
    shutil.copytree(trained[0], folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path) -> CheckpointEvaluation:
    """An evaluation with mistakes, which the network on `bars` does not make."""
    evaluated = evaluate_checkpoint(run)
    labels = evaluated.data.labels
    noise = 3 * np.random.default_rng(0).standard_normal(evaluated.result.logits.shape, "f4")
    logits = evaluated.result.logits + noise
    right = np.bincount(labels[logits.argmax(axis=1) == labels], minlength=5)
    result = dataclasses.replace(evaluated.result, logits=logits, correct_per_class=right)
    assert 0.3 < result.accuracy < 0.95
    return dataclasses.replace(evaluated, result=result)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a page at once: rendering its figures takes seconds."""
    monkeypatch.setattr(plots, "png", lambda *_: b"\x89PNG")


def _report(evaluated: CheckpointEvaluation) -> str:
    """The page of an evaluation."""
    return write_report(evaluated, evaluation_content(evaluated)).read_text()


class _Page(HTMLParser):
    """Collects the links and the text of a page, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_by_itself(
    run: Path, evaluated: CheckpointEvaluation, trained: Trained
) -> None:
    content = evaluation_content(evaluated)
    path = write_report(evaluated, content)
    assert path == run / "evaluation" / "report.html"
    parsed = _Page()
    parsed.feed(path.read_text())
    assert len(parsed.links) >= 6
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert "http" not in path.read_text()
    assert not re.search(r"\$\w", parsed.text)
    for split in ("train", "validation"):
        assert f"{trained[1][f'{split}_accuracy']:.2%}" in parsed.text
    assert f"{content['accuracy']:.2%}" in parsed.text
    assert "a <run> & more" in parsed.text
    # The paper's accuracies are those of another dataset.
    assert "the paper" not in parsed.text
    for row in content["per_class"]:
        assert row["class"] in parsed.text


def test_accuracies_stand_beside_those_of_the_same_parameters_only(
    evaluated: CheckpointEvaluation,
) -> None:
    assert _report(evaluated).count('class="card"') == 3
    other = dataclasses.replace(evaluated, step=1)
    assert _report(other).count('class="card"') == 1
    # One seed at another step is enough for the summary's means to be of other parameters.
    content = evaluation_content(evaluated)
    for each, count in (((evaluated, evaluated), 3), ((evaluated, other), 1)):
        cards = page._cards(evaluated.workdir, each, content)
        assert cards.count('class="card"') == count


def test_the_pictures_are_beside_it(run: Path, evaluated: CheckpointEvaluation) -> None:
    write_report(evaluated, evaluation_content(evaluated))
    names = ["calibration", "confusion_matrix", "learning_curves", "right", "wrong"]
    assert sorted(p.stem for p in (run / "evaluation" / "test").iterdir()) == names
    for path in (run / "evaluation" / "test").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width >= 700
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, path


def test_what_was_wrong_comes_by_confidence(evaluated: CheckpointEvaluation) -> None:
    result = evaluated.result
    chosen = page._most_confident_wrong(evaluated)
    assert (result.predicted[chosen] != evaluated.data.labels[chosen]).all()
    confidence = result.probabilities.max(axis=1)
    assert (np.diff(confidence[chosen]) <= 0).all()
    wrong = result.predicted != evaluated.data.labels
    assert len(chosen) == min(24, wrong.sum())
    right = page._sample_of_correct(evaluated)
    assert (result.predicted[right] == evaluated.data.labels[right]).all()
    assert len(set(right.tolist())) == len(right) > 0


@pytest.mark.usefixtures("without_pictures")
def test_papers_figures_stand_beside_those_of_its_dataset(
    run: Path, evaluated: CheckpointEvaluation
) -> None:
    before = (run / "summary.json").read_text()
    summary = stored(run / "summary.json")
    try:
        (run / "summary.json").write_text(json.dumps(summary | {"dataset": "fashion_mnist"}))
        text = write_report(evaluated, evaluation_content(evaluated)).read_text()
    finally:
        (run / "summary.json").write_text(before)
    assert all(f"the paper: {value}%" in text for value in (90.3, 89.7, 89.5))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("summary", [None, '{"seconds": "x"}', "[]"])
def test_a_run_that_is_not_finished_has_a_report_of_what_there_is(
    run: Path, tmp_path: Path, summary: str | None
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "summary.json").unlink()
    if summary is not None:
        (unfinished / "summary.json").write_text(summary)
    # A checkpoint within the first epoch.
    evaluated = dataclasses.replace(evaluate_checkpoint(unfinished), history=[])
    text = write_report(evaluated, evaluation_content(evaluated)).read_text()
    assert "Learning curves" not in text
    assert text.count('class="card"') == 1


@pytest.mark.usefixtures("without_pictures")
def test_learning_curves_come_from_the_checkpoint(run: Path, tmp_path: Path) -> None:
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{damaged\n")
    evaluated = evaluate_checkpoint(tmp_path / "run")
    assert evaluated.history == expected
    assert "Learning curves" in _report(evaluated)


def test_train_is_drawn_in_the_middle_of_the_epoch_and_explained() -> None:
    history = [
        {
            "epoch": epoch,
            "train_loss": 1.0,
            "train_accuracy": 0.5,
            "validation_loss": 1.0,
            "validation_accuracy": 0.4,
        }
        for epoch in (1, 2)
    ]
    figure = plots.learning_curves([history, history], "The note " + 20 * "goes on and ")
    for axes in figure.axes:
        curves = [line.get_xdata() for line in axes.lines]
        np.testing.assert_array_equal(curves, [[0.5, 1.5]] * 2 + [[1, 2]] * 2)
        legend = axes.get_legend()
        assert legend is not None
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["train, mean over the epoch", "validation, after the epoch"]
    assert figure.get_supxlabel().startswith("The note goes on")
    plots.png(figure)


@pytest.mark.parametrize(
    ("changes", "there", "not_there"),
    [
        ({}, ["augmented images"], ["dropout", "smoothing", "averaged"]),
        ({"augment.horizontal_flip": False, "augment.rotation_degrees": 0.0}, [], ["augmented"]),
        (
            {"model.dropout": 0.1, "label_smoothing": 0.1, "ema_decay": 0.9},
            ["with dropout", "label smoothing", "averaged parameters"],
            [],
        ),
    ],
)
def test_the_note_names_what_makes_train_harder(
    config: ConfigDict, changes: dict[str, Any], there: list[str], not_there: list[str]
) -> None:
    config.update_from_flattened_dict(changes)
    note = curves_note(validated(config))
    assert "running mean" in note and "that is no fault" in note
    assert all(words in note for words in there)
    assert not any(words in note for words in not_there)


@pytest.mark.usefixtures("without_pictures")
def test_the_page_explains_the_learning_curves(evaluated: CheckpointEvaluation) -> None:
    assert curves_note(evaluated.config) in _report(evaluated).replace("&#x27;", "'")


# For each field that says how a run was trained, another value.
OTHER_VALUES: dict[str, Any] = {
    "seed": 7,
    "num_seeds": 3,
    "num_epochs": 17,
    "batch_size": 77,
    "learning_rate": 0.123,
    "learning_rate_decay": 0.77,
    "schedule": "cosine",
    "warmup_epochs": 1.5,
    "optimizer": "muon",
    "momentum": 0.77,
    "nesterov": True,
    "weight_decay": 0.07,
    "gradient_clipping": 7.0,
    "label_smoothing": 0.07,
    "ema_decay": 0.77,
    "init_from": "runs/other",
    "freeze": ("conv1",),
    "dtype": "bfloat16",
    "model.widths": (7, 8),
    "model.convs_per_block": 7,
    "model.hidden": 77,
    "model.dropout": 0.07,
    "model.kernel_init": "orthogonal",
    "augment.rotation_degrees": 7.0,
    "augment.horizontal_flip": False,
    "augment.alternating_flip": True,
    "augment.shift_pixels": 7,
    "augment.cutout_size": 7,
    "augment.erasing": 0.07,
    "augment.mixup_alpha": 0.07,
    "augment.scale": 0.07,
    "augment.aspect": 0.07,
    "augment.shear_degrees": 7.0,
    "augment.background": 0.07,
    "augment.gamma": 0.07,
    "augment.contrast": 0.07,
    "augment.brightness": 0.07,
    "augment.blur_sigma": 0.07,
    "augment.noise": 0.07,
    "augment.inverted": 0.07,
    "data.name": "other",
    "data.train_split": "train[:7]",
    "data.validation_split": "train[7:]",
    "data.test_split": "test[:7]",
}


def test_every_field_that_says_how_a_run_was_trained_is_in_the_recipe(config: ConfigDict) -> None:
    # The pipelines train on the same batches in the same order.
    without_effect = {"profile", "num_devices", "data.pipeline"}
    # And these say how a dataset is found or prepared, which has a name.
    names = ("data_dir", "source_dir", "image_size", "channels", "fit")
    without_effect |= {f"data.{name}" for name in names}
    assert set(OTHER_VALUES) == set(FIELDS) - without_effect
    before = recipe(validated(config))
    for name, value in OTHER_VALUES.items():
        changed = ConfigDict(config.to_dict())
        changed.update_from_flattened_dict({name: value})
        assert recipe(validated(changed)) != before, name


@pytest.mark.usefixtures("without_pictures")
def test_the_page_says_its_date_recipe_and_command(evaluated: CheckpointEvaluation) -> None:
    page = _report(evaluated)
    now = datetime.datetime.now(datetime.UTC)
    dates = [now, now - datetime.timedelta(minutes=1)]
    assert any(f"report of {date:%Y-%m-%d %H:%M} UTC" in page for date in dates)
    for words in recipe(evaluated.config).values():
        assert f"<dd>{words}</dd>" in page
    assert f"tinyvgg_jax {tinyvgg_jax.__version__}, Python 3." in page
    assert f"jax {jax.__version__}" in page


def test_its_command_makes_the_same_report_again(
    trained: Trained, tmp_path: Path, data_dir: Path, command_line: Callable[..., Any]
) -> None:
    workdir = tmp_path / "it's a run"
    shutil.copytree(trained[0], workdir)
    evaluated = evaluate_checkpoint(
        workdir, "validation", "best", DataFolders(str(data_dir)), flip_averaging=True
    )
    before = _report(evaluated)
    command = html.unescape(re.findall("<code>(.*?)</code>", before)[0])
    path = workdir / "evaluation" / "report_validation.html"
    path.unlink()
    program, *arguments = shlex.split(command)
    assert program == "python" and arguments[:2] == ["-m", "tinyvgg_jax.main"]
    assert f"--config.data.data_dir={data_dir}" in arguments
    done = command_line(*arguments[2:])
    assert done.returncode == 0, done.stderr
    assert f"report: {path}" in done.stdout and CLASSES[0] in done.stdout
    date = r"report of [\d: -]* UTC"
    assert re.sub(date, "", path.read_text()) == re.sub(date, "", before)


@pytest.mark.usefixtures("without_pictures")
def test_each_split_keeps_its_page_and_links_to_the_others(
    trained: Trained, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    pages = {"test": "report.html", "train": "report_train.html"}
    for split, name in pages.items():
        evaluated = evaluate_checkpoint(workdir, split)
        assert write_report(evaluated, evaluation_content(evaluated)).name == name
    for split, name in pages.items():
        content = (workdir / "evaluation" / name).read_text()
        assert f"Evaluation on the <b>{split}</b> split" in content
        others = [other for other in pages.values() if other != name]
        assert re.findall(r'<nav class="splits">.*href="(.*?)".*</nav>', content) == others
    # A page of an earlier version may be of any split, so nothing links to it.
    (workdir / "evaluation" / "report.html").write_text("<html>earlier</html>")
    evaluated = evaluate_checkpoint(workdir, "validation")
    latest = _report(evaluated)
    assert re.findall(r'href="(.*?)"', latest) == ["report_train.html"]
    assert (workdir / "evaluation" / "report.html").read_text() == "<html>earlier</html>"


def test_several_seeds_have_a_page_that_links_to_each(
    config: ConfigDict, tmp_path: Path, command_line: Callable[..., Any]
) -> None:
    config.num_seeds, config.num_epochs, config.learning_rate, config.seed = 2, 1, 0.01, 4
    summary = train_and_evaluate(config, tmp_path)
    done = command_line("--mode=eval", f"--workdir={tmp_path}", "--split=validation")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "evaluation" / "report_validation.html"
    assert done.stdout.endswith(f"report: {path}\n")
    page = path.read_text()
    parsed = _Page()
    parsed.feed(page)
    links = [link for link in parsed.links if not link.startswith("data:")]
    assert links == [f"../seed_{seed}/evaluation/report_validation.html" for seed in (4, 5)]
    assert all((path.parent / link).exists() for link in links)
    found = summary["seeds"]["validation_accuracy"]
    assert f"Mean accuracy {found['mean']:.2%}, standard deviation {found['std']:.2%}" in page
    assert "no interval from 2 values" in page and "seeds 4 to 5" in page
    for value in found["values"]:
        assert f"<td>{value:.2%}</td>" in page
    content = stored(tmp_path / "evaluation" / "validation.json")
    assert f"validation, ensemble</span><strong>{content['ensemble']['accuracy']:.2%}" in page
    # Both seeds count in the matrix.
    assert np.sum(content["confusion"]) == 2 * 80
    for (_, _), count in np.ndenumerate(content["confusion"]):
        assert not count or f">{count}<small>" in page
    assert ">Predictions</th>" in page and ">Images</th>" not in page
    names = sorted(p.name for p in (tmp_path / "evaluation" / "validation").iterdir())
    assert names == ["confusion_matrix.png", "learning_curves.png"]


def _texts(figure: Any) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_the_confusion_matrix_has_counts_and_percentages_of_its_rows() -> None:
    matrix = np.array([[30, 10, 0], [1, 998, 1], [0, 0, 1234]])
    figure = plots.confusion_matrix(matrix, ("a", "b", "c"))
    expected = {"30", "75.0%", "10", "25.0%", "1", "0.1%", "998", "99.8%", "1,234", "100.0%"}
    assert _texts(figure) == expected
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    assert min(float(text.get_fontsize()) for text in figure.axes[0].texts) >= 9


@pytest.mark.usefixtures("without_pictures")
def test_the_page_shows_the_confusion_matrix_as_text(evaluated: CheckpointEvaluation) -> None:
    content = evaluation_content(evaluated)
    page = _report(evaluated)
    for row in content["confusion"]:
        for count in filter(None, row):
            share = percentage(count / sum(row), 1)
            assert f"{count}<small>{share}</small>" in page
    first = top_confusions(np.array(content["confusion"]), 1)[0]
    words = f"<bdi>{CLASSES[first.label]}</bdi> taken for <bdi>{CLASSES[first.predicted]}</bdi>"
    assert f"{words}</th><td>{first.images} of {first.total}</td>" in page


def test_calibration_has_an_interval_at_each_point_and_no_line_through_few_images() -> None:
    counts = np.array([0, 3, 40, 9, 50])
    accuracy = np.array([0, 1, 0.5, 0, 0.9])
    curve = Calibration(np.array([0, 0.3, 0.5, 0.7, 0.9]), accuracy, counts)
    axes = plots.calibration_curve(curve).axes[0]
    np.testing.assert_allclose(np.asarray(axes.lines[1].get_xdata()), [50, 90])
    (bars,) = axes.containers
    low, high = np.array(bars[2][0].get_segments())[:, :, 1].T
    for index, found in zip((1, 2, 3, 4), zip(low, high, strict=True), strict=True):
        correct = round(accuracy[index] * counts[index])
        expected = 100 * np.array(accuracy_interval(correct, int(counts[index])))
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    "draw",
    [
        lambda theme: plots.confusion_matrix(
            np.eye(30, dtype=int), tuple(map(str, range(30))), theme
        ),
        lambda theme: plots.learning_curves(
            [
                [
                    {
                        "epoch": 1,
                        "train_loss": 1.0,
                        "train_accuracy": 0.5,
                        "validation_loss": 1.0,
                        "validation_accuracy": 0.4,
                    }
                ]
            ],
            theme=theme,
        ),
    ],
)
def test_figures_of_many_classes_and_of_one_epoch(draw: Callable[[plots.Theme], Any]) -> None:
    for theme in (plots.LIGHT, plots.DARK):
        content = plots.png(draw(theme))
        assert content.startswith(b"\x89PNG")


def _of_classes(
    evaluated: CheckpointEvaluation, names: Sequence[str], empty: int | None = None
) -> CheckpointEvaluation:
    """The evaluation of other, random predictions of as many images in other classes."""
    rng, N = np.random.default_rng(0), len(evaluated.data)
    labels = rng.integers(len(names), size=N).astype(np.int32)
    if empty is not None:
        labels[labels == empty] = 0
    logits = rng.standard_normal((N, len(names))).astype(np.float32)
    right = logits.argmax(axis=1) == labels
    result = dataclasses.replace(
        evaluated.result,
        logits=logits,
        correct_per_class=np.bincount(labels[right], minlength=len(names)),
        count_per_class=np.bincount(labels, minlength=len(names)),
    )
    return dataclasses.replace(
        evaluated,
        data=Split(evaluated.data.images, labels),
        info=DatasetInfo(evaluated.info.image_shape, tuple(names)),
        result=result,
    )


AWKWARD = [
    60 * "x",
    "<script>alert(1)</script> & co",
    "$x^2$ $5 \\alpha",
    "\N{DRESS} \N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{VARIATION SELECTOR-16}",
    "\u05e9\u05dc\u05d5\u05dd",
    "two\nlines",
]


def test_awkward_class_names_are_shown_as_they_are(evaluated: CheckpointEvaluation) -> None:
    awkward = _of_classes(evaluated, AWKWARD, empty=5)
    # A glyph that Matplotlib lacks is a warning, which fails the test.
    page = _report(awkward)
    parsed = _Page()
    parsed.feed(page)
    assert all(name in parsed.text for name in AWKWARD)
    assert "<script" not in page
    labels = plots.confusion_matrix(np.eye(6, dtype=int), tuple(AWKWARD)).axes[0].get_yticklabels()
    shown = [label.get_text() for label in labels]
    assert shown[0] == 17 * "x" + "..."
    assert shown[2] == AWKWARD[2] and not any(label.get_parse_math() for label in labels)
    assert shown[3] == "\ufffd \ufffd\ufffd"
    assert shown[4] == AWKWARD[4]
    assert shown[5] == "two lines"
    # A class without images has no recall, and one that is never predicted has no precision.
    row = r"<bdi>two\nlines</bdi></th><td>[\d.]+%</td><td>-</td><td>[\d.]+%</td><td>0</td>"
    assert re.search(row, page)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("num_classes", [1, 100])
def test_a_page_of_one_class_and_of_a_hundred(
    evaluated: CheckpointEvaluation, num_classes: int
) -> None:
    names = [f"class {label}" for label in range(num_classes)]
    other = _of_classes(evaluated, names)
    page = _report(other)
    assert all(f"<bdi>{name}</bdi></th>" in page for name in names)
    # Cells with numbers would make a table of ten thousand cells.
    assert ('class="matrix"' in page) == (num_classes == 1)
    matrix = np.asarray(evaluation_content(other)["confusion"])
    figure = plots.confusion_matrix(matrix, tuple(names))
    # At 140 dots an inch.
    assert 700 <= 140 * figure.get_figwidth() < 3000


def test_rounding_makes_neither_all_nor_nothing() -> None:
    assert percentage(0.995, 1) == "99.5%"
    assert percentage(0.99996) == ">99.99%"
    assert percentage(0.9999, 1) == ">99.9%"
    assert percentage(0.0004, 1) == "<0.1%"
    assert (percentage(1.0), percentage(0.0, 1)) == ("100.00%", "0.0%")


def test_columns_never_run_together(trained: Trained) -> None:
    _, summary = trained
    absurd = summary | {"train_loss": 1.5e31, "test_loss": 123456.7, "dataset": "fashion_mnist"}
    rows = [line.split() for line in summary_table(absurd, Path("x")).splitlines()[:4]]
    assert rows[0] == ["split", "accuracy", "loss", "the", "paper"]
    assert rows[1][2:] == ["1.500e+31", "90.3%"]
    assert rows[3][2:] == ["1.235e+05", "89.5%"]
    lines = columns([["name", "value"], ["a", "1" * 30], ["b" * 40, "2"]])
    assert lines[1] == "a" + 41 * " " + 30 * "1"
    assert len({len(line) for line in lines}) == 1
