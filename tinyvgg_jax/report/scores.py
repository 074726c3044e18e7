"""Scores of predictions: confusion matrix, precision, recall, F1, calibration, significance."""

from typing import NamedTuple

import numpy as np

# As in Guo et al. (arXiv:1706.04599).
_CALIBRATION_BINS = 15


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts examples by true and predicted class.

    Args:
        labels: `[N]` int, true classes.
        predicted: `[N]` int, predicted classes.
        num_classes: C.

    Returns:
        `[C, C]` int; a row for each true class, a column for each predicted class.
    """
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def precision_recall_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes precision, recall and F1 of each class.

    With TP the true positives of a class, FP its false positives and FN its false negatives,

        precision = TP / (TP + FP)
        recall    = TP / (TP + FN)
        F1        = 2 * precision * recall / (precision + recall) = 2 * TP / (2 * TP + FP + FN)

    Args:
        confusion: `[C, C]` int, as from `confusion_matrix`.

    Returns:
        Precision, recall and F1, each `[C]`, as fractions; 0 where the denominator is 0, as in
        scikit-learn with `zero_division=0`.
    """
    true_positives = np.diagonal(confusion)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)

    def fraction(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return numerator / np.maximum(denominator, 1)

    return (
        fraction(true_positives, predicted),
        fraction(true_positives, labelled),
        fraction(2 * true_positives, labelled + predicted),
    )


class Confusion(NamedTuple):
    """Images of one class that are predicted as another.

    Attributes:
        label: the true class.
        predicted: the predicted class.
        images: number of such images.
        total: number of images of the true class.
    """

    label: int
    predicted: int
    images: int
    total: int


def top_confusions(confusion: np.ndarray, limit: int) -> list[Confusion]:
    """Lists the most frequent confusions of two classes, the most frequent first.

    Args:
        confusion: `[C, C]` int, as from `confusion_matrix`.
        limit: the largest number of confusions.
    """
    errors = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-errors, axis=None, kind="stable")[:limit]
    totals = confusion.sum(axis=1)
    return [
        Confusion(int(label), int(predicted), int(errors[label, predicted]), int(totals[label]))
        for label, predicted in zip(*np.unravel_index(order, errors.shape), strict=True)
        if errors[label, predicted]
    ]


class Calibration(NamedTuple):
    """Mean confidence beside accuracy, in bins of the confidence.

    The confidence of a prediction is the probability of the predicted class. A classifier is
    calibrated if, say, 80 % of the predictions with a confidence of 80 % are correct.

    Attributes:
        confidence: `[bins]`, mean confidence in each bin; 0 in empty bins.
        accuracy: `[bins]`, fraction of correct predictions in each bin; 0 in empty bins.
        counts: `[bins]` int, number of examples in each bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray

    @property
    def expected_error(self) -> float:
        """The expected calibration error (Guo et al., arXiv:1706.04599), a fraction.

        With counts n_b over N examples in total, it is

            sum over bins b of (n_b / N) * |accuracy_b - confidence_b|
        """
        gaps = np.abs(self.confidence - self.accuracy)
        return float((gaps * self.counts).sum() / max(self.counts.sum(), 1))

    @property
    def intervals(self) -> np.ndarray:
        """The 95 % confidence intervals of `accuracy`, by `accuracy_interval`.

        They are `[bins, 2]`: lower and upper bounds, as fractions; 0 and 1 in empty bins.
        """
        correct = np.rint(self.accuracy * self.counts).astype(int)
        return np.array(
            [
                accuracy_interval(int(right), int(count)) if count else (0.0, 1.0)
                for right, count in zip(correct, self.counts, strict=True)
            ]
        )


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = _CALIBRATION_BINS
) -> Calibration:
    """Compares confidence and accuracy in bins of equal width.

    Args:
        probabilities: `[N, C]`, each row summing to 1.
        labels: `[N]` int, true classes.
        bins: number of bins from 0 to 1; a bin includes its upper edge.

    Returns:
        Confidence, accuracy and number of examples of each bin.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(bin_of, weights=values, minlength=bins) / np.maximum(count, 1)

    return Calibration(mean(confidence), mean(correct), count)


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """Computes the 95 % confidence interval of an accuracy by Wilson's score (1927).

    With n predictions, p the fraction of them that is correct, and z = 1.96 (the 97.5 % quantile
    of the normal distribution), the bounds are

        (p + z**2 / (2 * n) +- z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)

    The interval covers the choice of test images, not the choice of a seed.

    Args:
        correct: number of correct predictions.
        count: number of predictions, at least 1.

    Returns:
        Lower and upper bound, as fractions.
    """
    # SciPy takes a second to import, and training does not need it.
    from scipy import stats

    interval = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class McNemar(NamedTuple):
    """McNemar's test of two classifiers on the same examples.

    Attributes:
        only_first: number of examples that only the first classifier predicts correctly.
        only_second: number of examples that only the second classifier predicts correctly.
        p_value: probability of a difference at least this large if both are equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first_correct: np.ndarray, second_correct: np.ndarray) -> McNemar:
    """Runs McNemar's exact test (1947), two-sided.

    Only examples count that exactly one of the classifiers predicts correctly: b of them the first,
    c the second. If both are equally good, b follows the binomial distribution of n = b + c trials
    with probability 1/2, so the p-value is

        min(1, 2 * sum over k from 0 to min(b, c) of binomial(n, k) / 2**n)

    Args:
        first_correct: `[N]` bool, whether the first classifier predicts each example correctly.
        second_correct: `[N]` bool, the same of the second classifier.

    Returns:
        The test's result; its p-value is 1 if the classifiers never differ.
    """
    from scipy import stats

    only_first = int((first_correct & ~second_correct).sum())
    only_second = int((second_correct & ~first_correct).sum())
    differing = only_first + only_second
    p_value = stats.binomtest(only_first, differing).pvalue if differing else 1.0
    return McNemar(only_first, only_second, float(p_value))
