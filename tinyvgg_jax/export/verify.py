"""Verification of exported networks: the written file, on images, beside the network in JAX."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.export.loaded import Call

# Classes of nearly equal probability may change places by rounding.
_ROUNDING = 1e-4
# No probability of a float32 network may be off by more; weights in 16 bits change them by 0.001.
LARGEST_DIFFERENCE = 0.01
# An int8 network may lose this much accuracy, a fraction.
_INT8_LOSS = 0.003
# Seconds for a timing, and the number of images in a large batch.
_TIMING_SECONDS, LARGE_BATCH = 0.5, 256


class Verified(NamedTuple):
    """Comparison of an exported network with the network in JAX on the same images.

    Attributes:
        name: the format, like "onnx int8", or "JAX" for the network itself.
        path: the file; None for the network itself.
        size: bytes of the file.
        accuracy: fraction of correct predictions.
        differing: number of images that are classified otherwise than in JAX.
        largest: largest difference of a probability.
        milliseconds: time for an image in batches of 1 and of `LARGE_BATCH`; None if unknown.
    """

    name: str
    path: Path | None
    size: int
    accuracy: float
    differing: int
    largest: float
    milliseconds: tuple[float, float] | None = None


def probabilities(call: Call, images: np.ndarray) -> np.ndarray:
    """Runs an exported network over images in large batches: `[N, num_classes]`."""
    starts = range(0, len(images), LARGE_BATCH)
    return np.concatenate([call(images[start : start + LARGE_BATCH]) for start in starts])


def compare(
    name: str, path: Path, found: np.ndarray, labels: np.ndarray, reference: np.ndarray
) -> Verified:
    """Compares the probabilities of an exported network with those in JAX.

    Args:
        name: the format.
        path: the file.
        found: `[N, num_classes]` probabilities of the exported network.
        labels: `[N]` int, true classes.
        reference: `[N, num_classes]` probabilities in JAX.

    Returns:
        The comparison, without times.
    """
    predicted = found.argmax(axis=1)
    return Verified(
        name,
        path,
        path.stat().st_size,
        float((predicted == labels).mean()),
        int((predicted != reference.argmax(axis=1)).sum()),
        float(np.abs(found - reference).max()),
    )


def milliseconds(call: Call, images: np.ndarray) -> float:
    """Measures the median time of a call for each of its images, in milliseconds."""
    call(images)
    times: list[float] = []
    while len(times) < 3 or sum(times) < _TIMING_SECONDS:
        start = time.perf_counter()
        call(images)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times)) / len(images)


def require_same(
    verified: Verified, found: np.ndarray | None, reference: np.ndarray, accuracy: float
) -> None:
    """Checks that an exported network is the same network.

    Args:
        verified: its comparison.
        found: `[N, num_classes]` probabilities of a float32 network; None for int8.
        reference: `[N, num_classes]` probabilities in JAX.
        accuracy: the accuracy in JAX.

    Raises:
        UserError: if a float32 network classifies an image otherwise, and not by rounding, or if
            one of its probabilities is off by more than 0.01; or if an int8 network loses more than
            0.3 points of accuracy.
    """
    if found is None:
        # Rounded, because 0.95 - 0.947 is a little more than 0.003.
        if round(accuracy - verified.accuracy, 9) > _INT8_LOSS:
            raise UserError(
                f"{verified.name}: {verified.accuracy:.2%} of the images are classified correctly, "
                f"{accuracy:.2%} in JAX; int8 loses too much, and nothing was written."
            )
        return
    chosen, rows = found.argmax(axis=1), np.arange(len(found))
    gap = reference.max(axis=1) - reference[rows, chosen]
    wrong = int((gap > _ROUNDING).sum())
    if wrong:
        raise UserError(
            f"{verified.name} classifies {wrong:,} of {len(found):,} images otherwise than JAX, "
            "and not by rounding; nothing was written."
        )
    # Written so that no number that is not finite passes.
    if not verified.largest <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{verified.name} computes probabilities that differ from JAX's by up to "
            f"{verified.largest:.2g}; nothing was written."
        )


def table(rows: list[Verified], split: str, count: int) -> str:
    """Formats comparisons for the terminal.

    Args:
        rows: the comparisons, the network in JAX first.
        split: the name of the split.
        count: the number of its images.
    """
    large = min(LARGE_BATCH, count)
    lines = [
        f"{'format':<12}{'size':>10}{'accuracy':>10}{'differing':>11}{'probability':>13}"
        f"{'ms, 1 image':>13}{f'ms, {large}':>9}"
    ]
    for row in rows:
        size = "" if row.path is None else f"{row.size / 1000:,.0f} kB"
        differing = "" if row.path is None else f"{row.differing:,}"
        largest = "" if row.path is None else f"{row.largest:.1e}"
        one, many = (f"{ms:.3f}" for ms in row.milliseconds) if row.milliseconds else ("-", "-")
        lines.append(
            f"{row.name:<12}{size:>10}{row.accuracy:>10.2%}{differing:>11}{largest:>13}"
            f"{one:>13}{many:>9}"
        )
    lines.append(
        f"On the {count:,} images of the {split} split. Differing: images classified otherwise "
        "than in JAX. Probability:\nits largest difference. Times are for each image, in batches "
        f"of 1 on one thread (JAX: on all cores) and of {large}."
    )
    # Only what another library runs is timed.
    read_back = [row.name for row in rows if row.path and not row.milliseconds]
    if read_back:
        lines.append(
            f"Read back into JAX, not run in PyTorch or a browser: {', '.join(read_back)}."
        )
    return "\n".join(lines)
