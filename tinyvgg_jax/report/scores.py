"""What predictions are worth: confusions, precision and recall, calibration, chance."""

from typing import NamedTuple

import numpy as np

_CALIBRATION_BINS = 15


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts examples by true and predicted class.

    Args:
        labels: `[N]` int, true classes.
        predicted: `[N]` int.
        num_classes: C.

    Returns:
        `[C, C]` int; a row for each true class, a column for each predicted one.
    """
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def precision_recall_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, as scikit-learn defines them.

    Args:
        confusion: `[C, C]`, as from `confusion_matrix`.

    Returns:
        Three arrays `[C]` of fractions; 0 where the denominator is.
    """
    right = np.diagonal(confusion)
    of_class, as_class = confusion.sum(axis=1), confusion.sum(axis=0)

    def fraction(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return numerator / np.maximum(denominator, 1)

    return (
        fraction(right, as_class),
        fraction(right, of_class),
        fraction(2 * right, of_class + as_class),
    )


class Calibration(NamedTuple):
    """Whether examples predicted with a confidence of 80 % are right four times in five.

    Attributes:
        confidence: `[bins]`, mean probability of the predicted class in each bin; 0 in empty ones.
        accuracy: `[bins]`, fraction of right predictions in each bin; likewise.
        counts: `[bins]` int, examples in each bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray

    @property
    def expected_error(self) -> float:
        """The expected calibration error (Guo et al., arXiv:1706.04599), a fraction."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((gaps * self.counts).sum() / max(self.counts.sum(), 1))


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = _CALIBRATION_BINS
) -> Calibration:
    """Sorts examples by the probability of their predicted class into bins of equal width.

    Args:
        probabilities: `[N, C]`.
        labels: `[N]` int, true classes.
        bins: number of bins from 0 to 1; a bin includes its upper edge.

    Returns:
        The bins.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(bin_of, weights=values, minlength=bins) / np.maximum(count, 1)

    return Calibration(mean(confidence), mean(right), count)


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on so many examples, by Wilson's score.

    It says how far another test set of the same kind could be off, not another seed.

    Args:
        correct: number of right predictions.
        count: number of predictions, at least 1.

    Returns:
        Two fractions.
    """
    from scipy import stats  # A second to import, which a training need not wait for.

    interval = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class McNemar(NamedTuple):
    """Two classifiers on the same examples.

    Attributes:
        only_first: examples that only the first has right.
        only_second: examples that only the second has right.
        p_value: how often chance alone makes a difference as large, if both are equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's test, exact (binomial) and two-sided.

    Args:
        first_right: `[N]` bool, whether the first classifier has each example right.
        second_right: `[N]` bool, the second, on the same examples.

    Returns:
        The test's result.
    """
    from scipy import stats

    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differing = only_first + only_second
    p_value = stats.binomtest(only_first, differing).pvalue if differing else 1.0
    return McNemar(only_first, only_second, float(p_value))
