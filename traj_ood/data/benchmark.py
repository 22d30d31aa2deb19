"""A benchmark: ID train, val and test splits and near and far OOD sets, checked when it is put together."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, cast, get_args

import numpy as np

from traj_ood.data.contents import ABSENT
from traj_ood.data.decoding import Reading
from traj_ood.data.encoded import EncodedImages
from traj_ood.data.images import FileImages, ImageSource
from traj_ood.errors import TrajOODError

OODRole = Literal["near", "far", "diagnostic"]
Role = Literal["train", "val", "test", "near", "far", "diagnostic"]
OOD_ROLES: tuple[OODRole, ...] = get_args(OODRole)
"""In the order of every table. Diagnostics are OOD sets that no mean over sets holds: crops of a few pictures, of which
a thousand say no more than the pictures do, and noise, which any reading of roughness finds."""
# Test and OOD images are drawn with this seed whatever the attractor seed, so that runs over several attractor seeds
# are compared on the same images.
TEST_SEED = 0
_EMPTY = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Split:
    """One named set of images.

    Attributes:
        name: letters, digits, ``_``, ``-`` and ``.``, not starting with the last two: it becomes part of file names
            and table headings.
        role: train, val and test are in distribution; near, far and diagnostic ones are OOD sets. Scorers are measured
            on diagnostics as on others, but means over sets leave them out.
        images: the images.

    Raises:
        TrajOODError: a name or role outside these sets, or no images.
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
        """Role, number of images, ``sha256`` of the list (of the pixels for arrays), and ``contents``, the SHA-256 of
        images and labels, which is the same on every machine.

        Results older than content digests hold the first three; the list is what they can be compared by.

        Args:
            contents: of all images, where they are known already.
        """
        images = self.images
        listed, reading = images.digest, {}
        if isinstance(images, FileImages):
            listed, reading = images.list_digest, images.reading()
        held = images.contents() if contents is None else contents
        whole = [type(images).__name__, reading, list(images.ids), list(images.labels), list(held)]
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return {"role": self.role, "count": len(images), "sha256": listed(), "contents": digest}


@dataclass(frozen=True)
class Copies:
    """Images of the split ``second`` that are in ``first``, too: how many of how many, and the ids of one such pair
    (in ``second``, in ``first``)."""

    first: str
    second: str
    count: int
    total: int
    example: tuple[str, str]

    def __str__(self) -> str:
        mine, theirs = self.example
        return (
            f"{self.count} of {self.total} images of {self.second!r} are copies of images of {self.first!r} (first: "
            f"{mine!r} of {theirs!r})"
        )


