"""Which addresses are asked, and that the one that was checked is the one that is connected to."""

from __future__ import annotations

import asyncio
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from receiver import Receiver

from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.jobs.webhook_post import Outcome, Poster
from simpletuner.jobs.webhook_target import TargetRules

EVENT = {"type": "notification", "message": "hello"}


def send(url: str, *, rules: TargetRules | None = None, **more: Any) -> Outcome:
    endpoint = WebhookEndpoint.model_validate({"callback_url": url} | more)
    return asyncio.run(Poster(rules or TargetRules()).post(endpoint, EVENT, "id"))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("169.254.169.254", "metadata"),
        ("169.254.1.1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fd00:ec2::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("2002:a9fe:a9fe::", "metadata"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("255.255.255.255", "reserved"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("10.1.2.3", ""),
        ("fd12::1", ""),
        ("93.184.216.34", ""),
        ("2606:2800:220:1::1", ""),
    ],
)
def test_guard(address: str, reason: str) -> None:
    said = TargetRules().refusal(address, 80)
    assert said.startswith(reason)
    assert bool(said) is bool(reason)
    public = address in {"93.184.216.34", "2606:2800:220:1::1"}
    assert bool(TargetRules(allow_private=False).refusal(address, 80)) is not public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1"])
def test_the_servers_own_port_is_refused(host: str) -> None:
    with closing(Receiver()) as receiver:
        outcome = send(f"http://{host}:{receiver.port}/", rules=TargetRules(own_port=receiver.port))
        assert outcome.refused
        assert "own port" in str(outcome.error)
        assert receiver.posts == []


def test_private_targets_can_be_forbidden() -> None:
    with closing(Receiver()) as receiver:
        assert send(receiver.url).delivered
        outcome = send(receiver.url, rules=TargetRules(allow_private=False))
        assert (outcome.refused, len(receiver.posts)) == (True, 1)


def test_a_name_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile name server answers differently the second time."""
    answers = ["127.0.0.1", "169.254.169.254"]

    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        assert host == "rebind.test"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    with closing(Receiver()) as receiver, monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", resolve)
        url = f"http://rebind.test:{receiver.port}/hook?x=1"
        assert send(url).delivered
        assert answers == ["169.254.169.254"]
        assert send(url).refused
        [got] = receiver.posts
        assert (got.headers["Host"], got.path) == (f"rebind.test:{receiver.port}", "/hook?x=1")


def test_one_forbidden_address_forbids_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("127.0.0.1", "169.254.169.254")]
    with closing(Receiver()) as receiver, monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
        assert send(f"http://two.test:{receiver.port}/").refused
        assert receiver.posts == []


def test_the_second_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Receiver()) as receiver, monkeypatch.context() as patched:
        addresses = ("127.0.0.2", "127.0.0.1")
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, receiver.port)) for each in addresses]
        patched.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
        assert send(f"http://two.test:{receiver.port}/").delivered


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of `localhost` and nobody else."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    return key, cert


@pytest.fixture
def tls_port(certificate: tuple[Path, Path]) -> Iterator[int]:
    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_certificates_are_checked_against_the_name(
    tls_port: int, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named, numbered = f"https://localhost:{tls_port}/", f"https://127.0.0.1:{tls_port}/"
    assert "CERTIFICATE_VERIFY_FAILED" in str(send(named).error)
    assert send(named, ssl_no_verify=True).delivered
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    assert send(named).delivered
    assert "CERTIFICATE_VERIFY_FAILED" in str(send(numbered).error)
