"""The default network in as few seconds as possible on a GPU, for 94 % on the test split.

    python -m tinyvgg_jax.main --config fast --config.num_seeds=5

That accuracy is the aim: neither it nor the time has been measured on a GPU yet. Batch size,
learning rate and epochs are first guesses.
"""

from ml_collections import ConfigDict

from tinyvgg_jax.configs import best


def get_config() -> ConfigDict:
    config = best.get_config()
    config.dtype = "bfloat16"
    config.num_epochs = 12
    # The work of Muon in a step does not depend on the batch size, so it would take most of the
    # time of a small batch.
    config.batch_size = 512
    config.learning_rate = 0.03
    config.schedule = "linear"
    config.ema_decay = 0.99
    config.model.dropout = 0.0
    config.augment.erasing = 0.0
    return config
