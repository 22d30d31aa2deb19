"""Detectors on the Hugging Face hub: their folder as a repository, with the model card, and back.

Nothing asks a question: who is logged in is what huggingface_hub knows, or a token that is given. Only the files that a
detector consists of are fetched (safetensors, JSON, the card), no code is, and each is checked against the seal.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traj_ood.detector.folder import KNOWN_FILES
from traj_ood.errors import TrajOODError, foreign_errors

if TYPE_CHECKING:
    from typing_extensions import Self

    from traj_ood.autoencoders import Autoencoder

_SUFFIXES = (".safetensors", ".json", ".md")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class OnTheHub:
    """What :class:`traj_ood.Detector` has for the hub."""

    def save(self, folder: str | Path, *, overwrite: bool = True) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", autoencoder: Autoencoder | None = None) -> Self:
        raise NotImplementedError

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = True,
        token: str | None = None,
        revision: str | None = None,
        message: str = "A traj_ood detector",
    ) -> str:
        """Write this detector to a repository of the hub; what is there of another one is replaced, in one commit.

        Args:
            repository: ``owner/name``; made where there is none.
            private: of a new repository. Default true: a detector holds digests of its training images and may hold
                features of them.
            token: of an account. Default: that of ``hf auth login`` or ``HF_TOKEN``.
            revision: a branch. Default: ``main``.
            message: of the commit.
        Returns:
            The commit's address.
        Raises:
            TrajOODError: a name that is none, no network, no permission, or as ``save``.
        """
        _check(repository)
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory(prefix="traj-ood-hub-") as place:
            folder = Path(place) / "detector"
            self.save(folder)
            with foreign_errors(f"hub repository {repository}: cannot be written", ": check the name and the token"):
                api = HfApi(token=token)
                api.create_repo(repository, private=private, exist_ok=True)
                done: Any = api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    revision=revision,
                    commit_message=message,
                    delete_patterns=["*"],  # of another detector, whose files the seal would refuse
                )
        return str(getattr(done, "commit_url", done))

    @classmethod
    def from_hub(
        cls,
        repository: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str = "auto",
        autoencoder: Autoencoder | None = None,
    ) -> Self:
        """A detector from a repository of the hub, after all the checks of ``load``.

        Args:
            repository: ``owner/name``. revision: branch, tag or commit; a full commit always names the same bytes.
            token: see :meth:`push_to_hub`. device, autoencoder: see ``load``.
        Raises:
            TrajOODError: no network, no such repository or none of a detector, or as ``load``.
        """
        _check(repository)
        from huggingface_hub import snapshot_download

        patterns = [name for name in KNOWN_FILES if "." in name] + [f"model/**{suffix}" for suffix in _SUFFIXES]
        with foreign_errors(f"hub repository {repository}: cannot be had", ": check the name, the token, the network"):
            copy = Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=patterns))
        with tempfile.TemporaryDirectory(prefix="traj-ood-hub-") as place:
            folder = Path(place) / repository.split("/")[1]
            for file in sorted(copy.rglob("*")):
                inside = file.relative_to(copy)
                if file.is_file() and inside.parts[0] in KNOWN_FILES and file.suffix in _SUFFIXES:
                    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, folder / inside)  # the hub's cache holds links, which a seal refuses
            if not (folder / KNOWN_FILES[0]).is_file():
                raise TrajOODError(f"hub repository {repository}: expected a detector, found no {KNOWN_FILES[0]}")
            return cls.load(folder, device, autoencoder)


def _check(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise TrajOODError(f"hub repository {repository!r}: expected owner/name")
