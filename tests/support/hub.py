"""A hub of models on this machine: what `huggingface_hub` asks for, answered from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

REPO = "lab/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub with one model.

    files: the model's folder.  token: what callers must know; "": nothing.  refuse: a status, and the error
    code of the hub's that comes with it; None: it answers.  asked: methods and paths, as they came.
    """

    files: Path
    token: str = ""
    refuse: tuple[int, str] | None = None
    address: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, sent: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path; sent: the header Authorization."""
        if self.refuse is not None:
            status, code = self.refuse
            return status, {"X-Error-Code": code, "X-Error-Message": "no"}, b"{}"
        if self.token and sent != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"}, b"{}"
        there = {file.name: file.read_bytes() for file in self.files.iterdir()}
        api = f"/api/models/{REPO}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return _json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in there]})
        if path == f"{api}/tree/{COMMIT}":
            return _json([
                {"type": "file", "path": name, "size": len(data), "oid": _sha(data)}
                for name, data in there.items()
            ])  # fmt: skip
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name in there:
            return 200, {"ETag": f'"{_sha(there[name])}"', "X-Repo-Commit": COMMIT}, there[name]
        return 404, {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"}, b"{}"


def _sha(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def hub_of(files: Path) -> Iterator[Hub]:
    """Serve a folder as a hub's one model, while the block runs."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
