"""The paper's recipe with a narrower network, one convolution a block, for two CPU cores.

    python -m tinyvgg_jax.main --config quick

On two cores of an AMD EPYC, this recipe takes 63 s of training, compilation included, and reaches
91.2 % on train, 91.0 % on validation and 89.8 % on test (five seeds, standard deviations 0.3, 0.4
and 0.3).
"""

from ml_collections import ConfigDict

from tinyvgg_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_epochs = 5
    config.learning_rate = 0.03
    config.learning_rate_decay = 0.6
    config.model.widths = (16, 32, 64)
    config.model.convs_per_block = 1
    config.model.hidden = 128
    return config
