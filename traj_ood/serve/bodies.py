"""Extract image files from the body of a request: multipart, JSON with base64, or one image."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from traj_ood.serve.limits import Budget, Limits, RefusedError
from traj_ood.text import one_line

_MAX_NAME = 200  # characters of a name, or of a parser's message, in a response
_KEY = "images"
_DISCARDED = 16
_FIELD = 4096  # most bytes of a form field that is not a file; no such field is used
_FORM = 'JSON: expected {"images": ["<base64>", …]}'


@dataclass(frozen=True)
class Upload:
    """One image file: its name as given by the client, as one printable line, and its content."""

    name: str
    content: bytes


class _InMemory(MultiPartParser):
    """Multipart parser that keeps parts of any size in memory, which is bounded by the limit on the body, so that no
    image is written to disk."""

    spool_max_size = 2**40


async def receive(request: Request, limits: Limits, bodies: Budget) -> bytes:
    """Receive the whole body. Its bytes are taken from the budget ``bodies``; the caller gives them back."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 12 or int(length) > limits.body):
        await _discard_rest(request, limits)
        raise RefusedError(413, f"body: expected at most {limits.body} bytes, got {length[:20]}")
    parts: list[bytes] = []
    try:
        await asyncio.wait_for(_collect(request, limits, bodies, parts), limits.patience)
    except BaseException as error:
        size = sum(map(len, parts))
        parts.clear()
        bodies.give(size)
        if isinstance(error, asyncio.TimeoutError):
            reason = f"body: expected all of it within {limits.patience:g} s, got {size} bytes"
            raise RefusedError(408, reason) from error
        if isinstance(error, ClientDisconnect):
            raise RefusedError(408, f"body: broken off after {size} bytes") from error
        if isinstance(error, RefusedError) and error.status == 413:
            await _discard_rest(request, limits)
        raise
    return b"".join(parts)


async def _collect(request: Request, limits: Limits, bodies: Budget, parts: list[bytes]) -> None:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limits.body:
            raise RefusedError(413, f"body: expected at most {limits.body} bytes, got more")
        bodies.take(len(part))
        parts.append(part)


async def _discard_rest(request: Request, limits: Limits) -> None:
    """Read the rest of a body that is too large, up to ``_DISCARDED`` times the limit, if the connection is closed
    after the answer: a client that is still sending then finds it broken, and never reads the answer."""
    words = {word.strip() for word in request.headers.get("connection", "").lower().split(",")}
    closes = "close" in words or (request.scope.get("http_version") == "1.0" and "keep-alive" not in words)
    if not closes or "expect" in request.headers:
        return

    async def rest() -> None:
        left = _DISCARDED * limits.body
        async for part in request.stream():
            left -= len(part)
            if left < 0:
                return

    with suppress(asyncio.TimeoutError, ClientDisconnect):
        await asyncio.wait_for(rest(), limits.patience)


async def uploads(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    """The image files in a body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _multipart(request, body, limits)
    elif kind == "application/json":
        found = _from_json(body, limits)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found = [Upload("image", body)]
    else:
        raise RefusedError(415, f"expected multipart/form-data, application/json or image/*, got {kind[:80]!r}")
    if not found:
        raise RefusedError(400, "expected at least one image, got none")
    return found


async def _multipart(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = _InMemory(
            request.headers, stream(), max_files=limits.images, max_fields=limits.images, max_part_size=_FIELD
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        text = str(getattr(error, "message", error)) or type(error).__name__
        status = 413 if text.startswith("Too many") else 400
        raise RefusedError(status, f"multipart: {one_line(text)[:_MAX_NAME]}") from error
    found = []
    for key, value in form.multi_items():
        if not isinstance(value, UploadFile) or key != _KEY:
            field = one_line(key)[:_MAX_NAME]
            raise RefusedError(400, f"multipart: expected files named {_KEY}, got the field {field!r}")
        found.append(Upload(one_line(value.filename or key)[:_MAX_NAME], await value.read()))
    await form.close()
    return found


def _from_json(body: bytes, limits: Limits) -> list[Upload]:
    _check_structure(body, limits)
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"JSON: {one_line(str(error))[:_MAX_NAME]}") from error
    given = content.get(_KEY) if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(given, list):
        raise RefusedError(400, _FORM)
    found = []
    for place, item in enumerate(given):
        if not isinstance(item, str):
            raise RefusedError(400, f"images[{place}]: expected base64 text, got {type(item).__name__}")
        try:
            found.append(Upload(f"images[{place}]", base64.b64decode(item, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise RefusedError(400, f"images[{place}]: not base64 ({one_line(str(error))[:80]})") from error
    return found


def _check_structure(body: bytes, limits: Limits) -> None:
    """Check before parsing that a JSON body is a list of strings: 32 MiB of empty lists would take 20 times as much
    memory. Brackets and commas can be counted, because base64 contains none."""
    if body.count(b"[") + body.count(b"{") > 2:
        raise RefusedError(400, _FORM)
    if body.count(b",") >= limits.images:
        raise RefusedError(413, f"expected at most {limits.images} images, got {body.count(b',') + 1}")
