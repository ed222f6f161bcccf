"""Environments on disk: atomic writes, backups, ETags, three file formats. api.md §2.3."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from config_place import Place, only

from simpletuner.config.environments import Environments
from simpletuner.config.train_config import option_fields
from simpletuner.errors import UserError


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    found = Environments(tmp_path / "environments")
    found.create("night", {"--seed": 1, "--output_dir": "night/out"}, {"description": "d"}, [{"id": "a"}])
    return found


def code_of(call: object, *args: object, **keys: object) -> str:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call(*args, **keys)
    return caught.value.code


def test_create_and_read(environments: Environments) -> None:
    stored = environments.read("night")
    assert stored.config == {"--seed": 1, "--output_dir": "night/out"}
    assert environments.names() == ["night"]
    assert environments.read_dataloader("night")[0] == [{"id": "a"}]
    notes = environments.read_metadata("night")
    assert notes["description"] == "d" and notes["created_at"].endswith("Z")
    assert [path.name for path in environments.root.iterdir()] == ["night"], "nothing half made is left"


def test_an_unknown_name_names_the_nearest(environments: Environments) -> None:
    with pytest.raises(UserError) as caught:
        environments.read("nigth")
    assert (caught.value.code, caught.value.hint) == ("unknown_config", "Did you mean 'night'?")
    assert environments.read("night.json").config["--seed"] == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "x" * 65, "a b", "ünder", "../night", "night\n"])
def test_bad_names(environments: Environments, name: str) -> None:
    assert code_of(environments.check_new_name, name) == "invalid_field"


@pytest.mark.parametrize(
    ("name", "code"), [("schema", "reserved_name"), ("adhoc-1", "reserved_name"), ("night", "already_exists")]
)
def test_taken_names(environments: Environments, name: str, code: str) -> None:
    assert code_of(environments.check_new_name, name) == code


def test_a_write_leaves_a_backup_and_checks_the_etag(environments: Environments) -> None:
    old = environments.read("night").etag
    new = environments.write("night", {"--seed": 2}, if_match=old)
    assert environments.read("night").etag == new != old
    assert code_of(environments.write, "night", {"--seed": 3}, if_match=old) == "etag_mismatch"
    backups = list((environments.root / "night/.backups").iterdir())
    assert [json.loads(path.read_text())["--seed"] for path in backups] == [1]
    assert environments.write("night", {"--seed": 2}) == new
    assert len(list((environments.root / "night/.backups").iterdir())) == 1, "nothing changed, nothing kept"


def test_ten_backups_are_kept(environments: Environments) -> None:
    for seed in range(2, 16):
        environments.write("night", {"--seed": seed})
    kept = sorted((environments.root / "night/.backups").iterdir())
    assert [json.loads(path.read_text())["--seed"] for path in kept] == list(range(5, 15))


def test_the_dataset_file(environments: Environments) -> None:
    old = environments.read_dataloader("night")[2]
    etag, backup = environments.write_dataloader("night", [{"id": "b"}], if_match=old)
    assert backup is not None and json.loads(backup.read_text()) == [{"id": "a"}]
    assert environments.read_dataloader("night")[0::2] == ([{"id": "b"}], etag)
    assert code_of(environments.write_dataloader, "night", [], if_match=old) == "etag_mismatch"
    environments.dataloader_path("night").write_bytes(b"\xff[]")
    assert code_of(environments.read_dataloader, "night") == "bad_json"
    environments.dataloader_path("night").unlink()
    assert code_of(environments.read_dataloader, "night") == "not_found"


def test_rename_and_copy_take_paths_along(environments: Environments) -> None:
    environments.copy("night", "day", owner="1")
    assert environments.read("day").config["--output_dir"] == "day/out"
    assert environments.read("night").config["--output_dir"] == "night/out"
    environments.rename("night.json", "noon")
    assert environments.names() == ["day", "noon"]
    assert environments.read("noon").config["--output_dir"] == "noon/out"
    assert code_of(environments.rename, "noon", "day") == "already_exists"
    assert code_of(partial(environments.copy, owner="1"), "noon", "day") == "already_exists"


def test_delete_moves_to_the_trash(environments: Environments) -> None:
    environments.delete("night")
    assert environments.names() == []
    trashed = only(list((environments.root / ".trash").iterdir()))  # pyright: ignore[reportArgumentType]
    assert (trashed / "config.json").exists()  # pyright: ignore[reportOperatorIssue, reportUnknownMemberType]


def write(environments: Environments, name: str, text: str) -> None:
    folder = environments.root / "written"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def test_a_toml_file(environments: Environments) -> None:
    write(environments, "config.toml", 'seed = 4\n"--use_ema" = true\n')
    layer = environments.layer("written", option_fields())
    assert (layer.name, layer.values, layer.problems) == ("environment:written", {"seed": 4, "use_ema": True}, ())
    environments.write("written", {"--seed": 5})
    assert environments.read("written").path.name == "config.json"
    assert not (environments.root / "written/config.toml").exists()


def test_an_env_file(environments: Environments, place: Place) -> None:
    text = "# a comment\nexport SEED=4\nUSE_EMA=\"False\"\n\nvalidation_prompt=a = b\nOUTPUT_DIR='x'\n"
    write(environments, "config.env", text)
    layer = environments.layer("written", option_fields())
    found = place.resolve(layer)
    assert found.errors == []
    assert [found.values[name] for name in ("seed", "use_ema", "validation_prompt", "output_dir")] == [
        4, False, "a = b", "x",
    ]  # fmt: skip


def test_json_wins_over_toml_over_env(environments: Environments) -> None:
    for name in ("config.env", "config.toml", "config.json"):
        write(environments, name, {"env": "SEED=1", "toml": "seed = 2", "json": '{"seed": 3}'}[name[7:]])
        assert environments.read("written").path.name == name


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("config.json", '{"seed": 1,\n "seed": 2}', "line 2"), ("config.env", "# first\nSEED=1\nSEED=2\n", "line 3")],
)
def test_doubled_keys_say_their_line(environments: Environments, name: str, text: str, line: str) -> None:
    write(environments, name, text)
    layer = environments.layer("written", option_fields())
    problem = only(layer.problems)
    assert (problem.code, problem.level) == ("duplicate_key", "warning") and line in problem.message
    assert str(layer.values["seed"]) == "2"


def test_both_spellings_in_a_file(environments: Environments) -> None:
    write(environments, "config.json", '{"--seed": 1, "seed": 2}')
    layer = environments.layer("written", option_fields())
    assert layer.values == {"seed": 1}
    assert only(layer.problems).code == "duplicate_option"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("config.json", b"[]", "bad_config_file"),
        ("config.json", b"{", "bad_json"),
        ("config.json", b"\xff{}", "bad_config_file"),
        ("config.toml", b"a = 1\na = 2\n", "bad_config_file"),
        ("config.toml", b"a =", "bad_config_file"),
        ("config.env", b"\xff=1", "bad_config_file"),
    ],
)
def test_a_file_that_cannot_be_read(environments: Environments, name: str, content: bytes, code: str) -> None:
    write(environments, name, "")
    (environments.root / "written" / name).write_bytes(content)
    assert code_of(environments.read, "written") == code
