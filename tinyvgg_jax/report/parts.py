"""Parts of the report page: functions from results to HTML."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tinyvgg_jax.report import plots
from tinyvgg_jax.report.scores import top_confusions
from tinyvgg_jax.report.tables import percentage

_MAX_CONFUSIONS = 7
# A wider matrix would not fit beside the table of classes.
_MAX_CLASSES_IN_PAIR = 12

# A figure that is drawn once for each theme.
Drawing = Callable[[plots.Theme], Figure]


def text(value: object) -> str:
    """Escapes text for HTML."""
    # The name of a file may hold bytes that are not valid UTF-8.
    return html.escape(str(value).encode(errors="replace").decode())


def name(value: object) -> str:
    """Escapes a name; one that is written from right to left leaves the text around it in order."""
    return f"<bdi>{text(value)}</bdi>"


def section(title: str, note: str, content: str) -> str:
    """Makes a section of the page.

    Args:
        title: plain text.
        note: HTML of the paragraph below the title; may be empty.
        content: HTML of the rest.
    """
    paragraph = f'<p class="faint">{note}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>\n{paragraph}\n{content}</section>"


def card(label: str, value: str, *notes: str) -> str:
    """Makes a card: a label, a value in large type, and small notes."""
    small = "".join(f"<small>{text(note)}</small>" for note in notes)
    return (
        f'<div class="card"><span>{text(label)}</span><strong>{text(value)}</strong>{small}</div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a table.

    Args:
        head: plain text of the titles.
        rows: HTML of the cells; the first of each row is its title.
    """
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    lines = (
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
        for first, *cells in rows
    )
    return (
        f"<table><thead><tr>{titles}</tr></thead>\n<tbody>\n"
        + "</tr>\n".join([*lines, ""])
        + "</tbody></table>"
    )


def definitions(entries: Mapping[str, str]) -> str:
    """Makes a list of terms, which are plain text, and what they are, which is HTML."""
    return (
        "<dl>" + "\n".join(f"<dt>{text(k)}</dt><dd>{v}</dd>" for k, v in entries.items()) + "</dl>"
    )


def data_uri(content: bytes) -> str:
    """Makes the address of a PNG file within the page."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(draw: Drawing, alt: str) -> str:
    """Embeds a figure in both themes; the browser shows the one of the reader's colour scheme."""
    light, dark = (data_uri(plots.png(draw(theme), 110)) for theme in (plots.LIGHT, plots.DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{text(alt)}"></picture>'
    )


def confusions_and_scores(
    content: Mapping[str, Any], names: tuple[str, ...], draw: Drawing, note: str
) -> str:
    """Makes the sections of the confusion matrix and of the scores by class.

    Args:
        content: `confusion` and `per_class`, as in `evaluation_content`.
        names: the names of all classes.
        draw: draws the confusion matrix, for more classes than a table can show.
        note: HTML that says what is counted.
    """
    matrix = np.asarray(content["confusion"])
    if len(names) > plots.MAX_CLASSES_WITH_NUMBERS:
        note += " The darker a cell, the more images; numbers would not fit."
        left = f'<div class="scroll natural">{picture(draw, "Confusion matrix")}</div>'
    else:
        note += ' <span class="narrow">Scroll sideways for all classes.</span>'
        left = f'<div class="scroll">{_matrix(matrix, names)}</div>'
    # Each of several seeds predicts the class of each image.
    counted = "Predictions" if "seeds" in content else "Images"
    scores = _scores(content["per_class"], matrix, counted)
    right = f'<div class="scroll">{scores}</div>{_confusions(matrix, names, counted)}'
    layout = "pair" if len(names) <= _MAX_CLASSES_IN_PAIR else "stack"
    return (
        f'<div class="{layout}">{section("Confusion matrix", note, left)}\n'
        f"{section('Scores by class', '', right)}</div>"
    )


def _matrix(matrix: np.ndarray, names: tuple[str, ...]) -> str:
    """Makes a confusion matrix with numbers as a table."""
    shades, totals = plots.confusion_shades(matrix), matrix.sum(axis=1)

    def cell(row: int, column: int) -> str:
        count, shade = matrix[row, column], shades[row, column]
        if not count:
            return "<td></td>"
        deep = ' class="deep"' if shade > plots.DEEP_SHADE else ""
        share = text(percentage(count / totals[row], 1))
        return f'<td{deep} style="--shade: {shade:.2f}">{count:,}<small>{share}</small></td>'

    places = range(len(names))
    head = "".join(
        f'<th scope="col" title="{text(one)}"><span>{name(one)}</span></th>' for one in names
    )
    lines = [
        f'<tr><th scope="row" title="{text(names[row])}">{name(names[row])}</th>'
        + "".join(cell(row, column) for column in places)
        + "</tr>"
        for row in places
    ]
    body = "\n".join(lines)
    return (
        f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def _scores(per_class: Sequence[Mapping[str, Any]], matrix: np.ndarray, counted: str) -> str:
    """Makes the table of precision, recall and F1; a dash where a score is not defined."""
    rows = []
    for row, predicted in zip(per_class, matrix.sum(axis=0), strict=True):
        defined = {
            "precision": predicted > 0,
            "recall": row["count"] > 0,
            "f1": predicted + row["count"] > 0,
        }
        scores = [percentage(row[key], 1) if is_there else "-" for key, is_there in defined.items()]
        rows.append([name(row["class"]), *map(text, scores), f"{row['count']:,}"])
    return table(["Class", "Precision", "Recall", "F1", counted], rows)


def _confusions(matrix: np.ndarray, names: tuple[str, ...], counted: str) -> str:
    """Makes the table of the most frequent confusions; nothing if there is none."""
    rows = [
        [
            f"{name(names[one.label])} taken for {name(names[one.predicted])}",
            f"{one.images:,} of {one.total:,}",
            text(percentage(one.images / one.total, 1)),
        ]
        for one in top_confusions(matrix, _MAX_CONFUSIONS)
    ]
    if not rows:
        return ""
    return f"<h3>Most frequent confusions</h3>{table(['Class', counted, 'Share'], rows)}"


def tiles(images: np.ndarray, captions: Sequence[Sequence[str]]) -> str:
    """Embeds images, each with its prediction.

    Args:
        images: `[N, H, W, C]` uint8; grey if C is 1, else RGB.
        captions: for each image, HTML of one line or two.
    """
    if not len(images):
        return "<p>None.</p>"
    result = []
    for number, (image, (first, *rest)) in enumerate(zip(images, captions, strict=True), start=1):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
        more = f"<br><em>{rest[0]}</em>" if rest else ""
        result.append(
            f'<figure><img src="{data_uri(buffer.getvalue())}" alt="image {number}">'
            f"<figcaption>{first}{more}</figcaption></figure>"
        )
    return '<div class="tiles">' + "\n".join(result) + "</div>"
