"""The report page `evaluation/report.html`: a single file that refers to no other."""

import base64
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tinyvgg_jax.report import plots
from tinyvgg_jax.report.evaluation import CheckpointEvaluation
from tinyvgg_jax.report.scores import accuracy_interval, calibration
from tinyvgg_jax.report.tables import PAPER
from tinyvgg_jax.runs.files import subfolder, write_bytes, write_text

_MAX_WRONG, _MAX_CORRECT = 24, 24
_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def write_report(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> Path:
    """Writes the pictures of an evaluation, and the page that shows them.

    The run's folder receives `evaluation/SPLIT/*.png` and `evaluation/report.html`.

    Args:
        evaluated: the evaluation of a checkpoint.
        content: the same evaluation, as from `evaluation_content`.

    Returns:
        The path of the page.

    Raises:
        UserError: if the files cannot be written.
    """
    folder = subfolder(evaluated.workdir, "evaluation", evaluated.split)
    page = folder.parent / "report.html"
    drawings = _drawings(evaluated, content)
    wrong, correct = _most_confident_wrong(evaluated), _sample_of_correct(evaluated)
    for name, draw in drawings.items():
        write_bytes(folder / f"{name}.png", plots.png(draw(plots.LIGHT)))
    for name, chosen in (("wrong", wrong), ("right", correct)):
        captions = ["\n".join(_caption(evaluated, index)) for index in chosen]
        figure = plots.gallery(evaluated.data.images[chosen], captions)
        write_bytes(folder / f"{name}.png", plots.png(figure))
    write_text(page, _page(evaluated, content, drawings, wrong, correct))
    return page


# A figure that is drawn once for each theme.
Drawing = Callable[[plots.Theme], Figure]


def _drawings(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> dict[str, Drawing]:
    """Prepares the figures by the names of their files; without history no learning curves."""
    matrix, names = np.asarray(content["confusion"]), evaluated.info.class_names
    curve = calibration(evaluated.result.probabilities, evaluated.data.labels)
    drawings: dict[str, Drawing] = {
        "confusion_matrix": lambda theme: plots.confusion_matrix(matrix, names, theme),
        "calibration": lambda theme: plots.calibration_curve(curve, theme),
    }
    history = _history(evaluated.workdir)
    if history:
        drawings["learning_curves"] = lambda theme: plots.learning_curves(history, theme)
    return drawings


def _history(workdir: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; empty if it is missing or damaged, since the report can do without."""
    try:
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [json.loads(line) for line in lines]
        for record in history:
            for key in ("epoch", "train_loss", "train_accuracy"):
                float(record[key])
        return history
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _summary(workdir: Path) -> dict[str, Any]:
    """Reads `summary.json`; empty if the run is not finished, or the file is damaged."""
    try:
        content: dict[str, Any] = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        for key in ("seconds", *(f"{split}_accuracy" for split in PAPER)):
            content[key] = float(content[key])
        dict(content["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content


def _confidence(evaluated: CheckpointEvaluation) -> np.ndarray:
    return evaluated.result.probabilities.max(axis=1)


def _most_confident_wrong(evaluated: CheckpointEvaluation) -> np.ndarray:
    """Selects the wrong predictions with the highest confidence, as indices into the split."""
    wrong = np.flatnonzero(evaluated.result.predicted != evaluated.data.labels)
    return wrong[np.argsort(-_confidence(evaluated)[wrong], kind="stable")][:_MAX_WRONG]


def _sample_of_correct(evaluated: CheckpointEvaluation) -> np.ndarray:
    """Draws a random sample of correct predictions, as indices; the same in every report."""
    correct = np.flatnonzero(evaluated.result.predicted == evaluated.data.labels)
    return np.random.default_rng(0).permutation(correct)[:_MAX_CORRECT]


def _caption(evaluated: CheckpointEvaluation, index: int) -> list[str]:
    """Describes a prediction: class and confidence, and the true class if it is another."""
    names, result = evaluated.info.class_names, evaluated.result
    label, predicted = evaluated.data.labels[index], result.predicted[index]
    confidence = _confidence(evaluated)[index]
    # Rounding would show 100 %, as if the network were certain.
    percentage = ">99%" if confidence > 0.99 else f"{confidence:.0%}"
    prediction = f"{names[predicted]} {percentage}"
    return [prediction] if label == predicted else [prediction, f"true: {names[label]}"]


# The functions below make the HTML.


def _page(
    evaluated: CheckpointEvaluation,
    content: dict[str, Any],
    drawings: dict[str, Drawing],
    wrong: np.ndarray,
    correct: np.ndarray,
) -> str:
    """Fills the template `page.html`."""
    result, split = evaluated.result, evaluated.split
    low, high = accuracy_interval(result.correct, result.count)
    curves = ""
    if "learning_curves" in drawings:
        picture = _picture(drawings["learning_curves"], "Learning curves")
        curves = f"<section><h2>Learning curves</h2>{picture}</section>"
    return _PAGE.substitute(
        title=_text(evaluated.workdir.resolve().name),
        facts=_facts(evaluated),
        headline=_headline(evaluated, content),
        split=_text(split),
        accuracy=f"{result.accuracy:.2%}",
        interval=f"{low:.2%} to {high:.2%}",
        correct=f"{result.correct:,}",
        count=f"{result.count:,}",
        loss=f"{result.mean_loss:.4f}",
        step=f"{evaluated.step:,}",
        confusion=_picture(drawings["confusion_matrix"], "Confusion matrix"),
        classes=_class_rows(content),
        curves=curves,
        calibration=_picture(drawings["calibration"], "Calibration"),
        calibration_error=f"{content['expected_calibration_error']:.2%}",
        wrong_total=f"{result.count - result.correct:,}",
        wrong_shown=f"{len(wrong):,}",
        wrong=_tiles(evaluated, wrong),
        right_shown=f"{len(correct):,}",
        right=_tiles(evaluated, correct),
    )


def _text(value: object) -> str:
    """Escapes text for HTML."""
    # The name of a file may hold bytes that are not valid UTF-8.
    return html.escape(str(value).encode(errors="replace").decode())


def _facts(evaluated: CheckpointEvaluation) -> str:
    """Lists parameters, and training time, device and versions of a finished run."""
    summary = _summary(evaluated.workdir)
    facts = [f"{evaluated.parameters:,} parameters"]
    if summary:
        facts.append(f"{summary['seconds']:,.0f} s of training on {summary.get('device')}")
        versions = summary["versions"]
        facts += [f"{name} {versions[name]}" for name in ("jax", "flax") if name in versions]
    return _text(", ".join(facts))


def _headline(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> str:
    """Makes a card for each split's accuracy; an unfinished run has only the evaluated one."""
    summary = _summary(evaluated.workdir)
    known = {name: summary.get(f"{name}_accuracy") for name in PAPER}
    known[evaluated.split] = content["accuracy"]
    is_fashion_mnist = summary.get("dataset") == "fashion_mnist"
    cards = []
    for name, accuracy in known.items():
        if accuracy is None:
            continue
        paper = f"<small>the paper: {PAPER[name]:.1f}%</small>" if is_fashion_mnist else ""
        cards.append(
            f'<div class="card"><span>{_text(name)}</span>'
            f"<strong>{accuracy:.2%}</strong>{paper}</div>"
        )
    return "\n".join(cards)


def _class_rows(content: dict[str, Any]) -> str:
    """Makes the rows of the table of precision, recall and F1."""
    rows = []
    for row in content["per_class"]:
        scores = "".join(f"<td>{row[key]:.1%}</td>" for key in ("precision", "recall", "f1"))
        rows.append(f"<tr><th>{_text(row['class'])}</th>{scores}<td>{row['count']:,}</td></tr>")
    return "\n".join(rows)


def _picture(draw: Drawing, alt: str) -> str:
    """Embeds a figure in both themes; the browser shows the one of the reader's colour scheme."""
    light, dark = (_data_uri(plots.png(draw(theme), 110)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(alt)}"></picture>'
    )


def _tiles(evaluated: CheckpointEvaluation, chosen: np.ndarray) -> str:
    """Embeds images of the split, each with its prediction."""
    if not len(chosen):
        return "<p>None.</p>"
    tiles = []
    for index in chosen:
        image = evaluated.data.images[index]
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
        first, *rest = map(_text, _caption(evaluated, index))
        more = f"<br><em>{rest[0]}</em>" if rest else ""
        tiles.append(
            f'<figure><img src="{_data_uri(buffer.getvalue())}" alt="image {index}">'
            f"<figcaption>{first}{more}</figcaption></figure>"
        )
    return "\n".join(tiles)


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
