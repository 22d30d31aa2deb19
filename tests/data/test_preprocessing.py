"""One preprocessing for each model, equal to its library's own; one convention for pixels in memory."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from traj_ood import CallableAutoencoder, Detector, Normalised, Preprocessing, ScorerSet, TrajOODError, load_autoencoder
from traj_ood.backbones import CallableBackbone
from traj_ood.backbones.image_processor import LARGEST_DIFFERENCE, from_processor, interpolation_of
from traj_ood.data import read_folder
from traj_ood.data.batches import batches, count_of
from traj_ood.data.preprocessing import largest_difference, prepare, trial_pictures

GREY = (1, 8, 8)


# ---------------------------------------------------------------------- as the libraries do


def processors() -> dict[str, Any]:
    import transformers as tf

    square, short = {"height": 32, "width": 32}, {"shortest_edge": 40}
    crop = {"height": 32, "width": 32}
    return {
        "vit": tf.ViTImageProcessor(size=square),
        "vit, bicubic": tf.ViTImageProcessor(size=square, resample=3),
        "vit, lanczos": tf.ViTImageProcessor(size=square, resample=1),
        "vit, not normalised": tf.ViTImageProcessor(size=square, do_normalize=False),
        "vit, own statistics": tf.ViTImageProcessor(size=square, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7]),
        "vit, 0 … 255": tf.ViTImageProcessor(
            size=square, do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3
        ),
        "vit, rescaled otherwise": tf.ViTImageProcessor(size=square, rescale_factor=1 / 127.5),
        "bit": tf.BitImageProcessor(size=short, crop_size=crop),
        "clip": tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop),
        "convnext, small": tf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
        "convnext, large": tf.ConvNextImageProcessor(size={"shortest_edge": 384}),
        "siglip": tf.SiglipImageProcessor(size=square),
    }


@pytest.mark.parametrize("name", list(processors()))
def test_an_image_processor_is_followed_to_one_level_of_a_byte(name: str) -> None:
    processor = processors()[name]

    def theirs(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    shape = tuple(theirs(trial_pictures("RGB")[0]).shape)
    settings = json.loads(json.dumps(processor.to_dict(), default=str))
    ours = from_processor(settings, (shape[0], shape[1], shape[2]), name)
    enlarged = shape[1] > 300  # by the bicubic filter, whose two passes round once each
    assert largest_difference(ours, theirs) <= (LARGEST_DIFFERENCE if enlarged else 1.0) + 1e-3
    assert largest_difference(Preprocessing((3, *shape[1:]), (0.5,) * 3, (0.2,) * 3), theirs) > 5  # it can fail


def test_a_vit_mae_folder_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    model = tiny.vit(changes={"num_channels": 3})
    for number, options in enumerate(({}, {"do_normalize": False}, {"resample": 3}, {"do_rescale": False})):
        folder = tmp_path / str(number)
        model.module.save_pretrained(folder)  # type: ignore[operator]
        processor = ViTImageProcessor(size={"height": 8, "width": 8}, **options)
        processor.save_pretrained(folder)
        loaded = load_autoencoder(folder)
        picture = trial_pictures("RGB")[0]
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        level = 1.001 * loaded.preprocessing.rescale / min(loaded.preprocessing.std or (1.0,))  # 1/255 of a pixel
        assert float((loaded.transform(picture) - theirs).abs().max()) <= level
        loaded.save_pretrained(tmp_path / "again")  # type: ignore[attr-defined]
        again = load_autoencoder(tmp_path / "again")
        assert again.preprocessing == loaded.preprocessing
        own = ViTImageProcessor.from_pretrained(tmp_path / "again")
        theirs = own(images=picture, return_tensors="pt")["pixel_values"][0]
        assert float((loaded.transform(picture) - theirs).abs().max()) <= level


def test_diffusers_convention_is_its_own_image_processor() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    from traj_ood.autoencoders import DiffusersVAE

    torch.manual_seed(0)
    network = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, sample_size=16, latent_channels=2)
    model = DiffusersVAE(network)
    processor = VaeImageProcessor(vae_scale_factor=2)

    def theirs(image: Image.Image) -> Tensor:
        return processor.preprocess(image, height=16, width=16)[0]

    assert model.preprocessing is not None
    assert largest_difference(model.preprocessing, theirs) <= 1e-3


@pytest.mark.parametrize("value", ["bicubic", 3, "3", Image.Resampling.BICUBIC])
def test_filters_by_name_and_number(value: Any) -> None:
    assert interpolation_of(value) == "bicubic"


# ---------------------------------------------------------------------- the record itself


def test_it_is_the_affine_map_that_it_says() -> None:
    made = Preprocessing((3, 4, 6), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0), rescale=1.0)
    picture = trial_pictures("RGB")[0]
    bytes_ = np.asarray(picture.resize((6, 4), Image.Resampling.BILINEAR), dtype=np.float64).transpose(2, 0, 1)
    expected = (bytes_ - np.array([100, 110, 120])[:, None, None]) / np.array([50, 60, 70])[:, None, None]
    np.testing.assert_allclose(made(picture).numpy(), expected, rtol=1e-5, atol=1e-6)
    pixels = torch.from_numpy(bytes_ / 255)
    np.testing.assert_allclose(made.normalise(pixels).numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.unnormalise(made.normalise(pixels)).numpy(), pixels.numpy(), atol=1e-6)


def test_nothing_is_resized_where_that_is_declared() -> None:
    made = Preprocessing(GREY, resize="none")
    assert made(Image.new("L", (8, 8), 51)).mean() == pytest.approx(0.2)
    with pytest.raises(TrajOODError, match="an image of 8 x 8 pixels, as this model does not resize, got 9 x 8"):
        made(Image.new("L", (9, 8)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": (1, 8)}, r"expected a shape \(C, H, W\)"),
        ({"std": (0.0,)}, "positive standard deviation"),
        ({"mean": (0.1, 0.2)}, "for each of 1 channels"),
        ({"resize": "squeeze"}, "unknown preprocessing: resize 'squeeze'"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"rescale": 0.0}, "rescale: expected a positive factor"),
        ({"short_side": 9}, "short_side with resize 'crop' only"),
        ({"resize": "crop", "short_side": 7}, r"at least the crop \(8, 8\), got 7"),
    ],
)
def test_impossible_preprocessings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Preprocessing(**{"shape": GREY, **options})


def test_either_a_preprocessing_or_a_transform() -> None:
    def model(**options: Any) -> CallableAutoencoder:
        return CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, *GREY), GREY, **options)

    with pytest.raises(TrajOODError, match="either a preprocessing or a transform"):
        model(preprocessing=Preprocessing(GREY), transform=lambda image: torch.zeros(GREY))
    with pytest.raises(TrajOODError, match=r"expected a preprocessing to \(1, 8, 8\), got one to \(1, 9, 9\)"):
        model(preprocessing=Preprocessing((1, 9, 9)))
    assert model().fingerprint() == model(preprocessing=Preprocessing(GREY)).fingerprint()
    assert model().fingerprint() != model(preprocessing=Preprocessing(GREY, (0.5,), (0.5,))).fingerprint()


# ---------------------------------------------------------------------- pixels in memory


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Grey pictures as a user's data set: (image, label) through a transform."""

    def __init__(self, arrays: np.ndarray, transform: Any = None) -> None:
        self.arrays, self.transform = arrays, transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        picture = Image.fromarray(self.arrays[index])
        return (self.transform(picture) if self.transform else picture), index % 3


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield torch.zeros(GREY)


