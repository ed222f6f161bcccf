"""Zip archives: what is in one is believed only once it was looked at."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from PIL import Image

from simpletuner.errors import UserError
from simpletuner.server.uploads.archive import ArchiveLimits
from simpletuner.server.uploads.reception import Reception

ZIP = "/api/datasets/upload/zip"
Build = Callable[[zipfile.ZipFile], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    running = InProcess(tmp_path_factory.mktemp("archives"))
    (running.datasets / "set").mkdir()
    assert send(running, named("first.txt")).status_code == 200
    yield running
    running.close()


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    return file.getvalue()


def pack(build: Build) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        build(opened)
    return file.getvalue()


def named(*names: str, content: bytes = b"text") -> bytes:
    return pack(lambda opened: [opened.writestr(name, content) for name in names])


def special(name: str, mode: int) -> bytes:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = mode << 16
    return pack(lambda opened: opened.writestr(entry, b"/etc/passwd"))


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def flagged(content: bytes, flag: int) -> bytes:
    """Sets a flag of the only entry, in both its headers."""
    data = bytearray(content)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.index(signature) + at
        struct.pack_into("<H", data, start, struct.unpack_from("<H", data, start)[0] | flag)
    return bytes(data)


def lying(num_bytes: int, actual: bytes) -> bytes:
    """The only entry says `num_bytes`, in both its headers, and unpacks to `actual`."""
    data = bytearray(named("a.txt", content=actual))
    struct.pack_into("<L", data, data.index(b"PK\x03\x04") + 22, num_bytes)
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, num_bytes)
    return bytes(data)


def noise(num_bytes: int) -> bytes:
    return bytes((index * index + index // 7) % 251 + 1 for index in range(num_bytes))


UNSAFE = {
    "traversal": named("../up.txt"),
    "traversal inside": named("a/../../up.txt"),
    "absolute": named("/up.txt"),
    "drive": named("C:/up.txt"),
    "backslash": patched(named("a#b.txt"), b"a#b.txt", b"a\\b.txt"),
    "backslash traversal": patched(named("..#up.txt"), b"..#up.txt", b"..\\up.txt"),
    "hidden traversal": named("__MACOSX/../../up.txt"),
    "nul": patched(named("a#b.txt"), b"a#b.txt", b"a\0b.txt"),
    "control character": named("a\nb.txt"),
    "double slash": named("a//b.txt"),
    "link": special("link.txt", stat.S_IFLNK | 0o777),
    "pipe": special("pipe.txt", stat.S_IFIFO | 0o644),
    "device": special("device.txt", stat.S_IFBLK | 0o644),
    "encrypted": flagged(named("a.txt"), 0x1),
    "strongly encrypted": flagged(named("a.txt"), 0x40),
    "nested": named("a.txt", "inner.zip"),
    "nested tar": named("inner.tar.gz"),
    "twice": pack(lambda opened: [opened.writestr("a.txt", b"1"), opened.writestr("b.txt", b"2")]).replace(
        b"b.txt", b"a.txt"
    ),
    "case": named("a.txt", "A.TXT"),
    "folder case": named("A/a.txt", "a/b.txt"),
    "unicode forms": named("\u00e9.txt", "e\u0301.txt"),
    "file and folder": named("a.txt", "a.txt/b.txt"),
    "long name": named("x" * 252 + ".txt"),
    "bomb": named("a.txt", content=b" " * 3_000_000),
    "lying, too small": lying(4, noise(2000)),
    "lying, too large": lying(5000, noise(2000)),
    "damaged": patched(named("a.txt", content=b"q" * 5), b"PK\x03\x04", b"PK\x03\x05"),
    "cut": named("a.txt")[:-30],
    "no zip": b"this is no archive at all, but long enough to look like one",
    "empty": b"",
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_archive_is_refused_whole(server: InProcess, case: str) -> None:
    before, outside = server.files(), sorted(server.datasets.parent.rglob("*.txt"))
    answer = send(server, UNSAFE[case])
    body = answer.json()
    assert (answer.status_code, body["code"]) == (400, "bad_archive"), body
    assert body["detail"]
    assert server.files() == before
    assert sorted(server.datasets.parent.rglob("*.txt")) == outside


def test_what_is_refused_is_named(server: InProcess) -> None:
    for case, name in (("traversal", "../up.txt"), ("link", "link.txt"), ("nested", "inner.zip"), ("case", "A.TXT")):
        assert name in send(server, UNSAFE[case]).json()["detail"]


def test_folders_are_kept_and_leftovers_of_file_managers_counted(server: InProcess) -> None:
    (server.datasets / "good").mkdir()
    content = picture()
    archive = pack(
        lambda opened: [
            opened.writestr("train/", b""),
            opened.writestr("train/a.png", content),
            opened.writestr("train/a.txt", "größer"),
            opened.writestr("train/ä/b.png", content),
            opened.writestr("__MACOSX/train/._a.png", b"x"),
            opened.writestr("train/.DS_Store", b"x"),
            opened.writestr("Thumbs.db", b"x"),
            opened.writestr("photo.heic", b"x"),
            opened.writestr("fake.png", b"x"),
        ]
    )
    answer = send(server, archive, target="good")
    body = answer.json()
    assert answer.status_code == 207
    assert (body["files_uploaded"], body["files_skipped"], body["errors"]) == (3, 3, 2)
    refused = {row["name"]: row["code"] for row in body["results"] if row["status"] == "error"}
    assert refused == {"photo.heic": "unsupported_type", "fake.png": "disguised_file"}
    root = server.datasets / "good"
    assert {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == {
        "train/a.png",
        "train/a.txt",
        "train/ä/b.png",
    }
    assert (root / "train/ä/b.png").read_bytes() == content


def test_one_archive_a_request(server: InProcess) -> None:
    files = [("file", ("a.zip", named("a.txt"))), ("file", ("b.zip", named("b.txt")))]
    answer = server.ask("POST", ZIP, data={"target_path": "set"}, files=files)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
    wrong = server.ask("POST", ZIP, data={"target_path": "set"}, files=[("files", ("a.zip", b""))])
    assert (wrong.status_code, wrong.json()["code"]) == (422, "unknown_field")
    form = b'--x\r\nContent-Disposition: form-data; name="target_path"\r\n\r\nset\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    none = server.ask("POST", ZIP, content=form, headers=kind)
    assert (none.status_code, none.json()["code"]) == (422, "nothing_stored")


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (ArchiveLimits(num_entries=2), ("a.txt", "b.txt", "c.txt")),
        (ArchiveLimits(entry_bytes=3), ("a.txt",)),
        (ArchiveLimits(total_bytes=7), ("a.txt", "b.txt")),
    ],
)
def test_limits_are_kept(tmp_path: Path, limits: ArchiveLimits, names: tuple[str, ...]) -> None:
    target = tmp_path / "datasets" / "set"
    target.mkdir(parents=True)
    archive = tmp_path / "archive.zip"
    archive.write_bytes(named(*names))
    tight = Reception(target.parent, tmp_path / "uploads", most_bytes=1000, limits=limits)
    with pytest.raises(UserError, match=r"more than") as refused:
        tight.store_archive(archive, target, "error")
    assert refused.value.code == "bad_archive"
    assert list(target.iterdir()) == []
    roomy = Reception(target.parent, tmp_path / "uploads", most_bytes=1000)
    assert [result.status for result in roomy.store_archive(archive, target, "error")] == ["stored"] * len(names)


def send(server: InProcess, archive: bytes, *, target: str = "set") -> Any:
    files = {"file": ("archive.zip", archive)}
    return server.ask("POST", ZIP, data={"target_path": target}, files=files)
