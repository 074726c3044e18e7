"""A narrower network, one convolution a block, with a modern recipe, for two CPU cores.

    python -m tinyvgg_jax.main --config quick

On two cores of an AMD EPYC, this recipe takes 48 s of training, compilation included, and reaches
95.1 % on train, 93.8 % on validation and 92.7 % on test (five seeds, standard deviations 0.1, 0.1
and 0.1). With the recipe of `default.py`, at a learning rate of 0.03 that falls to 0.6 of itself
after each epoch, this network reached 89.8 % on test in the same time.

The learning rate was chosen on the validation split, one seed each: 93.6 % with 0.02, 93.8 % with
0.03. A linear schedule (93.7 %) and an average of the parameters (93.5 %), both at 0.02, made no
difference beyond chance.
"""

from ml_collections import ConfigDict

from tinyvgg_jax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_epochs = 5
    config.batch_size = 128
    config.optimizer = "muon"
    config.learning_rate = 0.03
    config.schedule = "cosine"
    config.warmup_epochs = 0.5
    config.nesterov = True
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.model.widths = (16, 32, 64)
    config.model.convs_per_block = 1
    config.model.hidden = 128
    config.model.kernel_init = "he_normal"
    config.augment.rotation_degrees = 0.0
    config.augment.alternating_flip = True
    return config
