"""https with a certificate of the server's own, or a given one; what proxies may say of it."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from account_world import PASSWORD, AccountWorld
from control_world import SOURCE, free_port, until
from websockets.sync.client import connect

from simpletuner.errors import UserError
from simpletuner.server.accounts import Accounts
from simpletuner.server.certificate import RENEWED_BEFORE, prepare_certificate
from simpletuner.server.settings import ServerSettings

ADMIN = {"email": "admin@example.com", "username": "admin", "password": PASSWORD}
PROXIES = "10.1.0.0/16"


def start(workspace: Path, port: int, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "simpletuner.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    environ = dict(os.environ) | {"PYTHONPATH": str(SOURCE), "SIMPLETUNER_DEVICES": "cpu:1"}
    return subprocess.Popen([*command, *flags], env=environ, cwd=workspace, stderr=subprocess.PIPE, text=True)


def test_https_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    port = free_port()
    process = start(tmp_path, port, "--ssl")
    certificate = tmp_path / ".simpletuner" / "tls-cert.pem"
    try:
        until(certificate.exists)
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx2.Client(base_url=f"https://localhost:{port}", verify=trusted) as http:

            def is_up() -> bool:
                try:
                    return http.get("/health").status_code == 200
                except httpx2.TransportError:
                    return False

            until(is_up)
            made = http.post("/api/auth/setup/first-admin", json=ADMIN)
            assert made.status_code == 201
            assert "; Secure" in made.headers["set-cookie"]
            assert made.headers["Strict-Transport-Security"].startswith("max-age=")
            assert http.get("/api/auth/me").json()["username"] == "admin"
            cookie = made.headers["set-cookie"].partition(";")[0]
        url = f"wss://localhost:{port}/api/training/events/stream"
        with connect(url, ssl=trusted, additional_headers={"Cookie": cookie}) as socket:
            assert "hello" in str(socket.recv(timeout=5))
    finally:
        process.terminate()
        errors = process.communicate(timeout=20)[1]
    assert f"https://127.0.0.1:{port}" in errors
    assert (tmp_path / ".simpletuner" / "tls-key.pem").stat().st_mode & 0o777 == 0o600


def test_a_certificate_is_made_once_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certfile, keyfile = tmp_path / "cert.pem", tmp_path / "key.pem"
    prepare_certificate(certfile, keyfile)
    first = certfile.read_bytes()
    prepare_certificate(certfile, keyfile)
    assert certfile.read_bytes() == first
    monkeypatch.setattr("simpletuner.server.certificate.LASTS", RENEWED_BEFORE - timedelta(days=1))
    keyfile.unlink()
    prepare_certificate(certfile, keyfile)
    short = certfile.read_bytes()
    assert short != first
    prepare_certificate(certfile, keyfile)
    assert certfile.read_bytes() != short


def test_a_certificate_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    process = start(tmp_path, free_port(), "--ssl-certfile", "cert.pem")
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 64
    assert "cert.pem" in errors and "Traceback" not in errors
    with pytest.raises(UserError, match="without ssl_certfile"):
        ServerSettings.read({"ssl_keyfile": "key.pem"}, {}, tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("proxies"), trusted_proxies=PROXIES)
    built.add_users("admin")
    yield built
    built.close()


@pytest.mark.parametrize(
    ("peer", "headers", "is_secure", "asker"),
    [
        ("10.1.0.1", {}, False, "10.1.0.1"),
        ("10.1.0.1", {"X-Forwarded-Proto": "https"}, True, "10.1.0.1"),
        ("10.1.0.1", {"X-Forwarded-Proto": "http, https", "X-Forwarded-For": "1.2.3.4"}, True, "1.2.3.4"),
        ("10.1.0.1", {"X-Forwarded-Proto": "https, http"}, False, "10.1.0.1"),
        ("10.1.0.1", {"X-Forwarded-Proto": "gopher"}, False, "10.1.0.1"),
        ("10.1.0.1", {"X-Forwarded-For": "6.6.6.6, 1.2.3.4, 10.1.0.9"}, False, "1.2.3.4"),
        ("10.1.0.1", {"X-Forwarded-For": "1.2.3.4, nonsense"}, False, "10.1.0.1"),
        ("10.1.0.1", {"X-Real-IP": "1.2.3.4"}, False, "1.2.3.4"),
        ("10.1.0.1", {"Forwarded": "for=1.2.3.4;proto=https"}, False, "10.1.0.1"),
        ("10.2.0.1", {"X-Forwarded-Proto": "https", "X-Forwarded-For": "1.2.3.4"}, False, "10.2.0.1"),
        ("10.2.0.1", {"X-Real-IP": "1.2.3.4"}, False, "10.2.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "10.1.0.1"}, False, "127.0.0.1"),
    ],
)
def test_only_trusted_proxies_are_believed(
    world: AccountWorld, peer: str, headers: dict[str, str], is_secure: bool, asker: str
) -> None:
    login = {"username": "admin", "password": PASSWORD}
    answer = world.ask("POST", "/api/auth/login", json=login, headers=headers, peer=peer)
    assert answer.status_code == 200
    assert ("; Secure" in answer.headers["set-cookie"]) is is_secure
    assert ("Strict-Transport-Security" in answer.headers) is is_secure
    newest = world.ask("GET", "/api/audit?limit=1", by="admin").json()["entries"][0]
    assert (newest["action"], newest["peer"]) == ("auth.login", asker)


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Anything", "X-Real-IP", "Via"])
def test_no_proxy_gets_the_open_identity(tmp_path: Path, name: str) -> None:
    """Not even one that is trusted and says that it asks for this machine."""
    world = AccountWorld(tmp_path, trusted_proxies="127.0.0.1")
    try:
        assert world.ask("GET", "/api/jobs", peer="127.0.0.1").status_code == 200
        forged = world.ask("GET", "/api/jobs", peer="127.0.0.1", headers={name: "127.0.0.1"})
        assert forged.status_code == 401
    finally:
        world.close()


def test_the_setup_token_works_once(tmp_path: Path) -> None:
    world = AccountWorld(tmp_path)
    file = tmp_path / ".simpletuner" / "setup-token"
    url = "/api/auth/setup/first-admin"
    try:
        first, second = world.core.accounts.prepare_setup(), world.core.accounts.prepare_setup()
        assert first and second and first != second
        assert len(second) == 32 and file.read_text().strip() == second
        assert file.stat().st_mode & 0o777 == 0o600
        refused = [{}, {"X-Setup-Token": first}, {"X-Setup-Token": second[:-1]}, {"X-Setup-Token": ""}]
        for headers in refused:
            answer = world.ask("POST", url, json=ADMIN, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "setup_token_required"), headers
        assert world.ask("POST", url, json=ADMIN, headers={"X-Setup-Token": second}).status_code == 201
        assert not file.exists()
        again = world.ask("POST", url, json=ADMIN, headers={"X-Setup-Token": second})
        assert again.json()["code"] == "setup_done"
        assert not world.core.accounts.setup_token.matches(second)
        assert world.core.accounts.prepare_setup() is None
    finally:
        world.close()


def test_a_key_ends_with_its_time(world: AccountWorld) -> None:
    key = world.make_key("admin", expires_days=1)
    later = datetime.now(UTC) + timedelta(days=1, seconds=1)
    accounts = Accounts(world.core.store, world.core.settings.state_dir, clock=lambda: later)
    assert world.core.accounts.identify_key(key) is not None
    assert accounts.identify_key(key) is None
