"""The default recipe at a size for two CPU cores: a narrower network, one convolution a block.

    python -m tinyvgg_jax.main --config quick

On two cores of an AMD EPYC: 63 s of training, compilation included. Train 91.2 %, validation
91.0 %, test 89.8 % (five seeds, standard deviations 0.3, 0.4 and 0.3).
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
