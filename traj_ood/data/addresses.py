"""Files at fsspec addresses (`s3://`, `gs://`, `https://`, …), restricted to a list of allowed prefixes.

An address in a list or a form may come from an untrusted user, and a request from this machine can reach internal
services, such as a cloud's metadata. The list therefore applies to the address that the user gives and to those that a
server gives: the links of a listing, and the target of a redirect before it is followed.
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
    """Raise if no prefix in ``allow`` covers an address, or if it contains ``..`` (also as ``%2e%2e``) or chains
    another address (``::``)."""
    if ".." in unquote(address).split("/") or not any(allowed and _within(address, allowed) for allowed in allow):
        known = ", ".join(allow) or "none"
        raise TrajOODError(f"{address[:200]}: not an allowed address (allowed: {known}): add its prefix with --allow")


def _within(address: str, allowed: str) -> bool:
    """Whether an address is at or below an allowed one: ``s3://b/a`` allows ``s3://b/a`` and ``s3://b/a/c``, not
    ``s3://b/ac``."""
    if not address.startswith(allowed):
        return False
    rest = address[len(allowed) :]
    return "::" not in rest and (not rest or allowed.endswith("/") or rest.startswith("/"))


class RemoteFiles:
    """The file at an allowed address, or all files below it. ``names`` are their addresses, sorted; a listing may name
    some that :meth:`open` refuses as not allowed."""

    def __init__(self, address: str, allow: Sequence[str]) -> None:
        check_allowed(address, allow)
        self._allow = tuple(allow)
        core = library("fsspec.core", "fsspec")
        with foreign_errors(f"{address}: cannot be opened", ": correct the address, or install what fsspec needs"):
            self._system, path = core.url_to_fs(address, **self._options(address))
            found = sorted(self._system.find(path)) if self._system.isdir(path) else [path]
        # fsspec's paths lack the scheme and, except those of buckets, the host. A path that it has rewritten keeps the
        # scheme alone, so that a name never begins with more of the address than it is known to be below.
        whole, end = address.removesuffix("/"), path.rstrip("/")
        start = whole.removesuffix(end) if whole.endswith(end) else address[: address.index("://") + 3]
        self._paths = {name if is_address(name) else start + name: name for name in found}
        self.names = list(self._paths)

    def open(self, name: str, *, seekable: bool = False) -> BinaryIO:
        """Open one of ``names`` for reading in binary mode, if it is allowed and redirects only to what is allowed.

        ``seekable``, over HTTP, requests ranges as they are needed, which not every server supports; by default the
        file is streamed from start to end.
        """
        check_allowed(name, self._allow)
        protocols = [self._system.protocol] if isinstance(self._system.protocol, str) else self._system.protocol
        streamed = not seekable and set(protocols) & set(_WEB)
        try:
            file: BinaryIO = self._system.open(self._paths[name], "rb", **({"block_size": 0} if streamed else {}))
        except Exception as error:  # each file system has its own error classes
            raise TrajOODError(f"{name}: cannot be fetched ({_cause(error)})") from error
        return file

    def read(self, name: str, most: int) -> bytes:
        """The first ``most + 1`` bytes of a file; a longer result than ``most`` shows that the file is too large."""
        parts, size = [], 0
        with self.open(name) as file:
            try:
                while size <= most and (part := file.read(most + 1 - size)):  # a stream returns what has arrived
                    parts.append(part)
                    size += len(part)
            except Exception as error:
                raise TrajOODError(f"{name}: cannot be fetched ({_cause(error)})") from error
        return b"".join(parts)

    def _options(self, address: str) -> dict[str, Any]:
        """fsspec's options for an HTTP address: each redirect is checked before it is followed. Empty for others."""
        used = [protocol for protocol in _WEB if f"{protocol}://" in address.lower()]
        if not used:
            return {}
        aiohttp, yarl = library("aiohttp", "fsspec[http]"), library("yarl", "fsspec[http]")
        conf = import_module("fsspec.config").conf

        async def check_redirect(session: Any, context: Any, answer: Any) -> None:
            target = answer.response.headers.get("Location") or answer.response.headers.get("URI")
            if target:
                check_allowed(str(answer.response.url.join(yarl.URL(target))), self._allow)

        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(check_redirect)
        # aiohttp's default of five minutes limits a whole response, and judging a shard may take longer.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        found: dict[str, Any] = {}
        for name in used:
            client = {"timeout": timeout, **conf.get(name, {}).get("client_kwargs", {}), "trace_configs": [trace]}
            found[name] = {"client_kwargs": client, "skip_instance_cache": True}
        return found


def library(module: str, package: str) -> Any:
    """Import a module of an optional library, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise TrajOODError(f"this source needs {package}: pip install 'traj_ood[sources]'") from error


def _cause(error: BaseException) -> str:
    """The cause of a failure: the first :class:`TrajOODError` in its chain, which fsspec hides behind a
    FileNotFoundError, else the error itself."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, TrajOODError):
            return str(known)
        known = known.__cause__ or known.__context__
    return f"{type(error).__name__}: {str(error)[:200]}"
