"""The report page of a split: a single file, which links to the pages of other splits and seeds."""

import contextlib
import datetime
import platform
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import tinyvgg_jax
from tinyvgg_jax.data import SPLITS
from tinyvgg_jax.paths import open_regular
from tinyvgg_jax.report import parts, plots
from tinyvgg_jax.report.evaluation import CheckpointEvaluation
from tinyvgg_jax.report.parts import Drawing, text
from tinyvgg_jax.report.recipe import curves_note, library_versions, recipe
from tinyvgg_jax.report.scores import accuracy_interval, calibration
from tinyvgg_jax.report.tables import PAPER, interval_text, loss_text, percentage
from tinyvgg_jax.runs.files import subfolder, write_bytes, write_text
from tinyvgg_jax.runs.folder import read_summary

_MAX_WRONG, _MAX_CORRECT = 24, 24
_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
_MATRIX_NOTE = "A row for each true class, a column for each predicted class"
_AT_WORK = '<p><a href="../export/page.html">See the exported network at work</a> in a browser.</p>'
_SPLIT_LINKS = re.compile(r'<nav class="splits">.*?</nav>', re.DOTALL)


def report_path(workdir: Path, split: str) -> Path:
    """Names the page of a split: `report.html` for test, else `report_SPLIT.html`."""
    return workdir / "evaluation" / ("report.html" if split == "test" else f"report_{split}.html")


def write_report(evaluated: CheckpointEvaluation, content: dict[str, Any]) -> Path:
    """Writes the pictures of an evaluation, and the page that shows them.

    The run's folder receives `evaluation/SPLIT/*.png` and the page, `report_path`.

    Args:
        evaluated: the evaluation of a checkpoint.
        content: the same evaluation, as from `evaluation_content`.

    Returns:
        The path of the page.

    Raises:
        UserError: if the files cannot be written.
    """
    draw_matrix, draw_calibration = _matrix_drawing(evaluated, content), _calibration(evaluated)
    galleries = {"wrong": _most_confident_wrong(evaluated), "right": _sample_of_correct(evaluated)}
    figures = {
        "confusion_matrix": draw_matrix(plots.LIGHT),
        "calibration": draw_calibration(plots.LIGHT),
        **_curves_figure([evaluated]),
    }
    for name, chosen in galleries.items():
        captions = ["\n".join(_caption(evaluated, i, plots.short, str)) for i in chosen]
        figures[name] = plots.gallery(evaluated.data.images[chosen], captions)
    _write_figures(evaluated.workdir, evaluated.split, figures)
    head = _run_head(evaluated, content)
    body = _run_body(evaluated, content, draw_matrix, draw_calibration, galleries)
    return _write_page(evaluated.workdir, [evaluated], content, head, body)


def write_seeds_report(
    workdir: Path, each: Sequence[CheckpointEvaluation], content: dict[str, Any]
) -> Path:
    """Writes the page of several seeds, which links to the page of each.

    The folder receives pictures and the page, as in `write_report`.

    Args:
        workdir: the folder of all seeds.
        each: the evaluations of the seeds.
        content: the same evaluations, as from `seeds_content`.

    Returns:
        The path of the page.

    Raises:
        UserError: if the files cannot be written.
    """
    draw_matrix = _matrix_drawing(each[0], content)
    figures = {"confusion_matrix": draw_matrix(plots.LIGHT), **_curves_figure(each)}
    _write_figures(workdir, each[0].split, figures)
    head, body = _seeds_head(each, content), _seeds_body(workdir, each, content, draw_matrix)
    return _write_page(workdir, each, content, head, body)


# Pieces that both pages have.


