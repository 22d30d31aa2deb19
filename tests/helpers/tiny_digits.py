"""Files as MNIST has them, small and made up, for questions that train on a data set."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def write_digits(folder: Path, train: int = 40, test: int = 20, bright: float = 0.2) -> Path:
    """Four idx files as MNIST has them, of noise that is black outside ``bright`` of the pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = (draw.random((count, 28, 28)) < bright) * draw.integers(1, 256, (count, 28, 28))
        labels = draw.integers(0, 10, count)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(content)
    return folder
