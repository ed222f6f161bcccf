"""The same laws for every storage of pictures, against real servers on loopback. training.md §3.2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from s3_server import S3Server
from simpletuner.config.dataset_options import ImageDataset
from simpletuner.data.download import Downloader, Refused
from simpletuner.data.ledger import dataset_report, ledger_row
from simpletuner.data.manifest import Manifest, discover
from simpletuner.data.media import read_size
from simpletuner.data.storage_s3 import S3Backend
from simpletuner.errors import ExitCode, UserError
from storage_worlds import CsvWorld, FileServer, HubFilesWorld, HubRowsWorld, LocalWorld, S3World, World, shard

NAMES = ("b.png", "a c.jpg", "é/ü &.png", "deep/er/d.webp", "Z.png")
CAPTIONS = {name: f"caption of {name}" for name in NAMES}
SERVED = ("aws", "csv", "hub-files", "hub-rows")
OWN = {"path", "caption_source", "revision"}
"""Columns of the ledger that say where a picture lies."""


def picture(seed: int, width: int = 96, height: int = 64, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = {
    name: picture(number, 96 - 8 * number, kind={".jpg": "JPEG", ".webp": "WEBP"}.get(Path(name).suffix, "PNG"))
    for number, name in enumerate(NAMES)
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    pytest.importorskip("boto3")
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.close()


@pytest.fixture(params=["local", *SERVED])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return build(request.param, request, tmp_path, monkeypatch)


def build(kind: str, request: pytest.FixtureRequest, root: Path, patch: pytest.MonkeyPatch) -> World:
    match kind:
        case "aws":
            patch.setenv("AWS_ACCESS_KEY_ID", "a")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
            return S3World(root, request.getfixturevalue("s3"))
        case "csv":
            return CsvWorld(root)
        case "hub-files":
            return HubFilesWorld(root, patch)
        case "hub-rows":
            return HubRowsWorld(root, patch)
        case _:
            return LocalWorld(root)


def scan(world: World, **keys: Any) -> Manifest:
    dataset = world.dataset(**keys)
    backend = world.backend(dataset)
    return discover(dataset, alignment=8, cache_dir=world.scans, backend=backend, pointer="/datasets/3")


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [ledger_row(manifest, row) for row in range(len(manifest))]


def elsewhere(manifest: Manifest) -> list[dict[str, Any]]:
    """The ledger without what depends on the place."""
    rows = [{key: value for key, value in row.items() if key not in OWN} for row in rows_of(manifest)]
    return sorted(rows, key=lambda row: row["content_hash"])


def test_files_are_listed_in_order_and_read_whole(world: World) -> None:
    world.put(PICTURES, CAPTIONS)
    backend = world.backend(world.dataset())
    listed = [file.path for file in backend.list()]
    assert listed == sorted(listed, key=os.fsencode)
    content_of = {world.path(name, PICTURES): content for name, content in PICTURES.items()}
    assert set(content_of) <= set(listed)
    assert {path: backend.read(path) for path in content_of} == content_of
    sizes = {file.path: file.num_bytes for file in backend.list()}
    for path, content in content_of.items():
        assert sizes[path] == len(content)
        with backend.open(path) as file:
            file.seek(-10, os.SEEK_END)
            assert file.read() == content[-10:]
            file.seek(3)
            assert file.read(5) == content[3:8]
            assert file.read() == content[8:]
    with pytest.raises(OSError):
        backend.read("nowhere.png")


def test_a_header_costs_a_small_part_of_a_file(world: World) -> None:
    large = picture(1, 1200, 800)
    world.put({"large.png": large}, {"large.png": "noise"})
    backend = world.backend(world.dataset())
    backend.list()
    sent_before = world.relay.sent if isinstance(world, S3World) else 0
    with backend.open(world.path("large.png", {"large.png": large})) as file:
        assert read_size(file) == (1200, 800)
    if isinstance(world, S3World):
        assert world.relay.sent - sent_before <= world.first_bytes < len(large) / 10
        world.fetched()
        assert backend.read("large.png") == large and len(world.fetched()) == 1
        with backend.open("large.png") as file:
            assert b"".join(iter(lambda: file.read(1 << 16), b"")) == large
        assert len(world.fetched()) < 12, "a file that is read on is fetched in ever larger parts"


def test_the_ledger_is_that_of_the_same_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    local = LocalWorld(tmp_path_factory.mktemp("local"))
    for place in (world, local):
        place.put(PICTURES, CAPTIONS)
    found = scan(world)
    assert elsewhere(found) == elsewhere(scan(local))
    assert [row["status"] for row in rows_of(found)] == ["kept"] * len(NAMES)
    if isinstance(world, HubFilesWorld):
        assert {row["revision"] for row in rows_of(found)} == {world.server.commit}
        assert dataset_report(found)["revision"] == world.server.commit


def test_a_second_scan_fetches_nothing_and_a_change_is_seen(world: World) -> None:
    world.put(PICTURES, CAPTIONS)
    first = scan(world)
    world.fetched()
    again = scan(world)
    assert (rows_of(again), world.fetched()) == (rows_of(first), [])
    changed = PICTURES | {"b.png": picture(99, 96)}
    world.put(changed, CAPTIONS | {"Z.png": "another caption"})
    after = {row["content_hash"]: row["caption"] for row in rows_of(scan(world))}
    before = {row["content_hash"]: row["caption"] for row in rows_of(first)}
    assert len(after.keys() - before.keys()) == len(before.keys() - after.keys()) == 1
    assert set(after.values()) - set(before.values()) == {"another caption"}


@pytest.mark.parametrize("world", SERVED, indirect=True)
def test_what_fails_for_a_moment_is_tried_again(world: World) -> None:
    world.put(PICTURES, CAPTIONS)
    world.fail(503, 500)
    assert len(scan(world).kept) == len(NAMES)
    assert 1.0 in world.waits


@pytest.mark.parametrize(("kind", "statuses", "code", "exit_code"), [
    ("aws", [503] * 3, "storage_unavailable", ExitCode.OUTSIDE),
    ("aws", [403], "storage_denied", ExitCode.OUTSIDE),
    ("hub-files", [503] * 30, "storage_unavailable", ExitCode.OUTSIDE),
    ("hub-rows", [403], "storage_denied", ExitCode.OUTSIDE),
])  # fmt: skip
def test_a_storage_that_refuses(
    kind: str, statuses: list[int], code: str, exit_code: ExitCode,
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    world = build(kind, request, tmp_path, monkeypatch)
    world.put(PICTURES, CAPTIONS)
    world.fail(*statuses)
    with pytest.raises(UserError) as caught:
        scan(world)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert "'set'" in caught.value.message and caught.value.hint


@pytest.mark.parametrize(("kind", "keys", "code", "words"), [
    ("aws", {"aws_bucket_name": "nowhere"}, "storage_missing", "`aws_bucket_name`"),
    ("aws", {"aws_endpoint_url": "http://127.0.0.1:9"}, "storage_unavailable", "`aws_endpoint_url`"),
    ("aws", {"aws_data_prefix": "elsewhere"}, None, ""),
    ("hub-rows", {"dataset_name": "me/nothing"}, "storage_missing", "HF_TOKEN"),
    ("hub-rows", {"revision": "old"}, "storage_missing", "`revision`"),
    ("hub-rows", {"split": "trian"}, "storage_missing", "Did you mean 'train'? Its splits are: test, train"),
    ("hub-rows", {"image_column": "imag"}, "caption_table_column", "Did you mean 'image'?"),
    ("hub-rows", {"image_column": "caption"}, "caption_table_column", "image_column"),
    ("hub-rows", {"caption_column": "text"}, "caption_table_column", "image, caption"),
    ("hub-files", {"caption_column": "text"}, "caption_table_column", "caption, file_name"),
    ("csv", {"csv_url_column": "URL"}, "caption_table_column", "url, caption"),
    ("csv", {"csv_file": "/nowhere.csv"}, "caption_table_unreadable", "`csv_file`"),
])  # fmt: skip
def test_a_key_that_names_nothing(
    kind: str, keys: dict[str, Any], code: str | None, words: str,
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    world = build(kind, request, tmp_path, monkeypatch)
    world.put(PICTURES, CAPTIONS)
    if code is None:
        assert scan(world, **keys).paths == []
        return
    with pytest.raises(UserError) as caught:
        scan(world, **keys)
    assert caught.value.pointer.startswith("/datasets/3")
    assert caught.value.code == code and words in f"{caught.value.message} {caught.value.hint}"


def test_an_object_that_is_replaced_after_it_was_listed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a picture's bytes under another's version."""
    world = build("aws", request, tmp_path, monkeypatch)
    world.put(PICTURES, CAPTIONS)
    backend = world.backend(world.dataset())
    backend.list()
    world.put({"b.png": PICTURES["Z.png"]}, {})
    with pytest.raises(OSError, match="changed or removed"):
        backend.read("b.png")


