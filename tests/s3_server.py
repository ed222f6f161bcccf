"""A real S3 server process (moto's), and a relay before it that can refuse."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>"


class S3Server:
    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        for _ in range(600):
            assert self._process.poll() is None, log.read_text()
            with socket.socket() as line:
                if line.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.05)
        self.client = client(self.url)
        self.client.create_bucket(Bucket="results")

    def objects(self, prefix: str) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket="results", Prefix=f"{prefix}/").get("Contents", [])
        return {row["Key"].removeprefix(f"{prefix}/"): self.read(row["Key"]) for row in found}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket="results", Key=key)["Body"].read()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def client(url: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


class Relay(ThreadingHTTPServer):
    """Passes requests on; `before` may answer one itself, with a status. `sent` counts the bytes of bodies."""

    daemon_threads = True

    def __init__(self, port: int, before: Callable[[str, str], int | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.port = port
        self.before = before
        self.sent = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Passing(BaseHTTPRequestHandler):
    server: Relay
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = self.server.before(self.command, self.path)
        if status is not None:
            self.send_response(status)
            content = DENIED if status == 403 else BUSY
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        line = http.client.HTTPConnection("127.0.0.1", self.server.port)
        line.request(self.command, self.path, body, dict(self.headers))
        answer = line.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        self.server.sent += len(content)
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def log_message(self, *_: Any) -> None:
        pass
