"""Addresses over TLS, from a server that lists, redirects and trickles: what is not allowed is not asked for."""

from __future__ import annotations

import http.server
import io
import shutil
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny

from traj_ood.data.addresses import check_allowed
from traj_ood.data.records import Opening, Record, read_records
from traj_ood.errors import TrajOODError

fsspec = pytest.importorskip("fsspec", reason="needs traj_ood[sources]")
pytest.importorskip("aiohttp", reason="needs traj_ood[sources]")

FILES = [tiny.png(seed) for seed in range(10)]


@dataclass
class Server:
    """What it gives by path: a content, or an address to go to; and what it was asked."""

    files: dict[str, bytes | str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self, body: bool) -> None:
            server.asked.append(self.path)
            found = server.files.get(self.path)
            self.send_response(404 if found is None else 302 if isinstance(found, str) else 200)
            content = found if isinstance(found, bytes) else b""
            if isinstance(found, str):
                self.send_header("Location", found)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            if "trickle" not in self.path:
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content if body else b"")
                return
            self.send_header("Transfer-Encoding", "chunked")  # no length, and a few bytes at a time
            self.end_headers()
            for start in range(0, len(content) if body else 0, 50):
                part = content[start : start + 50]
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n" if body else b"")

    return Handler


def start(server: Server, context: ssl.SSLContext | None) -> http.server.ThreadingHTTPServer:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    if context is not None:
        made.socket = context.wrap_socket(made.socket, server_side=True)
    server.url = f"{'http' if context is None else 'https'}://localhost:{made.server_address[1]}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost that it signs itself, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder / "both.pem"


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    """Over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server()
    running = start(server, context)
    yield server
    running.shutdown()
    running.server_close()


@pytest.fixture
def inner() -> Iterator[Server]:
    """Plain HTTP, such as the metadata of a cloud is: nobody is to be led there."""
    server = Server({"/latest/token.png": FILES[9]})
    running = start(server, None)
    yield server
    running.shutdown()
    running.server_close()


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(cafile=str(certificate.with_name("cert.pem")))
    monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": context})


def records(server: Server, path: str, allow: str = "/in") -> list[Record]:
    return list(read_records(server.url + path, Opening(allow=(server.url + allow,))))


@pytest.mark.usefixtures("trusted")
def test_images_listings_and_shards_over_tls(server: Server) -> None:
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for i in range(5):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(FILES[i])
            archive.addfile(member, io.BytesIO(FILES[i]))
    server.files = {
        "/in/": b'<a href="0.png">0</a> <a href="1.png">1</a> <a href="notes.txt">n</a> <a href="../">up</a>',
        "/in/0.png": FILES[0],
        "/in/1.png": FILES[1],
        "/in/trickle.png": FILES[2],
        "/in/moved.png": "/in/0.png",
        "/in/shard.tar": shard.getvalue(),
        "/in/trickle.tar": shard.getvalue(),
    }
    assert [record.content for record in records(server, "/in/")] == FILES[:2]
    assert [record.key for record in records(server, "/in/")] == [f"{server.url}/in/{i}.png" for i in (0, 1)]
    for path, content in (("0", FILES[0]), ("trickle", FILES[2]), ("moved", FILES[0])):
        (one,) = records(server, f"/in/{path}.png")
        assert (one.content, one.error) == (content, "")
    for path in ("shard", "trickle"):  # a server that knows no ranges
        assert [record.content for record in records(server, f"/in/{path}.tar")] == FILES[:5]
    (gone,) = records(server, "/in/gone.png")
    assert gone.error.startswith("cannot be fetched (FileNotFoundError")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    "target", ["inner", "http://169.254.169.254/latest/", "/secret/9.png", "/in/%2e%2e/secret/9.png"]
)
def test_a_redirect_to_what_is_not_allowed_is_not_followed(server: Server, inner: Server, target: str) -> None:
    server.files = {
        "/in/away.png": f"{inner.url}/latest/token.png" if target == "inner" else target,
        "/in/away.tar": f"{inner.url}/latest/token.png" if target == "inner" else target,
        "/secret/9.png": FILES[9],
    }
    (one,) = records(server, "/in/away.png")
    assert one.content is None
    assert "not an allowed address" in one.error
    with pytest.raises(TrajOODError, match="not an allowed address"):
        records(server, "/in/away.tar")
    assert inner.asked == []
    assert set(server.asked) <= {"/in/away.png", "/in/away.tar"}


@pytest.mark.usefixtures("trusted")
def test_links_of_a_listing_that_lead_out_of_it_are_broken_records(server: Server, inner: Server) -> None:
    plain = server.url.replace("https", "http")
    listing = (
        f'<a href="0.png">0</a> <a href="../secret/9.png">9</a> <a href="%2e%2e/secret/8.png">8</a> {plain}/in/1.png'
    )
    server.files = {"/in/": listing.encode(), "/in/0.png": FILES[0], "/secret/9.png": FILES[9]}
    found = records(server, "/in/")
    assert [record.content for record in found if not record.error] == FILES[:1]
    assert len(found) > 1
    assert all("not an allowed address" in record.error for record in found if record.content is None)
    assert not any("secret" in path for path in server.asked)


def test_a_certificate_that_nobody_knows_is_refused(server: Server) -> None:
    server.files = {"/in/0.png": FILES[0]}
    (one,) = records(server, "/in/0.png")
    assert one.content is None
    assert "cannot be fetched" in one.error
    assert server.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "https://host/in/../out",
        "https://host/in/%2e%2e/out",
        "https://host/in/%2E./out",
        "https://host/inside",
        "https://host@evil/in/a.png",
        "https://host.evil/in/a.png",
        "http://host/in/a.png",
        "https://host/in/a.png::file:///etc/passwd",
        "simplecache::https://host/in/a.png",
        "file:///etc/passwd",
    ],
)
def test_what_only_looks_allowed(address: str) -> None:
    check_allowed("https://host/in/a.png", ("https://host/in",))
    with pytest.raises(TrajOODError, match=r"not an allowed address \(allowed: https://host/in\)"):
        check_allowed(address, ("https://host/in",))
