"""The ledger over HTTP is what the code that trains says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import InProcess
from PIL import Image


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    running = InProcess(tmp_path_factory.mktemp("ledger"))
    folder = running.datasets / "set"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    (folder / "d.png").write_bytes(b"broken")
    (folder / "d.txt").write_text("broken")
    make_environment(running, "demo", folder)
    yield running
    running.close()


def make_environment(server: InProcess, name: str, folder: Path) -> None:
    request = {"name": name, "model_family": "pixart_sigma", "model_flavour": "nano", "model_type": "full"}
    made = server.ask("POST", "/api/configs/environments", json=request)
    assert made.status_code == 201, made.text
    entries = [
        {
            "id": "pictures",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": str(folder),
            "caption_strategy": "textfile",
            "resolution": 64,
            "resolution_type": "pixel",
            "cache_dir_vae": "cache/vae",
        },
        {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    assert server.ask("PUT", f"/api/configs/{name}/dataloader", json=entries).status_code == 200
    options = {"--max_train_steps": 10, "--num_train_epochs": 0}
    assert server.ask("PATCH", f"/api/configs/{name}", json={"config": options}).status_code == 200


def test_every_file_and_why(server: InProcess) -> None:
    answer = server.ask("GET", "/api/configs/demo/ledger")
    body = answer.json()
    assert answer.status_code == 200, body
    assert (body["total"], answer.headers["X-Total-Count"]) == (4, "4")
    assert {row["path"]: row["reason"] for row in body["rows"]} == {
        "a.png": None,
        "b.png": None,
        "c.png": None,
        "d.png": "unreadable",
    }
    assert [(each["id"], each["found"], each["kept"]) for each in body["summary"]] == [("pictures", 4, 3)]
    assert [each["code"] for each in body["errors"]] == ["unreadable"]
    page = server.ask("GET", "/api/configs/demo/ledger", params={"status": "kept", "limit": 1, "offset": 1}).json()
    assert (page["total"], [row["path"] for row in page["rows"]]) == (3, ["b.png"])
    assert page["summary"] == body["summary"]
    none = server.ask("GET", "/api/configs/demo/ledger", params={"dataset": "picture"})
    assert (none.status_code, none.json()["hint"]) == (404, "Did you mean pictures?")


def test_what_cannot_be_scanned_is_told(server: InProcess) -> None:
    assert server.ask("GET", "/api/configs/none/ledger").json()["code"] == "unknown_config"
    make_environment(server, "missing", server.datasets / "none")
    answer = server.ask("GET", "/api/configs/missing/ledger")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_config")
    codes = {each["code"] for each in answer.json()["errors"]}
    assert "dataset_path_missing" in codes, json.dumps(answer.json())