@pytest.fixture(scope="module")
def arrays() -> np.ndarray:
    """(20, 8, 8) bytes: the model's own size, so that no resize stands between a file and its pixels."""
    return np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="module")
def detector() -> Detector:
    model = tiny.conv(mean=(0.3,), std=(0.2,))
    return Detector.fit(model, Normalised(tiny.images(30, GREY, 1)), "knn")


def test_every_way_to_give_the_same_pictures_gives_the_same_scores(
    detector: Detector, arrays: np.ndarray, tmp_path: Path
) -> None:
    from torchvision.transforms import ToTensor

    model = detector.autoencoder
    pictures = [Image.fromarray(a) for a in arrays]
    paths = []
    for i, picture in enumerate(pictures):
        paths.append(tmp_path / f"{i:02d}.png")
        picture.save(paths[-1])
    expected = detector.score(paths)
    pixels = torch.from_numpy(arrays)[:, None]
    ways = {
        "uint8": pixels,
        "float32": pixels.float() / 255,
        "float64": pixels.double() / 255,
        "uint8 array": arrays[:, None],
        "channels last": arrays[..., None],
        "float array": arrays[:, None] / 255,
        "pictures": pictures,
        "single tensors": list(pixels),
        "single arrays": list(arrays[..., None]),
        "data set of pictures": Pictures(arrays),
        "data set of tensors": Pictures(arrays, ToTensor()),
        "loader": torch.utils.data.DataLoader(Pictures(arrays, ToTensor()), batch_size=7),
        "normalised": Normalised(torch.stack([model.transform(p) for p in pictures])),
    }
    for name, given in ways.items():
        torch.testing.assert_close(detector.score(given), expected, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(detector.score(pixels[3]), expected[3:4], rtol=1e-5, atol=1e-6)
    scorers = ScorerSet(model, ["knn"]).fit(Normalised(tiny.images(30, GREY, 1)))
    by_path = Detector.fit(model, paths, "knn").score(paths)
    for name, given in ways.items():
        torch.testing.assert_close(scorers.score(given).scores["knn"], expected, rtol=1e-5, atol=1e-6, msg=name)
        fitted = ScorerSet(model, ["knn"]).fit(given).score(pixels).scores["knn"]
        torch.testing.assert_close(fitted, by_path, rtol=1e-5, atol=1e-6, msg=name)


def test_pixels_of_another_size_or_colour_go_the_way_of_a_file(detector: Detector, tmp_path: Path) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (2, 3, 20, 13)).astype(np.uint8)
    paths = []
    for i, array in enumerate(colour):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(array.transpose(1, 2, 0)).save(paths[-1])
    expected = detector.score(paths)
    for given in (colour, colour / 255, torch.from_numpy(colour), colour.transpose(0, 2, 3, 1)):
        torch.testing.assert_close(detector.score(given), expected, rtol=1e-5, atol=1e-6)


