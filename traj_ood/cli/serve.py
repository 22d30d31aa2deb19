"""``traj-ood serve``: serve a detector over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from traj_ood.cli.base import NAME, PATH, examples, main, set_up, shared
from traj_ood.cli.console import note
from traj_ood.errors import TrajOODError

_MIB = 2**20
_MAX_CONNECTIONS = 256


@main.command(
    epilog=examples(
        "traj-ood serve my.detector --port 8000 --log rows",
        "curl -F images=@a.jpg -F images=@b.png http://127.0.0.1:8000/v1/score",
        "curl -H 'Content-Type: image/jpeg' --data-binary @a.jpg http://127.0.0.1:8000/v1/score",
        "traj-ood monitor my.detector rows/DIGEST      # the digest is in every response",
    )
)
@click.argument("detector", type=NAME)
@click.option("--host", default="127.0.0.1", show_default=True, help="Use a proxy for TLS and authentication.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
@click.option("--log", type=PATH, help="Folder for a log of all decisions: names and numbers, no images.")
@click.option("--linger", type=float, default=5.0, show_default=True, help="Milliseconds an image waits for others.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images judged at a time.")
@click.option(
    "--queue", type=click.IntRange(1), default=512, show_default=True, help="Most images waiting; more get 429."
)
@click.option("--max-images", type=click.IntRange(1), default=64, show_default=True, help="Images in one request.")
@click.option("--max-body", type=click.IntRange(1), default=32, show_default=True, help="MiB of one request.")
@click.option("--max-bodies", type=click.IntRange(1), default=128, show_default=True, help="MiB of all requests.")
@click.option("--max-decoded", type=click.IntRange(1), default=1024, show_default=True, help="MiB of decoded images.")
@click.option(
    "--patience", type=float, default=30.0, show_default=True, help="Seconds for a request, and for its response."
)
@click.option(
    "--look", type=float, default=2.0, show_default=True, help="Seconds between checks for a new detector in DETECTOR."
)
@shared("device", "threads")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Threads that decode images.")
def serve(detector: str, host: str, port: int, log: Path | None, **options: Any) -> None:
    """Serve DETECTOR (a folder) over HTTP: POST /v1/score returns one decision per image.

    Images are sent as multipart files, as base64 in {"images": [...]}, or one as the body itself. GET /healthz, /readyz
    and /metrics are for monitoring, /docs describes the API. Requests that are too large get the status 413, too many
    at once 429; no image is stored. If DETECTOR is replaced by another sealed detector, that one is used from then on.
    After SIGTERM, accepted requests are completed before the service ends.
    """
    try:
        import uvicorn

        from traj_ood.serve import Limits, create_app
        from traj_ood.serve.connections import connections
        from traj_ood.serve.limits import BYTES_PER_PIXEL
    except ImportError as error:
        raise TrajOODError(f"serve needs FastAPI, uvicorn and more ({error}): pip install 'traj_ood[serve]'") from error

    set_up(options["threads"])
    limits = Limits(
        images=options["max_images"],
        body=options["max_body"] * _MIB,
        bodies=options["max_bodies"] * _MIB,
        pixels=options["max_decoded"] * _MIB // BYTES_PER_PIXEL,
        decoded=options["max_decoded"] * _MIB,
        queue=options["queue"],
        linger=options["linger"] / 1000,
        batch=options["batch"],
        patience=options["patience"],
    )
    app = create_app(
        detector,
        limits=limits,
        device=options["device"],
        log=log,
        decoders=options["workers"],
        look=options["look"],
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=connections(limits.patience),
        ws="none",
        log_level="warning",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(2 * limits.patience) + 1,  # to receive a request, and to answer it
        server_header=False,
    )
    server = uvicorn.Server(config)
    place = f"[{host}]" if ":" in host else host
    try:
        listening = config.bind_socket()
    except SystemExit:  # uvicorn has logged the system's reason
        raise TrajOODError(f"{place}:{port} cannot be listened on: choose another --port or --host") from None
    note(f"serving {detector} on http://{place}:{listening.getsockname()[1]}, see /docs for the API")
    server.run(sockets=[listening])
