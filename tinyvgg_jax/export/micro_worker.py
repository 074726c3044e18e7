"""The program that runs a network in TensorFlow Lite Micro, which `micro.py` starts as a process.

It reads an `.npz` file from standard input: `model`, the bytes of a `.tflite` file as uint8, and
`images`, `[N, H, W, C]` int8. It writes another to standard output: `arena`, the number of bytes
of the smallest arena, and `outputs`, `[N, num_classes]` int8. What is wrong is on standard error.

It imports nothing of this package, because JAX's threads do not survive a fork.
"""

import io
import os
import sys
from collections.abc import Iterator

import numpy as np
from tflite_micro import runtime

# The largest arena that is tried, in KiB.
_LARGEST = 1 << 14


def outputs(model: bytes, images: np.ndarray, arena: int) -> Iterator[np.ndarray]:
    """Yields the output of each image, from an interpreter with an arena of so many bytes."""
    interpreter = runtime.Interpreter.from_bytes(model, arena_size=arena)
    for image in images:
        interpreter.set_input(image[None], 0)
        interpreter.invoke()
        yield interpreter.get_output(0)[0]


def fits(model: bytes, images: np.ndarray, arena: int) -> bool:
    """Tells whether an arena is large enough.

    The interpreter crashes in some that are not, so each is tried in a process of its own.
    """
    child = os.fork()
    if child == 0:
        try:
            next(outputs(model, images, arena))
            os._exit(0)
        except Exception:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    given = np.load(io.BytesIO(sys.stdin.buffer.read()))
    model, images = given["model"].tobytes(), given["images"]
    # The smallest arena is above the one and at most the other, in KiB.
    low, high = 0, _LARGEST
    if not fits(model, images, high << 10):
        sys.exit("it has an operator that is not there, or needs more than 16 MiB")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(model, images, middle << 10) else (middle, high)
    made = io.BytesIO()
    np.savez(made, arena=high << 10, outputs=list(outputs(model, images, high << 10)))
    sys.stdout.buffer.write(made.getvalue())


if __name__ == "__main__":
    main()
