"""Data over HTTP: folders, uploads of files, uploads in parts, what is in a folder."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from PIL import Image

from simpletuner.config.dataset_options import MODELS, dataset_kind

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


def test_a_server_finds_what_a_dead_one_left(server: InProcess, folder: str) -> None:
    staging, target = server.datasets / ".uploads", server.datasets / folder
    staging.mkdir(exist_ok=True)
    for name in ("stage-decided", "stage-undecided", "stage-cut"):
        (staging / name).mkdir()
        (staging / name / "0").write_bytes(b"caption")
    moves = [["0", 7, str(target / "sub" / "a.txt")], ["1", 7, str(target / "moved-before.txt")]]
    (staging / "stage-decided" / "moves.jsonl").write_text("\n".join(json.dumps(move) for move in moves))
    (staging / "stage-cut" / "moves.jsonl").write_text(json.dumps(["0", 8, str(target / "short.txt")]))
    with server.core.reception.stage() as held:
        server.core.reception.recover()
        assert [path.name for path in staging.iterdir()] == [held.folder.name]
    assert [path.relative_to(target).as_posix() for path in target.rglob("*.txt")] == ["sub/a.txt"]


def test_a_folder_is_browsed_and_guessed(server: InProcess, folder: str) -> None:
    files = {
        "a.png": picture(size=(640, 640)),
        "a.txt": b"red",
        "b.png": picture("blue"),
        "sub/c.png": picture("green"),
    }
    assert upload(server, folder, *files.items()).status_code == 200
    (server.datasets / folder / ".hidden").mkdir()
    (server.datasets / folder / "notes.md").write_text("x")
    page = server.ask("GET", "/api/datasets/browse", params={"path": folder, "limit": 3})
    body = page.json()
    assert (page.headers["X-Total-Count"], body["total"], body["absolute_path"], body["parent"]) == ("5", 5, folder, "")
    assert [(row["name"], row["kind"]) for row in body["entries"]] == [
        ("sub", "folder"),
        ("a.png", "image"),
        ("a.txt", "text"),
    ]
    assert body["entries"][2]["bytes"] == 3
    rest = server.ask("GET", "/api/datasets/browse", params={"path": body["path"], "offset": 3}).json()
    assert [(row["name"], row["kind"]) for row in rest["entries"]] == [("b.png", "image"), ("notes.md", "other")]
    guess = server.ask("GET", "/api/datasets/detect", params={"path": body["path"]}).json()
    assert guess["counts"] == {"image": 3, "other": 1, "text": 1}
    assert guess["captioned"] == 1
    assert guess["sizes"] == {"48x32": 2, "640x640": 1}


def test_pairs_are_recognised_and_the_guess_is_valid(server: InProcess, folder: str) -> None:
    pairs = [
        (f"{part}/{name}.png", picture(colour))
        for part, colour in (("target", "red"), ("source", "blue"))
        for name in "ab"
    ]
    body = upload(server, folder, *pairs, ("target/a.txt", b"red"), ("target/b.txt", b"red")).json()
    assert body["suggested_dataset"]["instance_data_dir"] == f"{folder}/target"
    mates = body["suggested_conditioning"]
    assert body["suggested_dataset"]["conditioning_data"] == [mates[0]["id"]]
    assert mates[0]["instance_data_dir"] == f"{folder}/source"
    for entry in (body["suggested_dataset"], *mates):
        MODELS[dataset_kind(entry)].model_validate(entry)


def test_a_thumbnail_is_small_and_upright(server: InProcess, folder: str) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200), "red").save(file, "JPEG", exif=exif)
    upload(server, folder, ("a.jpg", file.getvalue()), ("a.txt", b"red"))
    answer = server.ask("GET", "/api/datasets/thumbnail", params={"path": f"{folder}/a.jpg", "size": 64})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == (32, 64)
    text = server.ask("GET", "/api/datasets/thumbnail", params={"path": f"{folder}/a.txt"})
    assert (text.status_code, text.json()["code"]) == (400, "bad_path")


def test_captions_are_read_and_written(server: InProcess, folder: str) -> None:
    upload(server, folder, ("a.png", picture()), ("a.txt", b"red"), ("sub/b.png", picture("blue")))
    name = folder.rpartition("/")[2]
    first = server.ask("GET", "/api/datasets/captions", params={"path": folder})
    assert first.json()["captions"] == {f"{name}/a.png": "red", f"{name}/sub/b.png": None}
    changes = {f"{name}/a.png": "red", f"{name}/sub/b.png": "ein größeres blaues Bild"}
    assert server.ask("PUT", "/api/datasets/captions", json=changes).json() == {"changed": 1}
    assert server.ask("GET", "/api/datasets/captions", params={"path": name}).json()["captions"] == changes
    one = server.ask("GET", "/api/datasets/captions", params={"path": f"{name}/a.png"}).json()
    assert one["captions"] == {f"{name}/a.png": "red"}
    before = server.files()
    wrong = [
        ({f"{name}/a.png": "x", f"{name}/none.png": "x"}, 404, "not_found"),
        ({f"{name}/a.png": "x", f"{name}/a.txt": "x"}, 400, "bad_path"),
        ({f"{name}/a.png": "x", "../a.png": "x"}, 400, "bad_path"),
        ({f"{name}/a.png": "x", "/etc/passwd": "x"}, 403, "path_outside_root"),
        ({f"{name}/a.png": "x" * 70_000}, 422, "invalid_field"),
        ({f"{name}/a.png": 1}, 422, "invalid_field"),
        ({}, 422, "invalid_field"),
    ]
    for changes, status, code in wrong:
        answer = server.ask("PUT", "/api/datasets/captions", json=changes)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert server.files() == before


def edit(server: InProcess, **change: Any) -> Any:
    return server.ask("PATCH", "/api/datasets/captions", json=change)


def test_one_change_to_many_captions(server: InProcess, folder: str) -> None:
    texts = {"a": "a red car\na fast car\n", "b": "ohwx, a bus", "c": ""}
    files = [(f"{name}.txt", text.encode()) for name, text in texts.items()]
    upload(server, folder, *files, *((f"{name}.png", picture()) for name in "abcd"))
    before = server.files()
    change = {"path": folder, "find": "car", "replace": "lorry", "prefix": "ohwx, ", "fill": "a car"}
    asked = edit(server, **change, dry_run=True).json()
    assert (asked["pictures"], asked["changed"], server.files()) == (4, 3, before)
    assert asked["examples"][0]["after"] == "ohwx, a red lorry\nohwx, a fast lorry\n"
    assert edit(server, **change).json()["changed"] == 3
    assert edit(server, **change).json()["changed"] == 0, "the same change twice is one"
    found = [server.files()[f"{folder.rpartition('/')[2]}/{name}.txt"].decode() for name in "abcd"]
    assert found == ["ohwx, a red lorry\nohwx, a fast lorry\n", "ohwx, a bus", "ohwx, a lorry", "ohwx, a lorry"]


def test_what_an_edit_of_captions_refuses(server: InProcess, folder: str) -> None:
    upload(server, folder, ("a.png", picture()), ("a.txt", b"caf\xe9"), ("b.png", picture()), ("b.txt", b"b"))
    before = server.files()
    for change in ({"path": folder}, {"path": folder, "prefix": "x"}, {"path": folder, "prefixx": "x"}):
        assert edit(server, **change).json()["code"] in {"invalid_field", "unknown_field"}
    assert edit(server, path=f"{folder}/none", prefix="x").json()["code"] == "not_found"
    assert edit(server, path="/etc", prefix="x").json()["code"] == "path_outside_root"
    assert server.files() == before


def test_deleted_files_go_to_the_trash(server: InProcess, folder: str, tmp_path: Any) -> None:
    content = picture()
    upload(server, folder, ("a.png", content), ("b.png", content), ("sub/c.png", content))
    (server.datasets / folder / "out").symlink_to(tmp_path)
    refused = server.ask("DELETE", "/api/datasets/files", params={"path": [f"{folder}/a.png", f"{folder}/none.png"]})
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    names = [f"{folder}/{name}" for name in ("a.png", "sub", "sub/c.png", "out")]
    answer = server.ask("DELETE", "/api/datasets/files", params={"path": names})
    trash = Path(answer.json()["trash_path"]) / Path(folder).name
    assert (trash / "a.png").read_bytes() == (trash / "sub" / "c.png").read_bytes() == content
    assert tmp_path.is_dir()
    assert [path.name for path in (server.datasets / folder).iterdir()] == ["b.png"]
    for path, status in ((str(server.datasets), 403), ("", 400), (".", 400), (".trash", 400), ("/etc/passwd", 403)):
        assert server.ask("DELETE", "/api/datasets/files", params={"path": path}).status_code == status, path
    assert server.ask("DELETE", "/api/datasets/files").status_code == 422


def test_no_route_shows_what_is_outside(server: InProcess, folder: str) -> None:
    (server.datasets / folder / "passwd").symlink_to("/etc/passwd")
    (server.datasets / folder / "etc").symlink_to("/etc")
    for route in ("browse", "detect", "thumbnail", "captions"):
        for path, status in (
            ("/etc/passwd", 403),
            ("/etc", 403),
            (f"{folder}/passwd", 403),
            (f"{folder}/etc/passwd", 403),
            ("..", 400),
            ("nowhere", 404),
            (".trash/x", 400),
        ):
            answer = server.ask("GET", f"/api/datasets/{route}", params={"path": path})
            assert answer.status_code == status, (route, path, answer.text)


def test_what_has_no_room_is_refused_before_it_comes(tmp_path: Path) -> None:
    huge = 2**59
    server = InProcess(tmp_path, SIMPLETUNER_MAX_UPLOAD_BYTES=str(2 * huge))
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(huge)}
    for path in (UPLOAD, f"{UPLOAD}/zip"):
        answer = server.ask("POST", path, content=b"x", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    request = {"target_path": "", "name": "a.txt", "bytes": huge}
    assert server.ask("POST", f"{UPLOAD}/sessions", json=request).status_code == 507
    assert list(server.files()) in ([], [".uploads"])
    server.close()