def test_keys_of_the_bucket_come_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    keys = {"aws_access_key_id": "{env:ST_ID}", "aws_secret_access_key": "{env:ST_KEY}"}
    dataset = ImageDataset(id="s", type="aws", aws_bucket_name="b", cache_dir_vae="v", **keys)
    monkeypatch.setenv("ST_ID", "id")
    monkeypatch.delenv("ST_KEY", raising=False)
    with pytest.raises(UserError) as caught:
        S3Backend(dataset)
    assert caught.value.code == "env_not_set"


def test_a_hub_that_is_away_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = HubRowsWorld(tmp_path, monkeypatch)
    world.put(PICTURES, CAPTIONS)
    first = rows_of(scan(world))
    world.server.shutdown()
    world.server.server_close()
    assert rows_of(scan(world)) == first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert rows_of(scan(world)) == first
    assert world.waits == []
    commit = first[0]["revision"]
    assert isinstance(commit, str)


def test_a_commit_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = HubRowsWorld(tmp_path, monkeypatch)
    world.put(PICTURES, CAPTIONS)
    commit = world.server.commit
    scan(world, revision=commit)
    asked = world.server.num_requests
    scan(world, revision=commit)
    assert world.server.num_requests == asked


def test_a_row_without_a_picture_is_in_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = HubRowsWorld(tmp_path, monkeypatch)
    pictures = PICTURES | {"a c.jpg": b""}
    world.put(pictures, CAPTIONS)
    rows = [row for row in rows_of(scan(world)) if row["status"] == "dropped"]
    assert [(row["reason"], row["detail"]) for row in rows] == [
        ("unreadable", f"{rows[0]['path']}: the cell of 'image' holds no picture")
    ]