def _write_page(
    workdir: Path,
    each: Sequence[CheckpointEvaluation],
    content: Mapping[str, Any],
    head: str,
    body: str,
) -> Path:
    """Fills the template `page.html`, writes it, and links the pages of all splits."""
    split = each[0].split
    subfolder(workdir, "evaluation")
    page = report_path(workdir, split)
    title = parts.name(workdir.resolve().name)
    filled = _PAGE.substitute(
        title=title,
        plain_title=text(f"{workdir.resolve().name}: {percentage(content['accuracy'])} on {split}"),
        facts=_facts(workdir, each[0]),
        at_work=_AT_WORK if (workdir / "export" / "page.html").is_file() else "",
        cards=_cards(workdir, each, content),
        head=head,
        body=body,
        recipe=_recipe_section(workdir, each),
    )
    write_text(page, filled)
    _link_splits(workdir)
    return page


def _link_splits(workdir: Path) -> None:
    """Links the pages of a folder with each other, those that were written before as well."""
    pages = {}
    for split in SPLITS:
        # An earlier version wrote no links, and called the page of every split `report.html`.
        with (
            contextlib.suppress(OSError, UnicodeDecodeError),
            open_regular(report_path(workdir, split)) as file,
        ):
            page = file.read().decode()
            if _SPLIT_LINKS.search(page):
                pages[split] = page
    for split, page in pages.items():
        links = [
            f'<a href="{report_path(workdir, other).name}">{other}</a>'
            for other in pages
            if other != split
        ]
        line = f"Reports on other splits: {', '.join(links)}" if links else ""
        linked = _SPLIT_LINKS.sub(f'<nav class="splits">{line}</nav>', page, count=1)
        if linked != page:
            write_text(report_path(workdir, split), linked)


def _facts(workdir: Path, evaluated: CheckpointEvaluation) -> str:
    """Lists parameters, the date, and training time, device and versions of a finished run."""
    summary = read_summary(workdir)
    facts = [f"{evaluated.parameters:,} parameters"]
    if summary:
        facts.append(f"{summary['seconds']:,.0f} s of training on {summary.get('device')}")
        versions = summary["versions"]
        facts += [f"{name} {versions[name]}" for name in ("jax", "flax") if name in versions]
    now = datetime.datetime.now(datetime.UTC)
    return text(f"{', '.join(facts)}; report of {now:%Y-%m-%d %H:%M} UTC")


def _cards(workdir: Path, each: Sequence[CheckpointEvaluation], content: Mapping[str, Any]) -> str:
    """Makes a card for each split's accuracy, as far as that of the same parameters is known."""
    summary, split = read_summary(workdir) or {}, each[0].split
    same = all(summary.get("step") == evaluated.step for evaluated in each)
    known = {name: summary.get(f"{name}_accuracy") if same else None for name in PAPER}
    known[split] = content["accuracy"]
    is_fashion_mnist = summary.get("dataset") == "fashion_mnist"
    cards = []
    for name, accuracy in known.items():
        if accuracy is None:
            continue
        notes = [f"the paper: {PAPER[name]:.1f}%"] if is_fashion_mnist else []
        if "seeds" in content and name == split:
            notes.insert(0, f"std {content['seeds']['accuracy']['std']:.2%}")
        cards.append(parts.card(name, percentage(accuracy), *notes))
    if "ensemble" in content:
        accuracy = percentage(content["ensemble"]["accuracy"])
        cards.append(parts.card(f"{split}, ensemble", accuracy))
    return "\n".join(cards)


def _recipe_section(workdir: Path, each: Sequence[CheckpointEvaluation]) -> str:
    """Makes the section of the run's recipe, and of the report's own date and command."""
    config = ConfigDict(each[0].config.to_dict())
    config.num_seeds = len(each)
    entries = {part: text(words) for part, words in recipe(config).items()}
    versions = [
        f"tinyvgg_jax {tinyvgg_jax.__version__}",
        f"Python {platform.python_version()}",
        *(f"{library} {version}" for library, version in library_versions().items()),
    ]
    entries["This report"] = text(", ".join(versions))
    entries["Its command"] = f"<code>{text(_command(workdir, each))}</code>"
    return parts.section("Recipe", "", parts.definitions(entries))


