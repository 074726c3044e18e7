import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES
from PIL import Image

from tinyvgg_jax.report import page, plots
from tinyvgg_jax.report.evaluation import (
    CheckpointEvaluation,
    evaluate_checkpoint,
    evaluation_content,
)
from tinyvgg_jax.report.page import write_report

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


def test_papers_figures_stand_beside_those_of_its_dataset(
    run: Path, evaluated: CheckpointEvaluation
) -> None:
    before = (run / "summary.json").read_text()
    summary = json.loads(before)
    try:
        (run / "summary.json").write_text(json.dumps(summary | {"dataset": "fashion_mnist"}))
        text = write_report(evaluated, evaluation_content(evaluated)).read_text()
    finally:
        (run / "summary.json").write_text(before)
    assert all(f"the paper: {value}%" in text for value in (90.3, 89.7, 89.5))


@pytest.mark.parametrize("summary", [None, '{"seconds": "x"}', "[]"])
def test_a_run_that_is_not_finished_has_a_report_of_what_there_is(
    run: Path, tmp_path: Path, summary: str | None
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "summary.json").unlink()
    if summary is not None:
        (unfinished / "summary.json").write_text(summary)
    (unfinished / "metrics.jsonl").write_text("{damaged\n")
    evaluated = evaluate_checkpoint(unfinished)
    text = write_report(evaluated, evaluation_content(evaluated)).read_text()
    assert "Learning curves" not in text
    assert text.count('class="card"') == 1


def _texts(figure: Any) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_the_confusion_matrix_has_counts_and_percentages_of_its_rows() -> None:
    matrix = np.array([[30, 10, 0], [1, 998, 1], [0, 0, 1234]])
    figure = plots.confusion_matrix(matrix, ("a", "b", "c"))
    assert _texts(figure) == {"30", "75%", "10", "25%", "1", "<1%", "998", "100%", "1,234"}
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda theme: plots.confusion_matrix(
            np.eye(30, dtype=int), tuple(map(str, range(30))), theme
        ),
        lambda theme: plots.learning_curves(
            [
                {
                    "epoch": 1,
                    "train_loss": 1.0,
                    "train_accuracy": 0.5,
                    "validation_loss": 1.0,
                    "validation_accuracy": 0.4,
                }
            ],
            theme,
        ),
    ],
)
def test_figures_of_many_classes_and_of_one_epoch(draw: Callable[[plots.Theme], Any]) -> None:
    for theme in (plots.LIGHT, plots.DARK):
        content = plots.png(draw(theme))
        assert content.startswith(b"\x89PNG")


def test_the_command_line_says_where_the_report_is(
    trained: Trained, command_line: Callable[..., Any]
) -> None:
    done = command_line("--mode=eval", f"--workdir={trained[0]}", "--split=validation")
    assert done.returncode == 0, done.stderr
    assert f"report: {trained[0]}/evaluation/report.html" in done.stdout
    assert CLASSES[0] in done.stdout
