"""Files at addresses (`s3://`, `gs://`, `https://`, …) by fsspec, and the list of those that may be opened.

An address in a list or a form may be anybody's, and a request from this machine reaches what the machine reaches: the
metadata of a cloud, the services of a cluster. What is named by the user is compared with the list, and so is what a
server names: the links of a listing, and where it redirects to, before that is asked for anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any, BinaryIO
from urllib.parse import unquote

from traj_ood.errors import TrajOODError, foreign_errors

_ADDRESS = re.compile(r"^[a-z][a-z0-9+.-]*(::[a-z0-9+.:/-]*)?://", re.IGNORECASE)
_WEB = ("http", "https")


def is_address(source: str) -> bool:
    """Whether ``source`` is a URL for fsspec, such as ``s3://bucket/folder``."""
    return bool(_ADDRESS.match(source))


def check_allowed(address: str, allow: Sequence[str]) -> None:
    """Refuse an address that begins with none of ``allow``, leads out of it (``..``, also as ``%2e%2e``), or chains
    another one to it (``::``).

    Raises:
        TrajOODError: names what is allowed.
    """
    if ".." in unquote(address).split("/") or not any(allowed and _within(address, allowed) for allowed in allow):
        told = ", ".join(allow) or "none"
        raise TrajOODError(f"{address[:200]}: not an address that is allowed ({told}): name its beginning with --allow")


def _within(address: str, allowed: str) -> bool:
    """``s3://bucket/a`` holds ``s3://bucket/a`` and ``s3://bucket/a/b``, not ``s3://bucket/ab``."""
    if not address.startswith(allowed):
        return False
    rest = address[len(allowed) :]
    return "::" not in rest and (not rest or allowed.endswith("/") or rest.startswith("/"))


class RemoteFiles:
    """What an allowed address holds: itself, or all files below it.

    Attributes:
        names: of the files, whole addresses, sorted. Not all need be allowed: :meth:`open` says so.
    """

    def __init__(self, address: str, allow: Sequence[str]) -> None:
        """Raises :class:`TrajOODError`: not allowed, or it cannot be listed."""
        check_allowed(address, allow)
        self._allow = tuple(allow)
        core = library("fsspec.core", "fsspec")
        with foreign_errors(f"{address}: cannot be opened", ": correct the address, or install what fsspec asks for"):
            self._system, path = core.url_to_fs(address, **self._options(address))
            found = sorted(self._system.find(path)) if self._system.isdir(path) else [path]
        prefix = address[: _ADDRESS.match(address).end()]  # type: ignore[union-attr]
        self._paths = {name if is_address(name) else prefix + name.lstrip("/"): name for name in found}
        self.names = list(self._paths)

    def open(self, name: str, *, seekable: bool = False) -> BinaryIO:
        """One of ``names``, for reading.

        Args:
            seekable: over HTTP, ask for parts of it as they are needed, which not every server can do. Default: from
                its start to its end.
        Raises:
            TrajOODError: it is not allowed, leads by a redirect to what is not allowed, or cannot be fetched.
        """
        check_allowed(name, self._allow)
        protocols = [self._system.protocol] if isinstance(self._system.protocol, str) else self._system.protocol
        streamed = not seekable and set(protocols) & set(_WEB)
        try:
            file: BinaryIO = self._system.open(self._paths[name], "rb", **({"block_size": 0} if streamed else {}))
        except Exception as error:  # each file system has errors of its own
            raise TrajOODError(f"{name}: cannot be fetched ({_cause(error)})") from error
        return file

    def read(self, name: str, most: int) -> bytes:
        """Its content, or as much of it as shows that it is more than ``most`` bytes.

        Raises:
            TrajOODError: as :meth:`open`, or broken off.
        """
        parts, size = [], 0
        with self.open(name) as file:
            try:
                while size <= most and (part := file.read(most + 1 - size)):  # a stream gives what has arrived
                    parts.append(part)
                    size += len(part)
            except Exception as error:
                raise TrajOODError(f"{name}: cannot be fetched ({_cause(error)})") from error
        return b"".join(parts)

    def _options(self, address: str) -> dict[str, Any]:
        """Of fsspec's HTTP, where it is asked: each redirect is looked at before it is followed."""
        used = [protocol for protocol in _WEB if f"{protocol}://" in address.lower()]
        if not used:
            return {}
        aiohttp, yarl = library("aiohttp", "fsspec[http]"), library("yarl", "fsspec[http]")
        conf = import_module("fsspec.config").conf

        async def look(session: Any, context: Any, answer: Any) -> None:
            target = answer.response.headers.get("Location") or answer.response.headers.get("URI")
            if target:
                check_allowed(str(answer.response.url.join(yarl.URL(target))), self._allow)

        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(look)
        # aiohttp's own five minutes are for a whole answer, and a shard may be judged for longer.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        found: dict[str, Any] = {}
        for name in used:
            client = {"timeout": timeout, **conf.get(name, {}).get("client_kwargs", {}), "trace_configs": [trace]}
            found[name] = {"client_kwargs": client, "skip_instance_cache": True}
        return found


def library(module: str, package: str) -> Any:
    """A module of an optional library.

    Raises:
        TrajOODError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise TrajOODError(f"this source needs {package}: pip install 'traj_ood[sources]'") from error


def _cause(error: BaseException) -> str:
    """fsspec says FileNotFoundError of whatever happened; our own reason is behind it, where there is one."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, TrajOODError):
            return str(known)
        known = known.__cause__ or known.__context__
    return f"{type(error).__name__}: {str(error)[:200]}"
