"""Runs that differ in their seeds only: their configs and folders, and their statistics."""

import math
import statistics
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax.config import validated
from tinyvgg_jax.errors import UserError


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """Makes the config of each seed's run, by the name of its folder.

    Args:
        config: a config with `num_seeds` of 1 or more.

    Returns:
        For seeds `seed` to `seed + num_seeds - 1`, `{"seed_N": config with num_seeds = 1}`.
    """
    result = {}
    for seed in range(config.seed, config.seed + config.num_seeds):
        one = ConfigDict(config.to_dict())
        one.seed, one.num_seeds = seed, 1
        result[f"seed_{seed}"] = validated(one)
    return result


def titles(config: ConfigDict) -> list[str]:
    """Makes the beginnings of lines about each seed's run, like "seed 3 (2 of 5): ".

    Args:
        config: a config with `num_seeds` of 1 or more.

    Returns:
        One for each seed; empty for a single seed, which needs no name.
    """
    count = config.num_seeds
    if count == 1:
        return [""]
    return [f"seed {config.seed + i} ({i + 1} of {count}): " for i in range(count)]


def folders(workdir: Path, config: ConfigDict) -> list[Path]:
    """Lists the folders of a run's seeds; a run of a single seed is its own folder.

    Raises:
        UserError: if the training of some seeds has not begun.
    """
    if config.num_seeds == 1:
        return [workdir]
    found = [workdir / name for name in members(config)]
    begun = sum((folder / "config.json").exists() for folder in found)
    if begun < len(found):
        raise UserError(
            f"{workdir} is not finished: {begun} of its {len(found)} seeds have begun. Run its "
            "command again to go on."
        )
    return found


def statistics_of(values: list[float], fractions: bool = True) -> dict[str, Any]:
    """Computes the mean, standard deviation and 95 % confidence interval of the mean.

    With n values of mean m and sample standard deviation s, where s**2 = sum((x - m)**2) / (n - 1),
    Student's interval would be m +- t * s / sqrt(n). Here t is the 97.5 % quantile of Student's t
    distribution with n - 1 degrees of freedom. That interval of an accuracy may leave [0, 1], so it
    is made on a scale g without ends, and mapped back (the delta method):

        g(m) +- g'(m) * t * s / sqrt(n)
        g(x) = log(x / (1 - x)), g'(m) = 1 / (m * (1 - m))      for fractions
        g(x) = log(x),           g'(m) = 1 / m                  for losses

    The first is the logit interval, as in Brown, Cai & DasGupta (2001), with Student's t. Where s
    is small, both are Student's interval. Two values have none: t would be 12.7, and the interval
    would say nothing.

    Args:
        values: one number for each seed.
        fractions: whether the values lie in [0, 1], as accuracies do; otherwise they are at least
            0, as losses are.

    Returns:
        `mean`, `std`, `interval` (lower and upper bound), `n` and `values`. For a single value
        `std` is None; for fewer than three values `interval` is None.
    """
    n, mean = len(values), statistics.fmean(values)
    std = statistics.stdev(values) if n > 1 else None
    interval = _interval(mean, std, n, fractions) if std is not None and n > 2 else None
    return {"mean": mean, "std": std, "interval": interval, "n": n, "values": values}


def _interval(mean: float, std: float, n: int, fractions: bool) -> list[float]:
    """Computes the interval of `statistics_of`."""
    if std == 0:
        return [mean, mean]
    # SciPy takes a second to import, and a single run does not need it.
    from scipy import stats

    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    if not fractions:
        return [mean * math.exp(-half / mean), mean * math.exp(half / mean)]
    half /= mean * (1 - mean)
    odds = [mean / (1 - mean) * math.exp(sign * half) for sign in (-1, 1)]
    return [one / (1 + one) for one in odds]


def summarise(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises the runs of several seeds.

    Args:
        summaries: the summary of each run, as `train_and_evaluate` returns it.

    Returns:
        The mean of each accuracy and loss, under the same key as in a single run's summary; the
        sum of `seconds`; `num_seeds`; under `seeds`, the result of `statistics_of` for each
        accuracy and loss; and the first run's values of all other keys, which all runs share.
    """
    first = summaries[0]
    measured = [name for name in first if name.endswith(("_accuracy", "_loss"))]
    seeds = {
        name: statistics_of([one[name] for one in summaries], name.endswith("_accuracy"))
        for name in measured
    }
    return (
        {name: seeds[name]["mean"] for name in measured}
        | {name: value for name, value in first.items() if name not in measured}
        | {"seconds": sum(one["seconds"] for one in summaries)}
        | {"num_seeds": len(summaries), "seeds": seeds}
    )