def test_labels_of_a_data_set_and_of_a_loader_are_used(arrays: np.ndarray) -> None:
    from torchvision.transforms import ToTensor

    model, spec = tiny.conv(), "mahalanobis:classes=true"
    labels = [i % 3 for i in range(20)]
    expected = Detector.fit(model, arrays[:, None], spec, labels=labels).scorer.state
    loader = torch.utils.data.DataLoader(Pictures(arrays, ToTensor()), batch_size=6)
    for given in (Pictures(arrays), loader):
        state = Detector.fit(model, given, spec).scorer.state
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
        learnt = ScorerSet(model, [spec]).fit(given).scorers[0].state
        for key, value in expected.items():
            torch.testing.assert_close(learnt[key], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(TrajOODError, match="needs the class of every training image, got none"):
        Detector.fit(model, [Image.fromarray(a) for a in arrays], spec)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ([[3, 4], [5]], 3),
        (((3, 4), (5,)), 3),
        (BatchSampler(SubsetRandomSampler([1, 2, 3]), 2, drop_last=False), 3),
        (BatchSampler(SubsetRandomSampler([1, 2, 3]), 2, drop_last=True), 2),
    ],
)
def test_a_loader_of_some_batches_has_as_many_images_as_they(given: Any, count: int, arrays: np.ndarray) -> None:
    from torchvision.transforms import ToTensor

    loader = torch.utils.data.DataLoader(Pictures(arrays, ToTensor()), batch_sampler=given)
    assert count_of(loader) == sum(len(images) for images, _ in loader) == count


def test_a_loader_of_whole_batches_of_a_stream_with_a_length_has_as_many_images() -> None:
    class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.rand(10, 1, 8, 8))

        def __len__(self) -> int:
            return 10

    loader = torch.utils.data.DataLoader(Stream(), batch_size=4, drop_last=True)
    assert count_of(loader) == sum(map(len, loader)) == 8


def test_labels_that_contradict_a_loaders_own_are_refused(arrays: np.ndarray) -> None:
    from torchvision.transforms import ToTensor

    model, spec, pictures = tiny.conv(), "mahalanobis:classes=true", Pictures(arrays, ToTensor())
    shuffles = torch.utils.data.DataLoader(pictures, batch_size=6, shuffle=True)
    labels, finer = [i % 3 for i in range(20)], [f"{i % 3}{i // 7}" for i in range(20)]
    for fit in (lambda **given: Detector.fit(model, **given, scorer=spec), ScorerSet(model, [spec]).fit):
        with pytest.raises(
            TrajOODError, match=r"labels: contradict those that the images bring with them: .* shuffle=True"
        ):
            fit(images=shuffles, labels=labels)
        for agreeing in (labels, finer, ["all"] * 20):
            fit(images=pictures, labels=agreeing)
        for sampler in (RandomSampler(pictures), SubsetRandomSampler(range(20)), WeightedRandomSampler([1.0] * 20, 20)):
            bare = torch.utils.data.DataLoader([image for image, _ in pictures], sampler=sampler)  # type: ignore[arg-type, misc]
            with pytest.raises(
                TrajOODError, match="order of their labels, got a DataLoader that shuffles: set shuffle"
            ):
                fit(images=bare, labels=labels)


