"""Small image files for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_images() -> Callable[[Path, Iterable[str]], None]:
    """``make_images(folder, names)`` writes a different 8 x 8 RGB image under each relative name."""

    def make(folder: Path, names: Iterable[str]) -> None:
        for seed, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)

    return make
