"""A network for a microcontroller: in int8 it fits into 150 kB of flash and 48 KiB of memory.

    python -m tinyvgg_jax.main --config micro
    python -m tinyvgg_jax.main --mode export --workdir runs/micro --format litert --int8

That is without the code of TensorFlow Lite Micro, which runs it.
"""

from ml_collections import ConfigDict

from tinyvgg_jax.configs import best


def get_config() -> ConfigDict:
    config = best.get_config()
    config.num_epochs = 15
    config.ema_decay = 0.995
    # The two convolutions of the first block need most memory: 28 * 28 * 24 bytes for the input of
    # the second, and as much for its output.
    config.model.widths = (24, 48, 64)
    config.model.hidden = 48
    # So small a network does not overfit in so few epochs.
    config.model.dropout = 0.0
    config.augment.shift_pixels = 0
    config.augment.erasing = 0.0
    return config
