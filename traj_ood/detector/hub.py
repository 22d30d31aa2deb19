"""Push detectors to and load them from the Hugging Face hub; the folder of a detector is the repository.

Authentication is that of huggingface_hub, or a given token; there are no prompts. Only files of a detector are
downloaded (safetensors, JSON, the card), no code, and each is verified against the seal.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traj_ood.autoencoders import Autoencoder
from traj_ood.detector.folder import KNOWN_FILES
from traj_ood.errors import TrajOODError, foreign_errors

if TYPE_CHECKING:
    from typing_extensions import Self

_SUFFIXES = (".safetensors", ".json", ".md")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class OnTheHub:
    """Mixin of :class:`traj_ood.Detector` with its hub methods."""

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
        """Push this detector to a repository on the hub in one commit, which replaces its previous content.

        Args:
            repository: ``owner/name``; created if it does not exist.
            private: visibility of a new repository. Default true: a detector contains digests, and possibly features,
                of its training images.
            token: access token. Default: that of ``hf auth login`` or ``HF_TOKEN``.
            revision: branch. Default: ``main``.
            message: commit message.
        Returns:
            The URL of the commit.
        Raises:
            TrajOODError: the name is invalid, the network or the permission is missing, or as ``save``.
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
                    delete_patterns=["*"],  # the seal would refuse files of a previous detector
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
        """Load a detector from a repository on the hub, with all checks of ``load``.

        Args:
            repository: ``owner/name``.
            revision: branch, tag or commit; only a full commit hash always gives the same bytes. Default: ``main``.
            token: see :meth:`push_to_hub`.
            device, autoencoder: see ``load``.
        Raises:
            TrajOODError: the network is missing, there is no such repository, it contains no detector, or as ``load``.
        """
        _check(repository)
        from huggingface_hub import snapshot_download

        patterns = [name for name in KNOWN_FILES if "." in name] + [f"model/**{suffix}" for suffix in _SUFFIXES]
        with foreign_errors(f"hub repository {repository}: cannot be read", ": check the name, the token, the network"):
            copy = Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=patterns))
        with tempfile.TemporaryDirectory(prefix="traj-ood-hub-") as place:
            folder = Path(place) / repository.split("/")[1]
            for file in sorted(copy.rglob("*")):
                inside = file.relative_to(copy)
                if file.is_file() and inside.parts[0] in KNOWN_FILES and file.suffix in _SUFFIXES:
                    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, folder / inside)  # the hub's cache consists of links, which a seal refuses
            if not (folder / KNOWN_FILES[0]).is_file():
                raise TrajOODError(f"hub repository {repository}: expected a detector, found no {KNOWN_FILES[0]}")
            return cls.load(folder, device, autoencoder)


def _check(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise TrajOODError(f"hub repository {repository!r}: expected owner/name")
