"""Outliers made from ID images: what each kind does, and that nothing but the index decides."""

import numpy as np
import pytest
from outliers import OUTLIERS, SIMPLE, MadeImages, made_sets

from traj_ood.data.images import ArrayImages
from traj_ood.errors import TrajOODError


@pytest.fixture(params=[(), (3,)], ids=["grey", "colour"])
def source(request: pytest.FixtureRequest) -> ArrayImages:
    shape = (6, 8, 8, *request.param)
    return ArrayImages(tuple(f"i{k}" for k in range(6)), np.random.default_rng(7).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("kind", [*OUTLIERS, *SIMPLE])
def test_same_size_mode_and_pixels_whenever_loaded(source: ArrayImages, kind: str) -> None:
    made = MadeImages(source, kind)
    first = [np.asarray(made.load(i)) for i in range(6)]
    again = [np.asarray(made.load(i)) for i in reversed(range(6))][::-1]
    for image, twice, original in zip(first, again, source.array, strict=True):
        assert np.array_equal(image, twice)
        assert image.shape == original.shape
        assert image.dtype == np.uint8
        assert not np.array_equal(image, original)
    assert made.ids[0] == f"{kind}/i0"
    assert made.digest() != MadeImages(source, kind, seed=1).digest() != source.digest()


def test_what_the_kinds_do(source: ArrayImages) -> None:
    def made(kind: str, index: int = 0) -> np.ndarray:
        return np.asarray(MadeImages(source, kind).load(index)).astype(int)

    original = source.array[0].astype(int)
    assert np.array_equal(made("invert"), 255 - original)
    assert np.array_equal(np.sort(made("jigsaw"), axis=None), np.sort(original, axis=None))
    assert len(np.unique(made("constant").reshape(64, -1), axis=0)) == 1
    assert made("blur").std() < 0.9 * original.std()
    others = source.array[1:].astype(int)
    assert min(np.abs(2 * made("blend") - original - other).max() for other in others) <= 1
    mixed = made("cutmix")
    assert np.array_equal(mixed[4:, 4:], original[4:, 4:])
    top = any(np.array_equal(mixed[:4], other[:4]) for other in others)
    left = any(np.array_equal(mixed[:, :4], other[:, :4]) for other in others)
    assert top != left


def test_splits_and_errors(source: ArrayImages) -> None:
    splits = made_sets(source, SIMPLE, role="far")
    assert [(s.name, s.role, len(s.images)) for s in splits] == [(kind, "far", 6) for kind in SIMPLE]
    assert made_sets(source.select([4, 2]), OUTLIERS)[0].images.ids == ("blend/i4", "blend/i2")
    with pytest.raises(TrajOODError, match="unknown kind of made images 'blurr': did you mean 'blur'"):
        MadeImages(source, "blurr")
    with pytest.raises(TrajOODError, match="expected at least 2 images to make them from, got 1"):
        MadeImages(source.select([0]), "blend")
    with pytest.raises(TrajOODError, match="unknown role 'outlier'"):
        made_sets(source, SIMPLE, role="outlier")  # type: ignore[arg-type]
