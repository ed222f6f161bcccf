"""Data over HTTP: folders, uploads of files, uploads in parts, what is in a folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from in_process import InProcess
from PIL import Image

UPLOAD = "/api/datasets/upload"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    running = InProcess(tmp_path_factory.mktemp("datasets"), SIMPLETUNER_MAX_UPLOAD_BYTES="300000")
    yield running
    running.close()


@pytest.fixture
def folder(server: InProcess, request: pytest.FixtureRequest) -> str:
    """A new one of this test, by its path."""
    name = request.node.name.replace("[", "-").replace("]", "")[:100]
    answer = server.ask("POST", "/api/datasets/folders", data={"parent_path": "", "folder_name": name})
    assert answer.status_code == 201, answer.text
    return answer.json()["path"]


def picture(colour: str = "red", size: tuple[int, int] = (48, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def upload(server: InProcess, target: str, *files: tuple[str, bytes], field: str = "files", **fields: str) -> Any:
    data = {"target_path": target, **fields}
    return server.ask("POST", UPLOAD, data=data, files=[(field, (name, content)) for name, content in files])


def test_a_folder_is_made_where_it_may_be(server: InProcess) -> None:
    made = server.ask("POST", "/api/datasets/folders", data={"parent_path": str(server.datasets), "folder_name": "one"})
    path = str(server.datasets / "one")
    assert (made.status_code, made.json()) == (201, {"success": True, "path": path, "name": "one", "error": None})
    assert (server.datasets / "one").is_dir()
    (server.datasets / "away").symlink_to("/tmp")
    (server.datasets / "file").write_text("")
    (server.datasets / ".hidden").mkdir()
    before = server.files()
    wrong = [".", "..", "", "a/b", "a\\b", ".hidden", *(f"a{sign}" for sign in '<>:"|?*'), "x" * 256, "a\nb", " a"]
    cases = [
        *({"parent_path": "", "folder_name": name, "code": "bad_path", "status": 400} for name in wrong),
        {"parent_path": "", "folder_name": "one", "code": "already_exists", "status": 409},
        {"parent_path": "", "folder_name": "ONE", "code": "already_exists", "status": 409},
        {"parent_path": "nowhere", "folder_name": "x", "code": "not_found", "status": 404},
        {"parent_path": "/etc", "folder_name": "x", "code": "path_outside_root", "status": 403},
        {"parent_path": "away", "folder_name": "x", "code": "path_outside_root", "status": 403},
        {"parent_path": "one/../one", "folder_name": "x", "code": "bad_path", "status": 400},
        {"parent_path": ".hidden", "folder_name": "x", "code": "bad_path", "status": 400},
        {"parent_path": "file", "folder_name": "x", "code": "bad_path", "status": 400},
    ]
    for case in cases:
        code, status = case.pop("code"), case.pop("status")
        answer = server.ask("POST", "/api/datasets/folders", json=case)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (case, answer.text)
    assert server.files() == before
    (server.datasets / "away").unlink()


@pytest.mark.parametrize("field", ["files", "files[]", "file"])
def test_files_are_stored_and_a_dataset_is_suggested(server: InProcess, folder: str, field: str) -> None:
    content = {"a.png": picture(), "a.txt": b"a red square", "sub/b.jpg": picture(kind="JPEG"), "m.jsonl": b"{}\n"}
    answer = upload(server, folder, *content.items(), field=field)
    body = answer.json()
    assert answer.status_code == 200, body
    assert (body["success"], body["files_uploaded"], body["files_skipped"], body["errors"]) == (True, 4, 0, 0)
    for name, data in content.items():
        assert (server.datasets / folder / name).read_bytes() == data
    assert {(row["name"], row["status"], row["bytes"]) for row in body["results"]} == {
        (name, "stored", len(data)) for name, data in content.items()
    }
    assert body["suggested_dataset"]["instance_data_dir"] == folder == body["target_path"]
    assert body["suggested_dataset"]["caption_strategy"] == "textfile"


def test_each_file_is_judged_by_itself(server: InProcess, folder: str) -> None:
    bad = {
        "photo.heic": "unsupported_type",
        "raw.nef": "unsupported_type",
        "run.sh": "unsupported_type",
        "no-extension": "unsupported_type",
        "set.zip": "unsupported_type",
        "fake.png": "disguised_file",
        "fake.txt": "disguised_file",
        "fake.mp4": "disguised_file",
        "fake.wav": "disguised_file",
        "fake.parquet": "disguised_file",
        "../up.png": "bad_path",
        "/root.png": "bad_path",
        "C:/x.png": "bad_path",
        "a\\b.png": "bad_path",
        "good.PNG": "already_exists",
        "x" * 252 + ".png": "bad_path",
    }
    good = [("good.png", picture()), (".DS_Store", b"x"), ("__MACOSX/good.png", b"x")]
    answer = upload(server, folder, *good, *((name, b"\x7fELF\0\0") for name in bad))
    body = answer.json()
    assert (answer.status_code, body["success"]) == (207, False)
    assert (body["files_uploaded"], body["files_skipped"], body["errors"]) == (1, 2, len(bad))
    found = {row["name"]: row["code"] for row in body["results"] if row["status"] == "error"}
    assert list(found.values()) == list(bad.values()), found
    assert all(row["reason"] for row in body["results"] if row["status"] != "stored")
    assert [path.name for path in (server.datasets / folder).iterdir()] == ["good.png"]


def test_names_that_are_taken(server: InProcess, folder: str) -> None:
    old, new = picture("red"), picture("blue")
    assert upload(server, folder, ("a.png", old)).status_code == 200
    again = upload(server, folder, ("a.png", old)).json()
    assert (again["files_uploaded"], again["errors"]) == (1, 0)
    refused = upload(server, folder, ("a.png", new))
    assert (refused.status_code, refused.json()["code"]) == (422, "nothing_stored")
    assert refused.json()["errors"][0]["code"] == "already_exists"
    skipped = upload(server, folder, ("a.png", new), on_conflict="skip")
    assert (skipped.status_code, skipped.json()["files_skipped"]) == (200, 1)
    assert (server.datasets / folder / "a.png").read_bytes() == old
    assert upload(server, folder, ("a.png", new), on_conflict="overwrite").status_code == 200
    assert (server.datasets / folder / "a.png").read_bytes() == new
    under_a_file = upload(server, folder, ("a.png/b.png", new), ("c.png", new), on_conflict="overwrite")
    assert under_a_file.status_code == 207
    assert (server.datasets / folder / "a.png").read_bytes() == new


def test_a_link_is_no_way_out(server: InProcess, folder: str, tmp_path: Any) -> None:
    (server.datasets / folder / "out").symlink_to(tmp_path)
    answer = upload(server, folder, ("out/a.png", picture()), ("b.png", picture()))
    rows = {row["name"]: row["code"] for row in answer.json()["results"]}
    assert rows == {"out/a.png": "path_outside_root", "b.png": None}
    assert list(tmp_path.iterdir()) == []
    through = upload(server, f"{folder}/out", ("a.png", picture()))
    assert (through.status_code, through.json()["code"]) == (403, "path_outside_root")


def test_a_request_that_is_refused_leaves_nothing(server: InProcess, folder: str) -> None:
    assert upload(server, folder, ("first.png", picture())).status_code == 200
    before = server.files()
    content = picture()
    good = ("files", ("a.png", content))
    target = {"target_path": folder}
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (404, "not_found", {"data": {"target_path": "nowhere"}, "files": [good]}),
        (403, "path_outside_root", {"data": {"target_path": "/etc"}, "files": [good]}),
        (400, "bad_path", {"data": {"target_path": "../x"}, "files": [good]}),
        (422, "invalid_field", {"files": [good]}),
        (422, "invalid_field", {"data": target | {"on_conflict": "replace"}, "files": [good]}),
        (422, "unknown_field", {"data": target | {"onconflict": "skip"}, "files": [good]}),
        (422, "unknown_field", {"data": target, "files": [("filez", ("a.png", content))]}),
        (422, "nothing_stored", {"data": target, "files": [("files", ("a.exe", b"MZ"))]}),
        (422, "nothing_stored", {"content": _form(folder), "headers": kind}),
        (413, "body_too_large", {"data": target, "files": [good, ("files", ("b.txt", b"x" * 400_000))]}),
        (415, "unsupported_media_type", {"json": target}),
        (422, "body_required", {"headers": kind}),
        (422, "invalid_field", {"content": form, "headers": kind}),
        (422, "invalid_field", {"content": b"nonsense", "headers": kind}),
    ]
    for status, code, request in cases:
        answer = server.ask("POST", UPLOAD, **request)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (request, answer.text)
    assert server.files() == before


def _form(folder: str) -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="target_path"\r\n\r\n{folder}\r\n--x--\r\n'.encode()
