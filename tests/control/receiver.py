"""A real HTTP receiver of webhooks on loopback."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Post:
    path: str
    headers: Message
    content: bytes
    status: int

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.content)

    def parts(self) -> dict[str, Message]:
        """Of a multipart body, by field name."""
        whole = message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + self.content)
        assert whole.is_multipart()
        return {str(part.get_param("name", header="content-disposition")): part for part in whole.get_payload()}


class Receiver:
    """Answers with the statuses of `script` in turn, then with 204. `hangs`: never answers while it is open."""

    def __init__(self, *script: int, hangs: bool = False, port: int = 0, headers: dict[str, str] | None = None) -> None:
        self.posts: list[Post] = []
        self._script = list(script)
        self._headers = headers or {}
        self._closed = threading.Event()
        receiver = self

        class Answering(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if hangs:
                    receiver._closed.wait()
                status = receiver._script.pop(0) if receiver._script else 204
                receiver.posts.append(Post(self.path, self.headers, content, status))
                self.send_response(status)
                for name, value in receiver._headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Answering)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def taken(self) -> list[Post]:
        """Those that were answered well."""
        return [post for post in self.posts if 200 <= post.status < 300]

    def types(self) -> list[str]:
        return [post.body["type"] for post in self.taken]

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
