"""Uploads in parts: nothing that arrived is sent again, nothing is stored twice or by halves."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

from simpletuner.errors import UserError
from simpletuner.server.uploads.reception import Reception

SESSIONS = "/api/datasets/upload/sessions"
CONTENT = bytes(range(1, 251)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcess]:
    running = InProcess(tmp_path, SIMPLETUNER_MAX_UPLOAD_BYTES="20000")
    (running.datasets / "set").mkdir()
    yield running
    running.close()


def begin(server: InProcess, content: bytes, **fields: Any) -> str:
    request = {"target_path": "set", "name": "a.txt", "bytes": len(content)} | fields
    answer = server.ask("POST", SESSIONS, json=request)
    assert answer.status_code == 201, answer.text
    assert answer.json()["offset"] == 0
    return f"{SESSIONS}/{answer.json()['upload_id']}"


def put(server: InProcess, upload: str, content: bytes, first: int, end: int) -> Any:
    headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
    return server.ask("PUT", upload, content=content[first:end], headers=headers)


def offset(server: InProcess, upload: str) -> int:
    answer = server.ask("HEAD", upload)
    assert (answer.status_code, answer.content) == (200, b"")
    return int(answer.headers["Upload-Offset"])


def staged(server: InProcess) -> list[str]:
    return [name for name in server.files() if name.startswith(".uploads/")]


def test_an_upload_goes_on_after_a_restart(server: InProcess, tmp_path: Path) -> None:
    upload = begin(server, CONTENT, sha256=sha256(CONTENT).hexdigest())
    assert put(server, upload, CONTENT, 0, 3000).json() == {"offset": 3000}
    again = InProcess(tmp_path)
    assert offset(again, upload) == 3000
    repeated = put(again, upload, CONTENT, 0, 3000)
    assert (repeated.status_code, repeated.json()["code"]) == (409, "offset_mismatch")
    assert "3000" in repeated.json()["hint"]
    assert put(again, upload, CONTENT, 3000, 3001).json() == {"offset": 3001}
    assert not (again.datasets / "set" / "a.txt").exists()
    last = put(again, upload, CONTENT, 3001, len(CONTENT))
    again.close()
    assert (last.status_code, last.json()["files_uploaded"]) == (200, 1)
    assert last.json()["suggested_dataset"]["instance_data_dir"] == str(server.datasets / "set")
    assert (server.datasets / "set" / "a.txt").read_bytes() == CONTENT
    assert staged(server) == []
    assert server.ask("HEAD", upload).status_code == 404


def test_an_archive_in_parts_is_unpacked(server: InProcess) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("sub/a.txt", b"red")
    content = file.getvalue()
    upload = begin(server, content, name="All.ZIP")
    assert put(server, upload, content, 0, 50).status_code == 200
    assert put(server, upload, content, 50, len(content)).json()["files_uploaded"] == 1
    assert (server.datasets / "set" / "sub" / "a.txt").read_bytes() == b"red"
    broken = begin(server, b"no zip", name="b.zip")
    answer = put(server, broken, b"no zip", 0, 6)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_archive")
    assert staged(server) == []


def test_wrong_bytes_are_not_stored(server: InProcess) -> None:
    upload = begin(server, CONTENT, sha256="0" * 64)
    answer = put(server, upload, CONTENT, 0, len(CONTENT))
    assert (answer.status_code, answer.json()["code"]) == (422, "nothing_stored")
    assert staged(server) == []
    assert list((server.datasets / "set").iterdir()) == []


def test_what_a_part_may_be(server: InProcess) -> None:
    upload = begin(server, CONTENT)
    size = len(CONTENT)
    for content_range in (None, "bytes 0-1", "bytes 5-2/10000", f"bytes 0-{size}/{size}", "bytes 0-1/9", "0-1/10000"):
        headers = {} if content_range is None else {"Content-Range": content_range}
        answer = server.ask("PUT", upload, content=b"ab", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field"), content_range
    assert offset(server, upload) == 0
    short = server.ask("PUT", upload, content=CONTENT[:10], headers={"Content-Range": f"bytes 0-19/{size}"})
    assert short.status_code == 422
    assert offset(server, upload) == 10
    long = server.ask("PUT", upload, content=CONTENT[10:40], headers={"Content-Range": f"bytes 10-19/{size}"})
    assert long.status_code == 422
    assert offset(server, upload) == 10
    asked = server.ask("PUT", upload, headers={"Content-Range": f"bytes */{size}"})
    assert asked.json() == {"offset": 10}


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"bytes": 20001}, 413, "body_too_large"),
        ({"bytes": -1}, 422, "invalid_field"),
        ({"name": "../a.txt"}, 400, "bad_path"),
        ({"name": "a.heic"}, 422, "nothing_stored"),
        ({"target_path": "nowhere"}, 404, "not_found"),
        ({"target_path": "/etc"}, 403, "path_outside_root"),
        ({"sha256": "abc"}, 422, "invalid_field"),
        ({"size": 1}, 422, "unknown_field"),
    ],
)
def test_an_upload_that_cannot_end_well_does_not_begin(
    server: InProcess, fields: dict[str, Any], status: int, code: str
) -> None:
    request = {"target_path": "set", "name": "a.txt", "bytes": 10} | fields
    answer = server.ask("POST", SESSIONS, json=request)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert staged(server) == []


def test_what_could_not_be_stored_can_be_asked_for_again(server: InProcess) -> None:
    upload = begin(server, CONTENT)
    (server.datasets / "set").rename(server.datasets / "moved")
    assert put(server, upload, CONTENT, 0, len(CONTENT)).status_code == 404
    (server.datasets / "moved").rename(server.datasets / "set")
    answer = server.ask("PUT", upload, headers={"Content-Range": f"bytes */{len(CONTENT)}"})
    assert (answer.status_code, answer.json()["files_uploaded"]) == (200, 1)


def test_one_writes_at_a_time_and_uploads_are_private(tmp_path: Path) -> None:
    (tmp_path / "datasets" / "set").mkdir(parents=True)
    reception = Reception(tmp_path / "datasets", tmp_path / "uploads", most_bytes=1000)
    session = reception.sessions.create("set", "a.txt", 3, None, "error", "anna")
    with pytest.raises(UserError, match="no upload"):
        reception.sessions.get(session.upload_id, "otto")
    dead = reception.sessions.open(session, 0)
    alive = reception.sessions.open(session, 0)
    alive.write(b"red")
    with pytest.raises(UserError) as refused:
        dead.write(b"x")
    assert refused.value.code == "in_flight"
    dead.close()
    alive.close()
    with reception.sessions.finishing(session), pytest.raises(UserError, match="being stored"):
        reception.store_session(session)
    results, target = reception.store_session(session)
    assert [result.status for result in results] == ["stored"]
    assert (target / "a.txt").read_bytes() == b"red"