@dataclass(frozen=True)
class Benchmark:
    """Named splits that belong together.

    Attributes:
        name: what results and the leaderboard call it; same characters as a split's.
        train: ID images that attractors and features come from; at least 2.
        val: ID images held out for choosing and calibrating, or None.
        test: ID images the scores are measured on.
        ood: OOD sets; sorted near, far, diagnostic, otherwise in the order given.
        train_size: training images the protocol uses when the user asks for no number; None is all.
        test_size: likewise for the test split and each OOD set.
        note: where the protocol comes from, and what in it is inferred.
        how_to_get: one line on obtaining the data, for errors about missing files.
        control: whether runs add the control on image files (:mod:`traj_ood.evaluation.file_control`) to their tables
            unless they are told otherwise. Default false: it reads every image once more.

    Raises:
        TrajOODError: fewer than 2 training images, no near or far set, a role in the wrong place, two splits of one
            name, or an image shared by two ID splits or by an ID split and an OOD set.
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
        object.__setattr__(self, "ood", tuple(sorted(self.ood, key=_rank)))
        self._check_roles_and_names()
        if len(self.train.images) < 2:
            raise TrajOODError(
                f"benchmark {self.name!r}: fewer than 2 ID samples: the train split holds {len(self.train.images)}; "
                "give at least 2 training images"
            )
        self._check_disjoint()

    def splits(self) -> list[Split]:
        """Every split: train, val when there is one, test, near sets, far sets, diagnostics."""
        return [*self._id_splits(), *self.ood]

    def subsample(self, *, train: int | None, per_set: int | None, seed: int) -> Benchmark:
        """A smaller benchmark, the same on every machine and with every numpy version.

        Images keep their order, and a larger sample with the same seed contains the smaller one.

        Args:
            train: number of training images, drawn by ``seed``; None keeps all.
            per_set: most images per val, test and OOD set, drawn by a fixed seed; smaller sets stay whole, None
                keeps all.
            seed: for the training sample only.

        Raises:
            TrajOODError: ``train`` is under 2 or more than there are, ``per_set`` is under 1, or ``seed`` is negative.
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
        return replace(
            self,
            train=_sampled(self.train, train, seed),
            val=None if self.val is None else _sampled(self.val, per_set, TEST_SEED),
            test=_sampled(self.test, per_set, TEST_SEED),
            ood=tuple(_sampled(split, per_set, TEST_SEED) for split in self.ood),
        )

    def following_links(self) -> Benchmark:
        """The same, where image lists may reach out of their roots by links; see :func:`read_image_list`."""
        return self._with_files(follow_links=True)

    def reading(self, how: Reading) -> Benchmark:
        """The same, whose image files become pixels as ``how`` says."""
        return self._with_files(exif=how.exif, bit_depth=how.bit_depth)

    def _with_files(self, **changes: Any) -> Benchmark:
        def changed(split: Split) -> Split:
            images = split.images
            return (
                replace(split, images=replace(cast("Any", images), **changes)) if _is_read(images, changes) else split
            )

        return replace(
            self,
            train=changed(self.train),
            val=None if self.val is None else changed(self.val),
            test=changed(self.test),
            ood=tuple(changed(split) for split in self.ood),
        )

    def contents(self) -> dict[str, Sequence[str]]:
        """What every image holds, by split; see :meth:`ImageSource.contents`."""
        return {split.name: split.images.contents() for split in self.splits()}

    def digests(self, contents: Mapping[str, Sequence[str]] | None = None) -> dict[str, dict[str, Any]]:
        """The identity of the data: :meth:`Split.digests` by name; ``contents`` where they are known already."""
        contents = self.contents() if contents is None else contents
        return {split.name: split.digests(contents[split.name]) for split in self.splits()}

    def copies(self, contents: Mapping[str, Sequence[str]] | None = None) -> list[Copies]:
        """Images of equal content in two splits, unless both are OOD sets: byte by byte the same file, or the same
        pixels in memory. A file that was saved again is another one here.

        It follows :meth:`splits`: what test images share with training images stands before what OOD sets share.
        """
        contents = self.contents() if contents is None else contents
        found = []
        for first, second in combinations(self.splits(), 2):
            if _is_ood(first) and _is_ood(second):
                continue
            theirs = dict(zip(contents[first.name], first.images.ids, strict=True))
            for unreadable in (ABSENT, _EMPTY):
                theirs.pop(unreadable, None)
            mine = zip(contents[second.name], second.images.ids, strict=True)
            pairs = [(image_id, theirs[content]) for content, image_id in mine if content in theirs]
            if pairs:
                found.append(Copies(first.name, second.name, len(pairs), len(second.images), pairs[0]))
        return found

    def _id_splits(self) -> list[Split]:
        return [self.train, *([self.val] if self.val is not None else []), self.test]

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
                    f"benchmark {self.name!r}: split {split.name!r} stands where the role {' or '.join(roles)} is "
                    f"expected, its role is {split.role!r}; correct the role"
                )
            if split.name in names:
                raise TrajOODError(f"benchmark {self.name!r}: two splits are named {split.name!r}; rename one")
            names.add(split.name)

    def _check_disjoint(self) -> None:
        # The training split, by far the largest (ImageNet: 1.3 million), only streams past and is never held.
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


def sample_indices(count: int, size: int, seed: int, stream: str) -> list[int]:
    """``size`` of ``count`` indices, without replacement, ascending.

    Drawn from the raw PCG64 stream, which numpy guarantees never to change (unlike ``Generator.permutation``).
    ``stream`` separates draws of one seed, so that two sets of one size do not get the same positions.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(stream.encode())])
    keys = np.random.PCG64(entropy).random_raw(count)
    return sorted(int(i) for i in np.argsort(keys, kind="stable")[:size])


def _check_name(kind: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TrajOODError(
            f"{kind} name {name!r}: expected letters, digits, '_', '-' and '.', starting with a letter or digit; "
            "choose another name"
        )


def _sampled(split: Split, size: int | None, seed: int) -> Split:
    count = len(split.images)
    if size is None or size >= count:
        return split
    return replace(split, images=split.images.select(sample_indices(count, size, seed, split.name)))


def _is_ood(split: Split) -> bool:
    return split.role in OOD_ROLES


def _rank(split: Split) -> int:
    """Place among OOD sets; a role that is none is refused later."""
    return [*OOD_ROLES, split.role].index(split.role)


def _is_read(images: ImageSource, changes: Mapping[str, Any]) -> bool:
    """Whether the images are files that these settings are of."""
    return isinstance(images, FileImages) or (isinstance(images, EncodedImages) and "follow_links" not in changes)


def _keys(split: Split) -> Iterator[tuple[str, str]]:
    """(key, id) for every way in which two splits can hold the same image.

    Files are compared by canonical path, so a link or a second spelling does not hide them. Ids are compared within
    the ID splits only: those of unrelated OOD sources may be alike by chance.
    """
    if isinstance(split.images, FileImages):
        yield from zip(("file:" + path for path in split.images.resolved()), split.images.ids, strict=True)
    if not _is_ood(split):
        yield from (("id:" + image_id, image_id) for image_id in split.images.ids)
