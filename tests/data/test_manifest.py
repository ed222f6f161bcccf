"""From a folder to its ledger: discovery, captions, defects. training.md §3.2, §3.5, §3.9."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_pictures import image_set, manifest_of, paint
from PIL import Image, ImageFile

from simpletuner.data.captions import choose_caption
from simpletuner.data.geometry import DropReason
from simpletuner.data.ledger import check_defects, dataset_report, ledger_row, write_ledger
from simpletuner.data.manifest import Manifest, discover
from simpletuner.data.storage import LocalBackend
from simpletuner.errors import UserError


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a scan must not decode or open this")


def texts(manifest: Manifest) -> dict[str, list[str]]:
    return {
        path: [manifest.captions.texts[place] for place in manifest.captions.of(row)]
        for row, path in enumerate(manifest.paths)
    }


def test_files_found(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("b.PNG", "a.JpEg", "deep/er/c.webp", ".hidden/d.png", "B.bmp", "é.gif"):
        paint(root / name)
    (root / "notes.md").write_text("not a picture")
    (tmp_path / "elsewhere").mkdir()
    paint(tmp_path / "elsewhere" / "e.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "deep" / "loop").symlink_to(root)
    assert manifest_of(root).paths == ["B.bmp", "a.JpEg", "b.PNG", "deep/er/c.webp", "link/e.png", "é.gif"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        manifest_of(tmp_path / "nowhere")
    assert (caught.value.code, caught.value.exit_code) == ("dataset_folder_missing", 65)


def test_scan_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, extension in enumerate(("png", "jpg", "webp", "tiff", "gif", "bmp")):
        paint(tmp_path / "in" / f"{number}.{extension}", 120, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png", "turned.webp", "turned.tiff"):
        paint(tmp_path / "in" / name, 120, 80, exif=exif)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(Image, "_getdecoder", refuse)
    manifest = manifest_of(tmp_path / "in")
    sizes = dict(zip(manifest.paths, manifest.geometry[:, :2].tolist(), strict=True))
    assert {tuple(size) for path, size in sizes.items() if "turned" not in path} == {(120, 80)}
    assert {tuple(size) for path, size in sizes.items() if "turned" in path} == {(80, 120)}


def test_unchanged_files_are_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "in"
    for number in range(5):
        paint(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"caption {number}")
    first = manifest_of(root, caption_strategy="textfile")
    opened: list[str] = []
    real_open, real_read = LocalBackend.open, LocalBackend.read
    monkeypatch.setattr(LocalBackend, "open", lambda self, path: (opened.append(path), real_open(self, path))[1])  # pyright: ignore
    monkeypatch.setattr(LocalBackend, "read", lambda self, path: (opened.append(path), real_read(self, path))[1])  # pyright: ignore
    again = manifest_of(root, caption_strategy="textfile")
    assert opened == []
    assert [ledger_row(again, row) for row in range(5)] == [ledger_row(first, row) for row in range(5)]
    paint(root / "3.png", 200, 200)
    (root / "1.txt").write_text("another caption")
    changed = manifest_of(root, caption_strategy="textfile")
    assert sorted(opened) == ["1.txt", "3.png", "3.png"]
    assert texts(changed)["1.png"] == ["another caption"]
    assert changed.content(3) != first.content(3)
    (next((tmp_path / "vae").glob("scan-*.json"))).write_text('["scan-3", ["torn')
    assert manifest_of(root, caption_strategy="textfile").paths == first.paths


def test_ledger_has_a_row_per_file(tmp_path: Path) -> None:
    root = tmp_path / "in"
    paint(root / "a b_c.png")
    paint(root / "sub" / "small.png", 30, 30)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    (root / "gone.png").symlink_to(root / "nowhere")
    manifest = manifest_of(root, minimum_image_size=40)
    write_ledger(manifest, tmp_path / "ledger-set.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "ledger-set.jsonl").read_text().splitlines()]
    assert [(row["path"], row["status"], row["reason"]) for row in rows] == [
        ("a b_c.png", "kept", None),
        ("broken.jpg", "dropped", "unreadable"),
        ("gone.png", "dropped", "unreadable"),
        ("sub/small.png", "dropped", "too_small"),
    ]
    kept = rows[0]
    assert kept["caption"] == "a b c" and kept["caption_source"] == "filename" and kept["variants"] == 1
    assert (kept["source"], kept["resized"], kept["target"]) == ([96, 64], [96, 64], [64, 64])
    assert kept["bucket"] == "1.0 (64x64)" and kept["upscale"] == 1.0 and kept["stretch"] == 1.0
    assert kept["bytes"] == (root / "a b_c.png").stat().st_size and len(kept["content_hash"]) == 64
    assert rows[3]["source"] == [30, 30] and rows[3]["target"] is None
    report = dataset_report(manifest)
    assert report["found"] == 4 and report["kept"] == 1 and report["buckets"] == {"1.0 (64x64)": 1}
    assert report["dropped"] == {"too_small": 1, "unreadable": 2}


def test_subset_is_fixed_and_of_usable_pictures(tmp_path: Path) -> None:
    for number in range(20):
        paint(tmp_path / "in" / f"{number}.png", 20 if number % 4 == 0 else 96)
    manifest = manifest_of(tmp_path / "in", minimum_image_size=30, max_num_samples=7)
    assert len(manifest.kept) == 7
    assert dataset_report(manifest)["dropped"] == {"not_in_subset": 8, "too_small": 5}
    (tmp_path / "in").rename(tmp_path / "moved")
    assert (
        manifest_of(tmp_path / "moved", minimum_image_size=30, max_num_samples=7).kept.tolist()
        == manifest.kept.tolist()
    )


CAPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"caption_strategy": "filename"}, ["a cat"]),
    ({"caption_strategy": "textfile"}, ["one", "two"]),
    ({"caption_strategy": "textfile", "disable_multiline_split": True}, ["one\n\n two"]),
    ({"caption_strategy": "instanceprompt", "instance_prompt": "sks"}, ["sks"]),
    ({"caption_strategy": "instance_prompt", "instance_prompt": ["x", "y"]}, ["x", "y"]),
    (
        {"caption_strategy": "textfile", "instance_prompt": "sks", "prepend_instance_prompt": True},
        ["sks one", "sks two"],
    ),
    ({"caption_strategy": "textfile", "instance_prompt": "sks", "only_instance_prompt": True}, ["sks"]),
]


@pytest.mark.parametrize(("keys", "expected"), CAPTIONS)
def test_captions(tmp_path: Path, keys: dict[str, Any], expected: list[str]) -> None:
    paint(tmp_path / "in" / "a_cat.png")
    (tmp_path / "in" / "a_cat.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two\r\n".replace(b"\r", b""))
    assert texts(manifest_of(tmp_path / "in", **keys))["a_cat.png"] == expected


def test_instance_prompt_must_be_given(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="instance_prompt"):
        manifest_of(tmp_path / "in", caption_strategy="instanceprompt")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("name", "write"), [("t.parquet", write_parquet), ("t.jsonl", write_json_lines)])
def test_table(tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
    root = tmp_path / "in"
    for stem in ("a", "b", "sub/c"):
        paint(root / f"{stem}.png")
    rows = [
        {"filename": "a", "caption": ["x", "y"], "alt": "", "w": 96, "h": 64},
        {"filename": "b", "caption": [], "alt": "spare", "w": 96, "h": 64},
        {"filename": "c", "caption": ["z"], "alt": None, "w": None, "h": None},
    ]
    write(root / name, rows)
    columns = {"path": name, "fallback_caption_column": "alt", "width_column": "w", "height_column": "h"}
    keys: dict[str, Any] = {"caption_strategy": "parquet", "metadata_backend": "parquet", "parquet": columns}
    manifest = manifest_of(root, **keys)
    assert texts(manifest) == {"a.png": ["x", "y"], "b.png": ["spare"], "sub/c.png": ["z"]}
    assert manifest.geometry[:, :2].tolist() == [[96, 64]] * 3
    with pytest.raises(UserError) as caught:
        manifest_of(root, caption_strategy="parquet", parquet={"path": name, "caption_column": "wrong"})
    assert caught.value.code == "caption_table_column" and "alt" in caught.value.hint
    with pytest.raises(UserError, match="cannot be read"):
        manifest_of(root, caption_strategy="parquet", parquet={"path": "none.parquet"})


def test_caption_of_a_visit() -> None:
    visits = [choose_caption(3, 0.25, seed=5, sample="set/a.png", visit=visit) for visit in range(4000)]
    assert visits == [choose_caption(3, 0.25, seed=5, sample="set/a.png", visit=visit) for visit in range(4000)]
    assert abs(sum(visit.is_dropped for visit in visits) / 4000 - 0.25) < 0.03
    assert all(abs(sum(visit.variant == n for visit in visits) / 4000 - 1 / 3) < 0.03 for n in range(3))
    assert not any(choose_caption(1, 0.0, seed=5, sample="s", visit=visit).is_dropped for visit in range(99))
    assert all(choose_caption(1, 1.0, seed=5, sample="s", visit=visit).is_dropped for visit in range(99))


def defects(manifest: Manifest, **keys: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        check_defects([manifest], **keys)
    assert caught.value.exit_code == 65
    return caught.value


def test_missing_captions_stop_the_run(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for stem in ("good", "other", "latin", "blank"):
        paint(root / f"{stem}.png")
    (root / "good.txt").write_text("fine")
    (root / "other.caption").write_text("in the wrong file")
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "blank.txt").write_text("\n \n")
    manifest = manifest_of(root, caption_strategy="textfile")
    error = defects(manifest)
    assert error.code == "data_defects"
    told = " ".join(problem.message for problem in error.problems)
    assert "rename other.caption to other.txt" in told
    assert "latin.txt is not UTF-8 (byte 3)" in told
    assert "blank.txt is empty" in told
    warnings = check_defects([manifest], ignore_missing_files=True)
    assert {problem.code for problem in warnings} == {"caption_missing", "caption_unreadable"}


def test_a_dataset_that_keeps_nothing(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    assert "no picture" in defects(manifest_of(root)).message
    paint(root / "a.png")
    (root / "a.caption").write_text("x")
    error = defects(manifest_of(root, caption_strategy="textfile"), ignore_missing_files=True)
    assert error.code == "dataset_empty" and "a.caption" in error.message
    error = defects(manifest_of(root, minimum_image_size=4000))
    assert "1 × too_small" in error.message and "minimum_image_size" in error.hint


@pytest.mark.parametrize(("broken", "stops"), [(1, False), (2, True)])
def test_one_percent_may_be_unreadable(tmp_path: Path, broken: int, stops: bool) -> None:
    first = paint(tmp_path / "in" / "000.png")
    for number in range(1, 100):
        os.link(first, tmp_path / "in" / f"{number:03}.png")
    for number in range(broken):
        (tmp_path / "in" / f"{number + 50:03}.png").unlink()
        (tmp_path / "in" / f"{number + 50:03}.png").write_bytes(b"nothing")
    manifest = manifest_of(tmp_path / "in")
    if stops:
        assert len(defects(manifest).problems) == 2
    else:
        assert [problem.code for problem in check_defects([manifest])] == ["unreadable"]


def test_stretch_beyond_ten_percent_warns(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "a.png", 300, 100)
    warnings = check_defects([manifest_of(tmp_path / "in", crop=False, alignment=64)])
    assert [problem.code for problem in warnings] == ["stretched"]


def test_tokens_are_counted_once_per_caption(tmp_path: Path) -> None:
    for name in ("one_two.png", "one_two.jpg", "a_b_c_d.png"):
        paint(tmp_path / "in" / name)
    asked: list[str] = []

    def tokenizer(captions: Any) -> list[tuple[int, bool]]:
        asked.extend(captions)
        return [(min(3, len(caption.split())), len(caption.split()) > 3) for caption in captions]

    manifest = discover(image_set(tmp_path / "in"), alignment=8, cache_dir=tmp_path / "c", tokenizer=tokenizer)
    assert sorted(asked) == ["a b c d", "one two"]
    rows = [ledger_row(manifest, row) for row in range(3)]
    assert [(row["tokens"], row["truncated"]) for row in rows] == [(3, True), (2, False), (2, False)]
    assert dataset_report(manifest)["truncated"] == 1


def test_rows_found_broken_later(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        paint(tmp_path / "in" / name)
    manifest = manifest_of(tmp_path / "in").without({0: "torn"})
    assert manifest.kept.tolist() == [1] and manifest.reasons[0] is DropReason.UNREADABLE
    assert ledger_row(manifest, 0)["detail"] == "torn"
    assert manifest.effective_captions() == ["b"]
