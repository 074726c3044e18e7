"""`evaluation/report.html`: one file without anything outside it."""

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
from tinyvgg_jax.runs.folder import write_text, writing_to

_WRONG, _RIGHT = 24, 24
_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def write_report(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> Path:
    """Writes the pictures of an evaluation and the page that shows them.

    Into the run's folder: `evaluation/SPLIT/*.png`, and `evaluation/report.html`.

    Args:
        evaluated: the evaluation.
        content: its `evaluation_content`.

    Returns:
        The page.

    Raises:
        UserError: if they cannot be written.
    """
    workdir, split = evaluated.workdir, evaluated.split
    folder, page = workdir / "evaluation" / split, workdir / "evaluation" / "report.html"
    drawings = _drawings(evaluated, content)
    wrong, right = _most_confidently_wrong(evaluated), _sample_of_right(evaluated)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            (folder / f"{name}.png").write_bytes(plots.png(draw(plots.LIGHT)))
        for name, chosen in (("wrong", wrong), ("right", right)):
            captions = ["\n".join(_caption(evaluated, index)) for index in chosen]
            figure = plots.gallery(evaluated.data.images[chosen], captions)
            (folder / f"{name}.png").write_bytes(plots.png(figure))
    write_text(page, _page(evaluated, content, drawings, wrong, right))
    return page


Drawing = Callable[[plots.Theme], Figure]


def _drawings(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> dict[str, Drawing]:
    matrix, names = np.asarray(content["confusion"]), evaluated.info.class_names
    curve = calibration(evaluated.result.probabilities, evaluated.data.labels)
    drawings: dict[str, Drawing] = {
        "confusion_matrix": lambda theme: plots.confusion(matrix, names, theme),
        "calibration": lambda theme: plots.reliability(curve, theme),
    }
    history = _history(evaluated.workdir)
    if history:
        drawings["learning_curves"] = lambda theme: plots.learning_curves(history, theme)
    return drawings


def _history(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if it is missing or damaged, which is not worth failing."""
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
    """summary.json; empty if the run is not finished, or it is damaged."""
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


def _most_confidently_wrong(evaluated: CheckpointEvaluation) -> np.ndarray:
    """Indices of the wrong predictions with the highest confidence."""
    wrong = np.flatnonzero(evaluated.result.predicted != evaluated.data.labels)
    return wrong[np.argsort(-_confidence(evaluated)[wrong], kind="stable")][:_WRONG]


def _sample_of_right(evaluated: CheckpointEvaluation) -> np.ndarray:
    """Indices of right predictions drawn by lot, the same every time."""
    right = np.flatnonzero(evaluated.result.predicted == evaluated.data.labels)
    return np.random.default_rng(0).permutation(right)[:_RIGHT]


def _caption(evaluated: CheckpointEvaluation, index: int) -> list[str]:
    names, result = evaluated.info.class_names, evaluated.result
    label, predicted = evaluated.data.labels[index], result.predicted[index]
    confidence = _confidence(evaluated)[index]
    sure = f"{names[predicted]} " + (">99%" if confidence > 0.99 else f"{confidence:.0%}")
    return [sure] if label == predicted else [sure, f"is {names[label]}"]


# From here on, HTML.


def _page(
    evaluated: CheckpointEvaluation,
    content: dict[str, Any],
    drawings: dict[str, Drawing],
    wrong: np.ndarray,
    right: np.ndarray,
) -> str:
    result, split = evaluated.result, evaluated.split
    low, high = accuracy_interval(result.correct, result.count)
    curves = ""
    if "learning_curves" in drawings:
        curves = (
            f"<h2>How it learned</h2>{_picture(drawings['learning_curves'], 'Learning curves')}"
        )
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
        calibration=_picture(drawings["calibration"], "Calibration curve"),
        calibration_error=f"{content['expected_calibration_error']:.2%}",
        wrong_total=f"{result.count - result.correct:,}",
        wrong=_tiles(evaluated, wrong),
        right=_tiles(evaluated, right),
    )


def _text(value: object) -> str:
    # A file's name may hold bytes that are no text.
    return html.escape(str(value).encode(errors="replace").decode())


def _facts(evaluated: CheckpointEvaluation) -> str:
    summary = _summary(evaluated.workdir)
    facts = [f"{evaluated.parameters:,} parameters"]
    if summary:
        facts.append(f"{summary['seconds']:,.0f} s of training on {summary.get('device')}")
        versions = summary["versions"]
        facts += [f"{name} {versions[name]}" for name in ("jax", "flax") if name in versions]
    return _text(", ".join(facts))


def _headline(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> str:
    """The accuracies of the three splits; of an unfinished run, of the one that was evaluated."""
    summary = _summary(evaluated.workdir)
    known = {name: summary.get(f"{name}_accuracy") for name in PAPER}
    known[evaluated.split] = content["accuracy"]
    is_papers = summary.get("dataset") == "fashion_mnist"
    cards = []
    for name, accuracy in known.items():
        if accuracy is None:
            continue
        paper = f"<small>the paper: {PAPER[name]:.1f}%</small>" if is_papers else ""
        cards.append(
            f'<div class="card"><span>{_text(name)}</span>'
            f"<strong>{accuracy:.2%}</strong>{paper}</div>"
        )
    return "\n".join(cards)


def _class_rows(content: dict[str, Any]) -> str:
    rows = []
    for row in content["per_class"]:
        scores = "".join(f"<td>{row[key]:.1%}</td>" for key in ("precision", "recall", "f1"))
        rows.append(f"<tr><th>{_text(row['class'])}</th>{scores}<td>{row['count']:,}</td></tr>")
    return "\n".join(rows)


def _picture(draw: Drawing, alt: str) -> str:
    """A figure in both colours; the browser takes the one that fits."""
    light, dark = (_data_uri(plots.png(draw(theme), 110)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(alt)}"></picture>'
    )


def _tiles(evaluated: CheckpointEvaluation, chosen: np.ndarray) -> str:
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
