"""Runs that differ in their seeds only: their configs and folders, and their statistics."""

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


def statistics_of(values: list[float]) -> dict[str, Any]:
    """Computes the mean, standard deviation and 95 % confidence interval of the mean.

    With n values of mean m and sample standard deviation s, where s**2 = sum((x - m)**2) / (n - 1),
    the interval is m +- t * s / sqrt(n). Here t is the 97.5 % quantile of Student's t distribution
    with n - 1 degrees of freedom.

    Args:
        values: one number for each seed.

    Returns:
        `mean`, `std`, `interval` (lower and upper bound), `n` and `values`. For a single value,
        `std` and `interval` are None.
    """
    n, mean = len(values), statistics.fmean(values)
    content: dict[str, Any] = {"mean": mean, "std": None, "interval": None, "n": n}
    if n > 1:
        from scipy import stats

        content["std"] = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, n - 1)) * content["std"] / n**0.5
        content["interval"] = [mean - half, mean + half]
    return content | {"values": values}


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
    seeds = {name: statistics_of([one[name] for one in summaries]) for name in measured}
    return (
        {name: seeds[name]["mean"] for name in measured}
        | {name: value for name, value in first.items() if name not in measured}
        | {"seconds": sum(one["seconds"] for one in summaries)}
        | {"num_seeds": len(summaries), "seeds": seeds}
    )
