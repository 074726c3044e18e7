"""The default network with a modern recipe: the most accurate one here.

    python -m tinyvgg_jax.main --config configs/best.py --config.num_seeds=5

Meant for a GPU, on which nothing has been measured yet. WHAT THE CPU SAYS
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_epochs = 100
    config.batch_size = 128
    config.optimizer = "muon"
    config.learning_rate = 0.02
    config.schedule = "cosine"
    config.warmup_epochs = 2.0
    config.nesterov = True
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.ema_decay = 0.999
    config.model.dropout = 0.3
    config.model.kernel_init = "he_normal"
    config.augment.rotation_degrees = 0.0
    config.augment.alternating_flip = True
    config.augment.shift_pixels = 2
    config.augment.cutout_size = 8
    return config
