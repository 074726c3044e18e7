"""The paper's recipe: widths 64-128-256, SGD with momentum, batch 32, 10 epochs."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_epochs = 10
    config.batch_size = 32
    config.learning_rate = 0.01
    # The learning rate of an epoch is this factor times that of the epoch before.
    config.learning_rate_decay = 0.8
    config.momentum = 0.9
    # Of the computation: "float32" or "bfloat16". Parameters and loss stay float32.
    config.dtype = "float32"

    config.model = ConfigDict()
    config.model.widths = (64, 128, 256)
    config.model.convs_per_block = 2
    config.model.hidden = 256

    config.augment = ConfigDict()
    config.augment.rotation_degrees = 10.0
    config.augment.horizontal_flip = True

    config.data = ConfigDict()
    config.data.name = "fashion_mnist"
    # tfds's folder of datasets; None is tfds's default, ~/tensorflow_datasets.
    config.data.data_dir = config_dict.placeholder(str)
    # A folder with FashionMNIST's four IDX files, if they are to be had from nowhere else.
    config.data.source_dir = config_dict.placeholder(str)
    config.data.pipeline = "stream"
    config.data.train_split = "train[:55000]"
    config.data.validation_split = "train[55000:]"
    config.data.test_split = "test"
    return config
