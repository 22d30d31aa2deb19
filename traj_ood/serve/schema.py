"""The OpenAPI description of ``/v1/score``."""

from __future__ import annotations

from typing import Any

DESCRIPTION = (
    "Decides whether images are out of distribution: scores, conformal p-values, decisions and reasons of one traj_ood "
    "detector. No image is stored."
)
_TEXT: dict[str, Any] = {"type": "string"}
_NUMBER: dict[str, Any] = {"type": ["number", "null"]}
_DECISION: dict[str, Any] = {
    "type": "object",
    "required": ["name", "score", "p_value", "decision", "reason", "steps", "status", "error"],
    "properties": {
        "name": _TEXT,
        "score": {"type": ["number", "string", "null"], "description": "higher = more OOD; Infinity as a text"},
        "p_value": _NUMBER,
        "decision": {"type": ["string", "null"], "enum": ["id", "ood", None]},
        "reason": {"type": "string", "description": "ok, ood, invalid: …, or uncalibrated"},
        "steps": {"type": ["integer", "null"]},
        "status": _TEXT,
        "error": {"type": ["string", "null"]},
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["detector", "decisions"],
    "properties": {"detector": _TEXT, "decisions": {"type": "array", "items": _DECISION}},
}
_ERROR: dict[str, Any] = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _images(form: str, most: int) -> dict[str, Any]:
    items = {"type": "array", "items": {"type": "string", "format": form}, "minItems": 1, "maxItems": most}
    schema = {"type": "object", "required": ["images"], "properties": {"images": items}, "additionalProperties": False}
    return {"schema": schema}


_ROUTE: dict[str, Any] = {
    "summary": "Judge images",
    "response_model": None,
    "responses": {
        200: _json("One decision per image, in order.", _ANSWER),
        400: _json("The body cannot be read, or has no image.", _ERROR),
        408: _json("The body did not arrive in time.", _ERROR),
        413: _json("The body, an image, or their number is too large.", _ERROR),
        415: _json("Another content type.", _ERROR),
        429: _json("Too many requests: try again after Retry-After seconds.", _ERROR),
        503: _json("The detector failed.", _ERROR),
        504: _json("The detector did not answer in time.", _ERROR),
    },
}


def score_route(most: int) -> dict[str, Any]:
    """Keyword arguments of FastAPI's route, for at most ``most`` images in one request."""
    content = {
        "multipart/form-data": _images("binary", most),
        "application/json": _images("byte", most),
        "application/octet-stream": _BINARY,
        "image/jpeg": _BINARY,
        "image/png": _BINARY,
    }
    return {**_ROUTE, "openapi_extra": {"requestBody": {"required": True, "content": content}}}