def _command(workdir: Path, each: Sequence[CheckpointEvaluation]) -> str:
    """Writes the command line that makes this report again."""
    first, steps = each[0], {one.step for one in each}
    # The seeds' steps differ only if each seed's best checkpoint was evaluated.
    step = str(steps.pop()) if len(steps) == 1 else "best"
    words = ["python", "-m", "tinyvgg_jax.main", "--mode", "eval", "--workdir", str(workdir)]
    words += ["--split", first.split, "--step", step]
    if first.flipped is not None:
        words.append("--flip_averaging")
    folders = {name: path for name, path in first.folders._asdict().items() if path}
    if folders:
        words += ["--config", "default"]
        words += [f"--config.data.{name}={path}" for name, path in folders.items()]
    return shlex.join(words)


def _matrix_drawing(evaluated: CheckpointEvaluation, content: Mapping[str, Any]) -> Drawing:
    matrix, names = np.asarray(content["confusion"]), evaluated.info.class_names
    return lambda theme: plots.confusion_matrix(matrix, names, theme)


def _curves_figure(each: Sequence[CheckpointEvaluation]) -> dict[str, Figure]:
    """Draws the learning curves with their note; empty if a checkpoint is of the first epoch."""
    histories = [one.history for one in each]
    if not all(histories):
        return {}
    return {"learning_curves": plots.learning_curves(histories, curves_note(each[0].config))}


def _curves_section(each: Sequence[CheckpointEvaluation]) -> str:
    """Makes the section of the learning curves, with their note as text; see `_curves_figure`."""
    histories = [one.history for one in each]
    if not all(histories):
        return ""
    figure = parts.picture(
        lambda theme: plots.learning_curves(histories, theme=theme), "Learning curves"
    )
    return parts.section("Learning curves", text(curves_note(each[0].config)), figure)


def _write_figures(workdir: Path, split: str, figures: Mapping[str, Figure]) -> None:
    """Writes figures as `evaluation/SPLIT/NAME.png`."""
    folder = subfolder(workdir, "evaluation", split)
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.png", plots.png(figure))


# The page of one run.


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


def _caption(
    evaluated: CheckpointEvaluation,
    index: int,
    name: Callable[[str], str],
    plain: Callable[[str], str],
) -> list[str]:
    """Describes a prediction: class and confidence, and the true class if it is another.

    Args:
        evaluated: the evaluation of a checkpoint.
        index: of the image in the split.
        name: formats the name of a class.
        plain: formats other text.
    """
    names, result = evaluated.info.class_names, evaluated.result
    label, predicted = evaluated.data.labels[index], result.predicted[index]
    confidence = _confidence(evaluated)[index]
    # Rounding would show 100 %, as if the network were certain.
    share = ">99%" if confidence > 0.99 else f"{confidence:.0%}"
    prediction = f"{name(names[predicted])} {plain(share)}"
    return [prediction] if label == predicted else [prediction, f"true: {name(names[label])}"]


def _run_head(evaluated: CheckpointEvaluation, content: Mapping[str, Any]) -> str:
    """Makes the paragraph that says what was evaluated, and the result with its interval."""
    result = evaluated.result
    interval = " to ".join(map(percentage, accuracy_interval(result.correct, result.count)))
    flipped = ""
    if "flip_averaged_accuracy" in content:
        flipped = f" Averaged over mirror images: {percentage(content['flip_averaged_accuracy'])}."
    return (
        f"Evaluation on the <b>{text(evaluated.split)}</b> split, of the checkpoint of step "
        f"{evaluated.step:,}: {result.correct:,} of {result.count:,} predictions correct, accuracy "
        f"{text(percentage(result.accuracy))} (95&nbsp;% confidence interval {text(interval)}), "
        f"loss {loss_text(result.mean_loss)}.{text(flipped)}"
    )


def _calibration(evaluated: CheckpointEvaluation) -> Drawing:
    curve = calibration(evaluated.result.probabilities, evaluated.data.labels)
    return lambda theme: plots.calibration_curve(curve, theme)