def test_subsets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = HubRowsWorld(tmp_path, monkeypatch)
    for folder in ("en", "fr"):
        world.server.files[f"{folder}/train-00000-of-00001.parquet"] = shard(list(NAMES), PICTURES, CAPTIONS)
    with pytest.raises(UserError, match="several subsets"):
        scan(world)


def test_every_line_of_a_csv_is_in_the_ledger(tmp_path: Path) -> None:
    """What cannot be fetched is a dropped row with its reason; a repeated URL is a variant of its caption."""
    world = CsvWorld(tmp_path)
    world.put(PICTURES, CAPTIONS)
    server, host = world.server, world.server.url.removeprefix("http://")
    server.files |= {
        "/page.png": b"<html>",
        "/bare": PICTURES["b.png"],
        "/noise": b"noise",
        "/key.png": PICTURES["Z.png"],
    }
    server.kinds = {"/page.png": "text/html; charset=utf-8", "/noise": "application/octet-stream"}
    server.moved = {
        "/moved.png": "/b.png", "/round.png": "/round.png", "/cloud.png": "http://169.254.169.254/latest/meta-data",
    }  # fmt: skip
    world.write([
        (world.url("b.png"), "one"), (world.url("b.png"), "two"), (world.url("bare"), "three"),
        (world.url("moved.png"), "four"), (world.url("key.png") + "?token=secret", "five"),
        (world.url("page.png"), "x"), (world.url("noise"), "x"), (world.url("gone.png"), "x"),
        (world.url("round.png"), "x"), (world.url("cloud.png"), "x"), ("file:///etc/hostname", "x"),
        ("http://[fd00:ec2::254]/a.png", "x"), ("ftp://example.org/a.png", "x"), ("", "x"),
    ])  # fmt: skip
    found = rows_of(scan(world))
    kept = {row["path"]: (row["caption"], row["variants"]) for row in found if row["status"] == "kept"}
    key = next(path for path in kept if "key" in path)
    assert kept == {
        f"{host}/b.png": ("one", 2), f"{host}/bare.png": ("three", 1), f"{host}/moved.png": ("four", 1),
        key: ("five", 1),
    }  # fmt: skip
    assert "secret" not in str(found)
    lost = {row["path"].removeprefix(f"{host}/"): row["detail"].partition(": ")[2] for row in found if row["reason"]}
    assert {row["reason"] for row in found} == {None, "download_failed"}
    assert {path: words for path, words in lost.items() if not path.startswith("no-host")} == {
        "page.png": "it is text/html, no picture",
        "noise": "it is no picture",
        "gone.png": "the server answers 404",
        "round.png": "it is redirected more than 5 times",
        "cloud.png": "it leads to a metadata address",
        "[fd00:ec2::254]/a.png": "it leads to a metadata address",
        "example.org/a.png": "only http and https are fetched, not ftp",
    }
    assert sorted(words for path, words in lost.items() if path.startswith("no-host")) == [
        "a line has no URL", "only http and https are fetched, not file",
    ]  # fmt: skip
    assert world.waits == []


def test_a_download_has_a_largest_size(tmp_path: Path) -> None:
    server = FileServer()
    server.files = {"/a.png": bytes(5000), "/b.png": bytes(4000)}
    with Downloader(most_bytes=4000) as downloader:
        assert len(downloader.fetch(f"{server.url}/b.png")) == 4000
        with pytest.raises(Refused, match="larger"):
            downloader.fetch(f"{server.url}/a.png")