def test_a_transform_that_draws_random_numbers_is_refused() -> None:
    from torchvision import transforms

    augments = transforms.Compose([transforms.Grayscale(), transforms.RandomResizedCrop(8), transforms.ToTensor()])
    for make in (
        lambda: CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, *GREY), GREY, transform=augments),
        lambda: CallableBackbone(lambda x: x, GREY, 64, module=torch.nn.Flatten(), transform=augments),
    ):
        with pytest.raises(
            TrajOODError, match="custom: transform draws random numbers: expected the same tensor of one"
        ):
            make()


def test_a_transform_that_does_not_convert_is_named_with_the_image(tmp_path: Path, arrays: np.ndarray) -> None:
    from torchvision import transforms

    whole = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    model = CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, *GREY), GREY, transform=whole)
    tiny.write_images(tmp_path, 3, 0)
    tiny.write_images(tmp_path / "odd", 1, 1, mode="RGB")
    told = (
        r"odd/000\.png: custom: transform: expected shape \(1, 8, 8\), got \(3, 8, 8\) of an image in mode RGB: let it"
    )
    with pytest.raises(TrajOODError, match=told):
        Detector.fit(model, read_folder(tmp_path), "knn:k=1")


def test_a_loader_that_shuffles_is_named(detector: Detector, arrays: np.ndarray) -> None:
    from torchvision.transforms import ToTensor

    pictures = Pictures(arrays, ToTensor())
    with pytest.warns(UserWarning, match="this DataLoader shuffles, so scores are not in its data set's order"):
        detector.score(torch.utils.data.DataLoader(pictures, batch_size=7, shuffle=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score(torch.utils.data.DataLoader(pictures, batch_size=7))


def test_what_a_data_set_gives_wrongly_is_named(detector: Detector, arrays: np.ndarray) -> None:
    from torchvision.transforms import Compose, Normalize, ToTensor

    class Broken(Pictures):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("no such shard")

    with pytest.raises(TrajOODError, match=r"item 0 of Broken cannot be read: KeyError\('no such shard'\)"):
        detector.score(Broken(arrays))
    normalised = Pictures(arrays, Compose([ToTensor(), Normalize((0.3,), (0.2,))]))
    with pytest.raises(TrajOODError, match=r"got values from -1.* traj_ood.Normalised\(images\)"):
        detector.score(normalised)
    with pytest.raises(TrajOODError, match="expected a key of image, img, pixel_values, data, got keys photo"):
        detector.score(torch.utils.data.DataLoader([{"photo": torch.zeros(GREY)}]))  # type: ignore[arg-type]
    unknown = "images: expected images of known number, got {}, which does not say how many: make a list of its images"
    for asked, kind in (
        (torch.utils.data.DataLoader(Endless()), "DataLoader over Endless"),
        (torch.utils.data.DataLoader(Endless(), batch_size=4), "DataLoader over Endless"),
        (Endless(), "Endless"),
    ):
        for ask in (detector.score, detector.decide, detector.calibrate):
            with pytest.raises(TrajOODError, match=f"^{unknown.format(kind)}, or score batch by batch$"):
                ask(asked)


def test_prepare_leaves_units_alone_and_checks_pixels() -> None:
    model = tiny.conv(mean=(0.3,), std=(0.2,))
    units = tiny.images(3, GREY)
    assert prepare(model, Normalised(units)) is units
    ones = prepare(model, torch.ones(GREY))
    assert ones.shape == (1, *GREY)
    assert float(ones.mean()) == pytest.approx((1 - 0.3) / 0.2, rel=1e-6)
    for high in (1.01, 255.0, math.nan):
        with pytest.raises(TrajOODError, match=r"\[0, 1\]|NaN"):
            prepare(model, torch.full((1, *GREY), high))
    with pytest.raises(TrajOODError, match=r"Normalised: expected a float tensor, got torch\.uint8: convert it"):
        prepare(model, Normalised(torch.zeros(1, *GREY).byte()))


@pytest.mark.parametrize("as_given", [torch.zeros, np.zeros], ids=["torch", "numpy"])
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (
            (4, 8, 8, 5),
            r"of 1 or 3 channels, got shape \(8, 8, 5\): put channels first, as in \(B, 1, 8, 8\), and keep",
        ),
        (
            (8, 8, 5),
            r"of 1 or 3 channels, got shape \(8, 8, 5\): put channels first, as in \(B, 1, 8, 8\), and keep 1 ",
        ),
        ((0, 3, 9, 9), r"\(B, 1, 8, 8\), got shape \(0, 3, 9, 9\) without an image to resize: give an empty batch the"),
        ((0, 8, 8, 5), r"\(B, 1, 8, 8\), got shape \(0, 8, 8, 5\) without an image to resize: give an empty batch the"),
        ((4, 1, 0, 9), r"with pixels, got shape \(1, 0, 9\): leave empty ones out"),
    ],
)
def test_shapes_that_cannot_be_resized_are_refused_with_what_to_do(shape: Any, text: str, as_given: Any) -> None:
    with pytest.raises(TrajOODError, match=rf"conv: expected images {text}"):
        prepare(tiny.conv(), as_given(shape))