def _run_body(
    evaluated: CheckpointEvaluation,
    content: Mapping[str, Any],
    draw_matrix: Drawing,
    draw_calibration: Drawing,
    galleries: Mapping[str, np.ndarray],
) -> str:
    """Makes the sections of a run's page."""

    def tiles(name: str) -> str:
        chosen = galleries[name]
        captions = [_caption(evaluated, index, parts.name, text) for index in chosen]
        return parts.tiles(evaluated.data.images[chosen], captions)

    right = evaluated.result.correct
    wrong = evaluated.result.count - right
    matrix_note = f"{_MATRIX_NOTE}: number of images, and percentage of the images of that class."
    calibration_note = (
        f"Expected calibration error: {text(percentage(content['expected_calibration_error']))}. "
        "Below the dashed line the network is overconfident, above it underconfident. Each point "
        "has its 95&nbsp;% interval (Wilson's), which is wide where few images are; the line "
        f"leaves out points of fewer than {plots.MIN_IMAGES_IN_BIN} images."
    )
    names = evaluated.info.class_names
    curves = _curves_section([evaluated])
    calibrated = parts.section(
        "Calibration", calibration_note, parts.picture(draw_calibration, "Calibration")
    )
    return "\n".join(
        [
            parts.confusions_and_scores(content, names, draw_matrix, matrix_note),
            parts.section(
                "Most confident wrong predictions",
                f"{len(galleries['wrong']):,} of {wrong:,} wrong predictions: predicted class, "
                "confidence, and true class.",
                tiles("wrong"),
            ),
            parts.section(
                "Correct predictions (sample)",
                f"{len(galleries['right']):,} of {right:,} correct predictions: predicted class "
                "and confidence.",
                tiles("right"),
            ),
            f'<div class="pair even">{curves}\n{calibrated}</div>' if curves else calibrated,
        ]
    )


# The page of several seeds.


def _seeds_head(each: Sequence[CheckpointEvaluation], content: Mapping[str, Any]) -> str:
    """Makes the paragraph of means and intervals, and of the ensemble."""
    found, ensemble = content["seeds"], content["ensemble"]
    sentences = [
        f"Mean {text(name.replace('_', ' '))} {text(show(one['mean']))}, standard deviation "
        f"{text(show(one['std']))}, {text(interval_text(one, show))}."
        for name, one in found.items()
        for show in [loss_text if name == "loss" else percentage]
    ]
    return (
        f"Evaluation on the <b>{text(each[0].split)}</b> split, of {len(each)} runs that differ in "
        f"their seeds. {' '.join(sentences)} The ensemble, which averages their probabilities, has "
        f"{ensemble['correct']:,} of {ensemble['count']:,} predictions correct: "
        f"{text(percentage(ensemble['accuracy']))}."
    )


def _seeds_body(
    workdir: Path,
    each: Sequence[CheckpointEvaluation],
    content: Mapping[str, Any],
    draw_matrix: Drawing,
) -> str:
    """Makes the sections of the page of several seeds."""
    rows = []
    for one in each:
        # Both pages are below the folder of all seeds, so the link outlives its being moved.
        page = report_path(one.workdir, one.split).relative_to(workdir)
        rows.append(
            [
                f"{one.config.seed}",
                text(percentage(one.result.accuracy)),
                loss_text(one.result.mean_loss),
                f"{one.step:,}",
                f'<a href="../{page.as_posix()}">report</a>',
            ]
        )
    table = parts.table(["Seed", "Accuracy", "Loss", "Step", "Its own page"], rows)
    note = (
        f"{_MATRIX_NOTE}: number of predictions of all {len(each)} seeds, and percentage of those "
        "for that class."
    )
    names = each[0].info.class_names
    return "\n".join(
        [
            parts.section("Seeds", "", table),
            parts.confusions_and_scores(content, names, draw_matrix, note),
            _curves_section(each),
        ]
    )
