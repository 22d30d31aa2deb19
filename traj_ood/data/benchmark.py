"""A benchmark: ID train, val and test splits, and near and far OOD sets, checked at construction."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from traj_ood.data.contents import is_of_image
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.encoded import EncodedImages
from traj_ood.data.equal_files import EqualImages
from traj_ood.data.images import FileImages, ImageSource
from traj_ood.errors import TrajOODError

OODRole = Literal["near", "far", "diagnostic"]
Role = Literal["train", "val", "test", "near", "far", "diagnostic"]
OOD_ROLES: tuple[OODRole, ...] = get_args(OODRole)
"""The roles of OOD sets, in the order of every table. Diagnostic sets are left out of means over sets: a thousand crops
of a few pictures say no more than the pictures, and noise is found by any measure of roughness."""
# Test and OOD images are always drawn with this seed, so that runs with different attractor seeds are compared on the
# same images.
TEST_SEED = 0


@dataclass(frozen=True)
class Split:
    """A named set of images.

    Attributes:
        name: letters, digits, ``_``, ``-`` and ``.``, not starting with ``-`` or ``.``; used in file names and table
            headings.
        role: train, val and test are in distribution; near, far and diagnostic are OOD sets. Scorers are measured on
            diagnostic sets too, but means over sets leave these out.
        images: the images.

    Raises:
        TrajOODError: the name or role is invalid, or there are no images.
    """

    name: str
    role: Role
    images: ImageSource

    def __post_init__(self) -> None:
        _check_name("split", self.name)
        if self.role not in get_args(Role):
            raise TrajOODError(f"split {self.name!r}: expected a role of {get_args(Role)}, got {self.role!r}")
        if len(self.images) == 0:
            raise TrajOODError(f"split {self.name!r}: expected at least one image, it is empty; fill or remove it")

    def digests(self, contents: Sequence[str] | None = None) -> dict[str, Any]:
        """The identity of the split: role, count, ``sha256`` and ``contents``.

        ``sha256`` is over the list of files (over the pixels for arrays). ``contents`` is over the contents of images
        and labels, and is the same on every machine. Old results lack it, and are compared by ``sha256``.

        Args:
            contents: the content digest of every image, if already known.
        """
        images = self.images
        listed = images.list_digest() if isinstance(images, FileImages) else images.digest()
        reading = (reading_of(images) or AS_STORED).options()
        held = images.contents() if contents is None else contents
        whole = [type(images).__name__, reading, list(images.ids), list(images.labels), list(held)]
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return {"role": self.role, "count": len(images), "sha256": listed, "contents": digest}


@dataclass(frozen=True)
class Copies:
    """``count`` of the ``total`` images of the split ``second`` are also in ``first``; ``example`` is one pair of ids,
    in ``second`` and in ``first``. ``learnt``: whether a surrogate has learnt from those of ``first``."""

    first: str
    second: str
    count: int
    total: int
    example: tuple[str, str]
    learnt: bool = False

    def __str__(self) -> str:
        mine, theirs = self.example
        learnt = ", from which the surrogate has learnt" if self.learnt else ""
        return (
            f"{self.count} of {self.total} images of {self.second!r} are copies of images of {self.first!r}{learnt} "
            f"(first: {mine!r} of {theirs!r})"
        )


@dataclass(frozen=True)
class Benchmark:
    """An OOD benchmark: ID splits and OOD sets.

    Attributes:
        name: its name in results and on the leaderboard; same characters as a split's name.
        train: ID images for attractors and features; at least 2.
        val: held-out ID images for selection and calibration, or None.
        test: ID images on which scores are measured.
        ood: OOD sets, in the order near, far, diagnostic, otherwise in the order given.
        train_size: default number of training images in the protocol; None means all.
        test_size: default number of images in the test split and in each OOD set; None means all.
        note: the source of the protocol, and which parts of it are inferred.
        how_to_get: one line on how to obtain the data, for errors about missing files.
        control: whether runs add the control on image files (:mod:`traj_ood.evaluation.file_control`) to their tables
            by default. Default false: it reads every image once more.

    Raises:
        TrajOODError: there are fewer than 2 training images or no near or far set, a split has the wrong role, two
            splits have the same name, or an image is shared by two ID splits or by an ID split and an OOD set.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    ood: tuple[Split, ...]
    train_size: int | None = None
    test_size: int | None = None
    note: str = ""
    how_to_get: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        _check_name("benchmark", self.name)
        ranks = [*OOD_ROLES, *(split.role for split in self.ood)]  # a role that is none is refused below
        object.__setattr__(self, "ood", tuple(sorted(self.ood, key=lambda split: ranks.index(split.role))))
        self._check_roles_and_names()
        if len(self.train.images) < 2:
            raise TrajOODError(
                f"benchmark {self.name!r}: fewer than 2 ID samples: the train split holds {len(self.train.images)}; "
                "give at least 2 training images"
            )
        self._check_disjoint()

    def splits(self) -> list[Split]:
        """All splits in order: train, val if present, test, near sets, far sets, diagnostic sets."""
        return [self.train, *([self.val] if self.val is not None else []), self.test, *self.ood]

    def subsample(self, *, train: int | None, per_set: int | None, seed: int) -> Benchmark:
        """A random subsample, identical on every machine and with every numpy version.

        Images keep their order, and a larger sample with the same seed contains the smaller one.

        Args:
            train: number of training images, drawn with ``seed``; None keeps all.
            per_set: largest number of images in val, test and each OOD set, drawn with a fixed seed; None keeps all.
            seed: seed of the training sample only.

        Raises:
            TrajOODError: ``train`` is below 2 or above the number available, ``per_set`` is below 1, or ``seed`` is
                negative.
        """
        if seed < 0:
            raise TrajOODError(
                f"benchmark {self.name!r}: expected a seed of 0 or more, got {seed}; choose another seed"
            )
        if train is not None and not 2 <= train <= len(self.train.images):
            raise TrajOODError(
                f"benchmark {self.name!r}: expected between 2 and {len(self.train.images)} training images (all of "
                f"its train split), got {train}; ask for a number in that range"
            )
        if per_set is not None and per_set < 1:
            raise TrajOODError(
                f"benchmark {self.name!r}: expected at least 1 image per set, got {per_set}; ask for more"
            )

        def sampled(split: Split) -> Split:
            size, own_seed = (train, seed) if split is self.train else (per_set, TEST_SEED)
            return replace(split, images=at_most(split.images, size, own_seed, split.name))

        return self._mapped(sampled)

    def following_links(self) -> Benchmark:
        """A copy in which image lists may follow links out of their root folder; see :func:`read_image_list`."""
        return self._with_files(FileImages, follow_links=True)

    def reading(self, how: Reading) -> Benchmark:
        """A copy whose image files are decoded as ``how`` says."""
        return self._with_files((FileImages, EncodedImages), exif=how.exif, bit_depth=how.bit_depth)

    def _with_files(self, kinds: Any, **changes: Any) -> Benchmark:
        def changed(images: Any) -> Any:
            if isinstance(images, EqualImages):
                return replace(images, source=changed(images.source))
            return replace(images, **changes) if isinstance(images, kinds) else images

        return self._mapped(lambda split: replace(split, images=changed(split.images)))

    def _mapped(self, change: Callable[[Split], Split]) -> Benchmark:
        val = None if self.val is None else change(self.val)
        return replace(
            self, train=change(self.train), val=val, test=change(self.test), ood=tuple(map(change, self.ood))
        )

    def contents(self) -> dict[str, Sequence[str]]:
        """The content digest of every image by split name; see :meth:`ImageSource.contents`."""
        return {split.name: split.images.contents() for split in self.splits()}

    def digests(self, contents: Mapping[str, Sequence[str]] | None = None) -> dict[str, dict[str, Any]]:
        """The identity of the data: :meth:`Split.digests` by split name; ``contents`` if already known."""
        contents = self.contents() if contents is None else contents
        return {split.name: split.digests(contents[split.name]) for split in self.splits()}

    def copies(
        self, contents: Mapping[str, Sequence[str]] | None = None, learnt: ImageSource | None = None
    ) -> list[Copies]:
        """Images with equal content in two splits: in distribution at least one of them, or OOD both and alike in more
        than half of the second, which the means over sets would count twice.

        Equal are files with the same bytes, or the same pixels in memory; a file that was saved again is not found.
        Pairs are in the order of :meth:`splits`, so that those within the ID splits come first.

        Args:
            contents: :meth:`contents`, if already known.
            learnt: images that a surrogate has learnt from, which count as training images; default: none.
        """
        contents = self.contents() if contents is None else contents
        taught = {} if learnt is None else dict(zip(learnt.contents(), learnt.ids, strict=True))
        found = []
        for first, second in combinations(self.splits(), 2):
            theirs = dict(zip(contents[first.name], first.images.ids, strict=True))
            if first is self.train:
                theirs = taught | theirs
            mine = zip(contents[second.name], second.images.ids, strict=True)
            shared = [(c, (image_id, theirs[c])) for c, image_id in mine if c in theirs and is_of_image(c)]
            if len(shared) > (len(second.images) / 2 if _is_ood(first) else 0):
                known = first is self.train and any(content in taught for content, _ in shared)
                found.append(Copies(first.name, second.name, len(shared), len(second.images), shared[0][1], known))
        return found

    def _check_roles_and_names(self) -> None:
        if all(split.role == "diagnostic" for split in self.ood):
            raise TrajOODError(f"benchmark {self.name!r}: expected at least one near or far OOD set, got none; add one")
        expected = [
            ("train",),
            *([("val",)] if self.val is not None else []),
            ("test",),
            *[OOD_ROLES] * len(self.ood),
        ]
        names: set[str] = set()
        for split, roles in zip(self.splits(), expected, strict=True):
            if split.role not in roles:
                raise TrajOODError(
                    f"benchmark {self.name!r}: split {split.name!r}: expected the role {' or '.join(roles)}, got "
                    f"{split.role!r}; correct the role"
                )
            if split.name in names:
                raise TrajOODError(f"benchmark {self.name!r}: two splits are named {split.name!r}; rename one")
            names.add(split.name)

    def _check_disjoint(self) -> None:
        # The training split, by far the largest (ImageNet: 1.3 million), is only iterated over, never held in memory.
        held: dict[str, Split] = {}
        for split in self.splits()[1:]:
            for key, image_id in _keys(split):
                first = held.setdefault(key, split)
                if first is not split and not (_is_ood(first) and _is_ood(split)):
                    raise self._shared(image_id, first.name, split.name)
        for key, image_id in _keys(self.train):
            if key in held:
                raise self._shared(image_id, self.train.name, held[key].name)

    def _shared(self, image_id: str, first: str, second: str) -> TrajOODError:
        return TrajOODError(
            f"benchmark {self.name!r}: splits {first!r} and {second!r} share the image {image_id!r}; "
            "give every image to one of them only"
        )