def test_a_model_of_many_channels_takes_its_own_shape_alone() -> None:
    model = CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, 5, 8, 8), (5, 8, 8), name="five")
    assert prepare(model, torch.zeros(2, 5, 8, 8)).shape == (2, 5, 8, 8)
    for shape in ((2, 8, 8, 5), (2, 5, 9, 9), (2, 3, 8, 8)):
        words = (
            rf"five: expected images \(B, 5, 8, 8\), got shape {re.escape(str(shape))}: put channels first, and resize"
        )
        with pytest.raises(TrajOODError, match=words):
            prepare(model, torch.zeros(shape))


# ---------------------------------------------------------------------- detectors remember it


def test_a_detector_is_refused_to_a_model_that_prepares_pictures_otherwise(tmp_path: Path) -> None:
    def model(**options: Any) -> CallableAutoencoder:
        return CallableAutoencoder(lambda x: x.flatten(1), lambda z: 0.5 * z.reshape(-1, *GREY), GREY, **options)

    def shade(image: Image.Image) -> Tensor:
        return Preprocessing(GREY)(image)

    def brighter(image: Image.Image) -> Tensor:
        return 1.1 * Preprocessing(GREY)(image)

    for number, (saved, other) in enumerate(
        (
            ({}, {"preprocessing": Preprocessing(GREY, interpolation="bicubic")}),
            ({"transform": shade}, {"transform": brighter}),
            ({}, {"transform": shade}),
        )
    ):
        folder = tmp_path / str(number)
        Detector.fit(model(**saved), torch.rand(20, *GREY), "first-residual").save(folder)
        Detector.load(folder, device="cpu", autoencoder=model(**saved))
        with pytest.raises(TrajOODError, match="with the preprocessing that it was saved with, got another"):
            Detector.load(folder, device="cpu", autoencoder=model(**other))


@pytest.mark.parametrize("shape", [(16, 1, 1), (4, 8, 3)])
def test_an_array_of_the_models_shape_is_taken_as_it_is(shape: tuple[int, int, int]) -> None:
    model = CallableBackbone(lambda x: x, shape, 16, module=torch.nn.Flatten())
    array = np.random.default_rng(0).random((2, *shape))
    assert torch.equal(prepare(model, array), prepare(model, torch.from_numpy(array)))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_type_changes_no_pixel(default: torch.dtype) -> None:
    recipe = Preprocessing((3, 8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = (255 * tiny.images(2, (3, 8, 8)).sigmoid()).byte()
    expected = recipe.normalise(pixels)
    torch.set_default_dtype(default)
    try:
        found = recipe.normalise(pixels)
        back = recipe.unnormalise(found)
        (none,) = batches(tiny.conv(), ["gone.png"], on_error="skip")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(back, recipe.unnormalise(expected))
    assert (none.images.dtype, none.images.shape) == (torch.float32, (0, *GREY))
