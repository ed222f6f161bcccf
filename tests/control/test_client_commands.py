"""Commands that ask a server: what they do there, and what the shell is told."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from control_world import ServerProcess, free_port
from PIL import Image

from simpletuner.cli.client import server_url
from simpletuner.cli.main import main


@pytest.fixture
def target(
    shared_server: ServerProcess, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """A new folder on the server that the commands ask."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-keys"))
    monkeypatch.setenv("SIMPLETUNER_URL", shared_server.url)
    monkeypatch.delenv("SIMPLETUNER_API_KEY", raising=False)
    name = request.node.name
    assert shared_server.http.post("/api/datasets/folders", json={"folder_name": name}).status_code == 201
    return name


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def test_data_goes_to_a_server(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture("red"))
    (folder / "a.txt").write_text("red\nsquare")
    (folder / "sub" / "b.png").write_bytes(picture("blue"))
    (folder / ".hidden.png").write_bytes(picture("green"))
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("c.png", picture("white"))
    assert main(["datasets", "upload", target, str(folder), str(tmp_path / "more.zip"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["files_uploaded"] for answer in answers] == [1, 3]
    assert main(["datasets", "captions", f"{target}/sub/b.png", "--set", "blue"]) == 0
    assert main(["datasets", "captions", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 changed"
    assert lines[1:] == [f"{target}/a.png\tred square", f"{target}/c.png\t", f"{target}/sub/b.png\tblue"]
    assert main(["datasets", "list", target]) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [
        ["folder", f"{target}/sub"],
        ["image", f"{target}/a.png"],
        ["text", f"{target}/a.txt"],
        ["image", f"{target}/c.png"],
    ]


def test_what_the_shell_is_told(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("a.txt", b"red"), ("b.heic", b"x")):
        (tmp_path / name).write_bytes(content)
    some = main(["datasets", "upload", target, str(tmp_path / "a.txt"), str(tmp_path / "b.heic")])
    assert (some, "b.heic" in capsys.readouterr().err) == (1, True)
    assert main(["datasets", "upload", target, str(tmp_path / "b.heic")]) == 1
    assert "heif-convert" in capsys.readouterr().err
    assert main(["datasets", "list", "nowhere"]) == 1
    assert main(["datasets", "upload", target, str(tmp_path / "none.png")]) == 64
    assert main(["datasets", "upload"]) == 2
    monkeypatch.setenv("SIMPLETUNER_API_KEY", "st_" + "x" * 32)
    assert main(["datasets", "list"]) == 5
    monkeypatch.setenv("SIMPLETUNER_URL", f"http://127.0.0.1:{free_port()}")
    assert main(["datasets", "list"]) == 6
    assert "SIMPLETUNER_URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:8001"),
        ({"SIMPLETUNER_URL": "https://a.example/", "SIMPLETUNER_PORT": "1"}, "https://a.example"),
        ({"SIMPLETUNER_HOST": "0.0.0.0", "SIMPLETUNER_PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"SIMPLETUNER_HOST": "::", "SIMPLETUNER_SSL_ENABLED": "true"}, "https://127.0.0.1:8001"),
        ({"SIMPLETUNER_HOST": "fd00::1"}, "http://[fd00::1]:8001"),
    ],
)
def test_where_the_server_is(environ: dict[str, str], url: str) -> None:
    assert server_url(environ) == url
