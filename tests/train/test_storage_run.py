"""One run over a bucket, a hub and a CSV file. training.md §3.2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_world import TinyWorld

from s3_server import S3Server
from simpletuner.errors import ExitCode
from storage_worlds import CsvWorld, HubRowsWorld, S3World


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    pytest.importorskip("boto3")
    server = S3Server(tmp_path / "log")
    yield server
    server.close()


def test_a_run_over_three_storages(
    shared: TinyWorld, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has some of the pictures; a second run encodes nothing, and no secret is in its files."""
    monkeypatch.setenv("ST_ID", "id")
    monkeypatch.setenv("ST_KEY", "s3cret")
    pictures = {path.name: path.read_bytes() for path in sorted(shared.pictures.iterdir())}
    names = list(pictures)
    (tmp_path / "hub").mkdir()
    worlds = [S3World(tmp_path, s3), HubRowsWorld(tmp_path / "hub", monkeypatch), CsvWorld(tmp_path)]
    entries = []
    for number, world in enumerate(worlds):
        part = names[number::3]
        world.put({name: pictures[name] for name in part}, {name: f"a {name.partition('_')[0]}" for name in part})
        entries.append({"id": f"set{number}", "resolution": 64, **world.keys})
    keys = {"aws_access_key_id": "{env:ST_ID}", "aws_secret_access_key": "{env:ST_KEY}"}
    entries[0] |= keys
    monkeypatch.setattr(shared, "entries", entries)
    ran = shared.run(output_dir="stored", cache_dir="stored-cache", cache_dir_text="stored-cache/text")
    assert ran.code is ExitCode.DONE
    rows = [
        json.loads(line)
        for number in range(3)
        for line in (ran.job.artifacts / f"ledger-set{number}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(names) and {row["status"] for row in rows} == {"kept"}
    assert {row["caption"] for row in rows} == {f"a {name.partition('_')[0]}" for name in names}
    assert worlds[1].server.commit in {row.get("revision") for row in rows}  # pyright: ignore
    for world in worlds:
        world.fetched()
    again = shared.run(output_dir="stored-again", cache_dir="stored-cache", cache_dir_text="stored-cache/text")
    assert again.code is ExitCode.DONE and [world.fetched() for world in worlds] == [[], [], []]
    files = [path.read_bytes() for run in (ran, again) for path in run.job.root.rglob("*") if path.is_file()]
    files += [path.read_bytes() for path in ran.output.glob("*.json")]
    assert not any(b"s3cret" in content for content in files)
