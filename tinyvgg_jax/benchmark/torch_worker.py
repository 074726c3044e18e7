"""The worker of PyTorch's contestants: the same network and train step, in usual PyTorch.

A case has two more fields than those of `jax_worker`: `channels_last`, and `compile`, which is ""
(eager), "default", "reduce-overhead" (`torch.compile` with CUDA graphs of the forward and backward
passes) or "cuda-graph" (one graph of the whole step, captured by hand). Any `dtype` but float32 is
computed by `torch.autocast`, which leaves the parameters and the loss in float32.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tinyvgg_jax.benchmark.worker import Prepared, serve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(case: dict[str, Any]) -> Prepared:
    """Prepares a case of the kind "train", "epoch" or "infer"."""
    # JAX uses TF32 on tensor cores by default, so PyTorch gets it too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    return infer(case) if case["kind"] == "infer" else train(case)


def tiny_vgg(
    widths: Sequence[int] = (64, 128, 256), convs_per_block: int = 2, hidden: int = 256
) -> nn.Sequential:
    """Builds the network of `TinyVGG` for images of 28x28 pixels and 10 classes."""
    layers: list[nn.Module] = []
    channels, side = 1, 28
    for width in widths:
        for _ in range(convs_per_block):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
        side //= 2
    head = [nn.Flatten(), nn.Linear(side**2 * channels, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *head, nn.Linear(hidden, 10))


def build(case: dict[str, Any]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Builds the module, and the function from images to logits, compiled as the case says."""
    model: nn.Module = tiny_vgg(**case.get("network", {})).to(DEVICE)
    if case["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Tensor] = model
    if case["compile"] in ("default", "reduce-overhead"):
        forward = torch.compile(model, mode=case["compile"])
    if case["dtype"] == "float32":
        return model, forward

    def autocast(images: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=getattr(torch, case["dtype"])):
            return forward(images).float()

    return model, autocast


def random_examples(size: int) -> tuple[Tensor, Tensor]:
    """Makes random images `[N, 1, 28, 28]` uint8 and labels `[N]`."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(256, size=(size, 1, 28, 28), dtype=np.uint8))
    return images, torch.from_numpy(rng.integers(10, size=size))


def formatted(case: dict[str, Any], images: Tensor) -> Tensor:
    """Gives images the memory format of the case."""
    return images.contiguous(memory_format=torch.channels_last) if case["channels_last"] else images


def augmented(images: Tensor) -> Tensor:
    """Rotates images `[B, 1, H, W]` by up to 10 degrees, bilinearly, and mirrors half of them."""
    size = len(images)
    angle = (torch.rand(size, device=images.device) * 2 - 1) * (np.pi / 18)
    mirror = torch.where(torch.rand(size, device=images.device) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(angle)
    first = torch.stack([angle.cos() * mirror, -angle.sin(), zero], 1)
    second = torch.stack([angle.sin() * mirror, angle.cos(), zero], 1)
    grid = functional.affine_grid(torch.stack([first, second], 1), list(images.shape), False)
    return functional.grid_sample(images, grid, align_corners=False)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Dataset that augments one image at a time on the host, as most training scripts do."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return augmented(self.images[i : i + 1].float() / 255)[0], self.labels[i]


def loaded(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of a DataLoader without end."""
    loader = torch.utils.data.DataLoader(
        Augmented(images, labels),
        batch_size,
        shuffle=True,
        num_workers=2 if DEVICE.type == "cpu" else 8,
        pin_memory=DEVICE.type == "cuda",
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        for batch, batch_labels in loader:
            yield batch.to(DEVICE, non_blocking=True), batch_labels.to(DEVICE, non_blocking=True)


def on_device(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches without end, from images that stay on the device."""
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    while True:
        order = torch.randperm(len(labels), device=DEVICE)
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield images[chosen].float() / 255, labels[chosen]


def train(case: dict[str, Any]) -> Prepared:
    """Prepares training steps: with augmentation if the kind is "epoch", without if "train"."""
    model, forward = build(case)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, fused=True)
    images, labels = random_examples(case["examples"])
    is_loaded = case.get("pipeline") == "dataloader"
    batches = (loaded if is_loaded else on_device)(images, labels, case["batch_size"])

    def step(batch: Tensor, batch_labels: Tensor) -> None:
        if case["kind"] == "epoch" and not is_loaded:
            # Within the step, so that a CUDA graph of the step holds the augmentation, too.
            batch = formatted(case, augmented(batch))
        optimizer.zero_grad()
        functional.cross_entropy(forward(batch), batch_labels).backward()
        optimizer.step()

    take = captured(case, step, batches) if case["compile"] == "cuda-graph" else step

    def run(steps: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            batch, batch_labels = next(batches)
            take(formatted(case, batch), batch_labels)
        synchronize()
        return time.perf_counter() - start

    warm_up(run)
    return Prepared(run, device_facts)


def captured(
    case: dict[str, Any],
    step: Callable[[Tensor, Tensor], None],
    batches: Iterator[tuple[Tensor, Tensor]],
) -> Callable[[Tensor, Tensor], None]:
    """Captures the whole step as one CUDA graph.

    A graph always works on the same memory, so each batch is copied into tensors of its own.
    """
    batch, batch_labels = next(batches)
    batch, batch_labels = formatted(case, batch).clone(), batch_labels.clone()
    # PyTorch requires a few warm-up steps on a side stream before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(batch, batch_labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch, batch_labels)

    def replay(images: Tensor, labels: Tensor) -> None:
        batch.copy_(images)
        batch_labels.copy_(labels)
        graph.replay()

    return replay


def infer(case: dict[str, Any]) -> Prepared:
    """Prepares inference: the logits of a batch, one call after the other."""
    model, forward = build(case)
    # Autocast would convert the parameters in every call, since no gradient needs the float32 ones.
    model.eval().to(getattr(torch, case["dtype"]))
    images = formatted(case, (random_examples(case["batch_size"])[0].float() / 255).to(DEVICE))

    def run(calls: int) -> float:
        with torch.inference_mode():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                forward(images)
            synchronize()
            return time.perf_counter() - start

    warm_up(run)
    return Prepared(run, device_facts)


def warm_up(run: Callable[[int], float]) -> None:
    """Takes the first step, whose trials of algorithms take memory that later ones do not."""
    run(1)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Waits until the device has finished; PyTorch runs ahead of a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def device_facts() -> dict[str, Any]:
    """Reports the device and its peak memory in bytes."""
    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "platform": DEVICE.type,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "version": torch.__version__,
    }


if __name__ == "__main__":
    serve(prepare)
