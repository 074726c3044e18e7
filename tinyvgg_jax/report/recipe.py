"""A run's recipe in words, what it means for the learning curves, and the versions it ran with."""

from importlib import metadata

from ml_collections import ConfigDict

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


def library_versions() -> dict[str, str]:
    """Looks up the installed versions of the libraries that results depend on, importing none."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            # It may be there under another name, like tfds-nightly, or not at all.
            versions[library] = "unknown"
    return versions


def recipe(config: ConfigDict) -> dict[str, str]:
    """Describes the fields of a config that affect its result; options that are off are left out.

    Args:
        config: a validated config.

    Returns:
        A phrase for each part of the recipe, by the part's name.
    """
    data = config.data
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds = f"seeds {config.seed} to {config.seed + config.num_seeds - 1}"
    epochs = "epoch" if config.num_epochs == 1 else "epochs"
    return {
        "Network": _network(config),
        "Optimizer": _optimizer(config),
        "Learning rate": _learning_rate(config),
        "Training": f"{config.num_epochs} {epochs}, batches of {config.batch_size}, {seeds}",
        "Loss": "cross-entropy"
        + (f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""),
        "Augmentation": "; ".join(augmentations(config)) or "none",
        "Data": f"{data.name}: train on {data.train_split}, validation on "
        f"{data.validation_split}, test on {data.test_split}",
    }


def _joined(*parts: str | bool) -> str:
    """Joins the parts that are on, each written as `option and "its words"`."""
    return ", ".join(str(part) for part in parts if part)


def _network(config: ConfigDict) -> str:
    model = config.model
    convolutions = "convolution" if model.convs_per_block == 1 else "convolutions"
    return _joined(
        f"blocks of {'-'.join(map(str, model.widths))} filters",
        f"{model.convs_per_block} {convolutions} each",
        f"dense layer of {model.hidden}",
        model.dropout > 0 and f"dropout {model.dropout:g}",
        f"initial kernels {model.kernel_init}",
        config.dtype,
    )


def _optimizer(config: ConfigDict) -> str:
    return _joined(
        {"sgd": "SGD", "muon": "Muon"}.get(config.optimizer, config.optimizer),
        f"{'Nesterov ' if config.nesterov else ''}momentum {config.momentum:g}",
        config.weight_decay > 0 and f"weight decay {config.weight_decay:g}",
        config.gradient_clipping > 0 and f"gradients clipped at {config.gradient_clipping:g}",
        config.ema_decay > 0 and f"moving average of the parameters {config.ema_decay:g}",
        bool(config.freeze) and f"without {', '.join(config.freeze)}, which stay as they are",
        config.init_from is not None and f"starting from {config.init_from}",
    )


def _learning_rate(config: ConfigDict) -> str:
    by_epoch = f"times {config.learning_rate_decay:g} after each epoch"
    return _joined(
        f"{config.learning_rate:g}",
        by_epoch if config.schedule == "exponential" else f"{config.schedule} fall to 0",
        config.warmup_epochs > 0 and f"warm-up of {config.warmup_epochs:g} epochs",
    )


def augmentations(config: ConfigDict) -> list[str]:
    """Describes the augmentations of a config that are on."""
    augment = config.augment
    flip = "alternating flip" if augment.alternating_flip else "random flip"
    options = {
        f"rotation up to {augment.rotation_degrees:g} degrees": augment.rotation_degrees,
        flip: augment.alternating_flip or augment.horizontal_flip,
        f"shift up to {augment.shift_pixels} pixels": augment.shift_pixels,
        f"cutout of {augment.cutout_size}x{augment.cutout_size} pixels": augment.cutout_size,
        f"random erasing of {augment.erasing:.0%} of the images": augment.erasing,
        f"mixup {augment.mixup_alpha:g}": augment.mixup_alpha,
        f"scale by up to 2^{augment.scale:g}": augment.scale,
        f"shape by up to 2^{augment.aspect:g}": augment.aspect,
        f"shear up to {augment.shear_degrees:g} degrees": augment.shear_degrees,
        f"background up to {augment.background:g}": augment.background,
        f"gamma by up to 2^{augment.gamma:g}": augment.gamma,
        f"contrast by up to {augment.contrast:.0%}": augment.contrast,
        f"brightness by up to {augment.brightness:g}": augment.brightness,
        f"blur up to {augment.blur_sigma:g} pixels": augment.blur_sigma,
        f"noise up to {augment.noise:g}": augment.noise,
        f"{augment.inverted:.0%} of the garments inverted": augment.inverted,
    }
    return [words for words, is_on in options.items() if is_on]


def curves_note(config: ConfigDict) -> str:
    """Explains why the metrics on train may be worse than those on validation.

    Args:
        config: a validated config.
    """
    conditions = _joined(
        "while the network is still learning",
        bool(augmentations(config)) and "of augmented images",
        config.model.dropout > 0 and "with dropout",
        config.label_smoothing > 0 and "with label smoothing in the loss",
    )
    average = " with the averaged parameters" if config.ema_decay else ""
    return (
        f"Train is the running mean over an epoch's steps, {conditions}. Validation is measured "
        f"after the epoch{average}, on the images as they are. So train may well lie below "
        "validation in accuracy, and above it in loss; that is no fault."
    )
