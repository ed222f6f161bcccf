"""A server that speaks as much of the hub's protocol as an upload uses, and keeps what it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LARGE = (".safetensors", ".png")


class HubServer(ThreadingHTTPServer):
    """`failures`: statuses that the next commits are answered with; `before` is called ahead of each request;
    paths that begin with `refused` are forbidden."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.through_lfs: set[str] = set()
        self.keys: dict[str, str | None] = {}
        self.commits: list[str] = []
        self.failures: list[int] = []
        self.refused: str | None = None
        self.before: Callable[[str], None] = lambda path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted['organization']}/{wanted['name']}"
                self.repositories.setdefault(name, wanted)
                return 200, {"url": f"{self.url}/{name}"}
            case "POST", ["api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}
            case "POST", ["api", "models", _, _, "preupload", _]:
                rows = [{"path": row["path"], "shouldIgnore": False} for row in json.loads(body)["files"]]
                return 200, {"files": [row | {"uploadMode": _mode(row["path"])} for row in rows]}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"transfer": "basic", "objects": [self._place(row) for row in json.loads(body)["objects"]]}
            case "PUT", ["lfs", oid]:
                self.objects[oid] = body
                return (200, {}) if hashlib.sha256(body).hexdigest() == oid else (400, {})
            case "POST", ["api", "models", owner, name, "commit", _]:
                return self._commit(f"{owner}/{name}", body)
            case "POST", ["api", "models", _, _, "paths-info", _]:
                return 200, [self._facts(path) for path in parse_qs(body.decode())["paths"] if path in self.files]
            case _:
                return 404, {"error": "no such route"}

    def _place(self, row: dict[str, Any]) -> dict[str, Any]:
        place = {} if row["oid"] in self.objects else {"upload": {"href": f"{self.url}/lfs/{row['oid']}"}}
        return row | ({"actions": place} if place else {})

    def _commit(self, repository: str, body: bytes) -> tuple[int, Any]:
        if self.failures:
            return self.failures.pop(0), {"error": "not now"}
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                self.commits.append(value["summary"])
            elif row["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.files[value["path"]] = self.objects[value["oid"]]
                self.through_lfs.add(value["path"])
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/{oid}", "commitOid": oid}

    def _facts(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
        if path in self.through_lfs:
            row["lfs"] = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 128}
        return row


def _mode(path: str) -> str:
    return "lfs" if path.endswith(LARGE) else "regular"


class _Exchange(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path.replace(".git/", "/", 1)
        self.server.keys[path] = self.headers.get("Authorization")
        self.server.before(path)
        refused = self.server.refused is not None and path.startswith(self.server.refused)
        status, value = (403, {}) if refused else self.server.answer(self.command, path, body)
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_any

    def log_message(self, *_: Any) -> None:
        pass