def reading_of(images: object) -> Reading | None:
    """How the image files of a source are decoded; None for images that are no files."""
    while isinstance(images, EqualImages):
        images = images.source
    return Reading(images.exif, images.bit_depth) if isinstance(images, FileImages | EncodedImages) else None


def sample_indices(count: int, size: int, seed: int, stream: str) -> list[int]:
    """Draw ``size`` of ``count`` indices without replacement, in ascending order.

    They come from the raw PCG64 stream, which numpy guarantees never to change (unlike ``Generator.permutation``).
    ``stream`` distinguishes draws with the same seed, so that two sets of equal size get different positions.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(stream.encode())])
    keys = np.random.PCG64(entropy).random_raw(count)
    return sorted(int(i) for i in np.argsort(keys, kind="stable")[:size])


def at_most(images: ImageSource, size: int | None, seed: int, stream: str) -> ImageSource:
    """``size`` images drawn by :func:`sample_indices`, or all if ``size`` is None or there are no more."""
    count = len(images)
    return images if size is None or size >= count else images.select(sample_indices(count, size, seed, stream))


def split_off(images: ImageSource, size: int, seed: int, stream: str) -> tuple[ImageSource, ImageSource]:
    """``size`` images drawn by :func:`sample_indices`, and the others."""
    chosen = set(sample_indices(len(images), size, seed, stream))
    return images.select(sorted(chosen)), images.select([i for i in range(len(images)) if i not in chosen])


def _check_name(kind: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TrajOODError(
            f"{kind} name {name!r}: expected letters, digits, '_', '-' and '.', starting with a letter or digit; "
            "choose another name"
        )


def _is_ood(split: Split) -> bool:
    return split.role in OOD_ROLES


def _keys(split: Split) -> Iterator[tuple[str, str]]:
    """Keys by which images are recognised in two splits, each with the image's id.

    Files are compared by canonical path, which also finds links and other spellings. Ids are compared within the ID
    splits only, as ids of unrelated OOD sources may coincide.
    """
    if isinstance(split.images, FileImages):
        yield from zip(("file:" + path for path in split.images.resolved()), split.images.ids, strict=True)
    if not _is_ood(split):
        yield from (("id:" + image_id, image_id) for image_id in split.images.ids)
