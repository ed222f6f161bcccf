"""The commands of a client, from logging in to following a run: what they do, and what the shell is told."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from control_world import FAKE_TRAINER, SOURCE, ServerProcess, cmd, free_port, processes_of

from simpletuner.cli.main import COMMANDS, GROUPS, build_app, main
from simpletuner.cli.remote_train import exit_code_of

PASSWORD = "a-long-password"
KEYS = "simpletuner/keys.json"


class Terminal:
    """Runs commands in this process, as somebody whose home is a folder."""

    def __init__(
        self,
        server: ServerProcess,
        home: Path,
        capsys: pytest.CaptureFixture[str],
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.server, self.home, self._capsys, self._patch = server, home, capsys, patch
        self.out = self.err = ""

    def run(self, *words: str, stdin: str = "") -> int:
        self._patch.setattr("sys.stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        code = main(words)
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *words: str, stdin: str = "") -> Any:
        assert self.run(*words, "--json", stdin=stdin) == 0, self.err
        return json.loads(self.out)

    def set(self, name: str, value: str) -> None:
        """A variable; "" is as good as none."""
        self._patch.setenv(f"SIMPLETUNER_{name}", value)

    @property
    def keys(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.home / KEYS).read_text())


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with an admin."""
    running = ServerProcess(tmp_path_factory.mktemp("accounts"))
    admin = {"email": "root@example.com", "username": "root", "password": PASSWORD}
    assert running.http.post("/api/auth/setup/first-admin", json=admin).status_code == 201
    yield running
    running.close()


@pytest.fixture
def terminal(
    accounts: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    """Nobody is logged in yet."""
    for name in ("SIMPLETUNER_API_KEY", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIMPLETUNER_URL", accounts.url)
    monkeypatch.setenv("SIMPLETUNER_WORKSPACE", str(accounts.workspace))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return Terminal(accounts, tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def root_key(accounts: ServerProcess) -> str:
    made = accounts.http.post("/api/auth/api-keys", json={"name": "tests"})
    assert made.status_code == 201, made.text
    return made.json()["key"]


@pytest.fixture
def root(terminal: Terminal, root_key: str) -> Terminal:
    """The admin, by the variable."""
    terminal.set("API_KEY", root_key)
    return terminal


def test_a_key_is_made_kept_used_replaced_and_revoked(terminal: Terminal) -> None:
    assert terminal.run("auth", "whoami") == 5
    assert "simpletuner auth login" in terminal.err
    assert terminal.run("auth", "login", stdin=f"root\n{PASSWORD}\n") == 0, terminal.err
    stored = terminal.keys[terminal.server.url]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (terminal.home / KEYS, (terminal.home / KEYS).parent)]
    assert modes == [0o600, 0o700]
    assert (stored["key"] not in terminal.out, stored["name"][:4], stored["username"]) == (True, "cli@", "root")
    assert terminal.json("auth", "whoami")["username"] == "root"
    assert terminal.run("auth", "login", "root@example.com", "--remember-me", stdin=PASSWORD) == 0
    keys = {key["id"]: key for key in terminal.json("auth", "keys", "list")}
    newer = keys[terminal.keys[terminal.server.url]["id"]]
    assert (bool(keys[stored["id"]]["revoked_at"]), bool(newer["revoked_at"])) == (True, False)
    assert newer["expires_at"] > keys[stored["id"]]["expires_at"]
    assert terminal.run("auth", "logout") == 0
    assert terminal.keys == {}
    assert [terminal.run("auth", "logout"), terminal.run("auth", "whoami")] == [0, 5]


def test_the_variable_comes_first_and_the_flag_names_the_server(root: Terminal) -> None:
    assert root.run("auth", "login", "root", stdin=PASSWORD) == 0
    assert "SIMPLETUNER_API_KEY is set" in root.err
    stored = root.keys[root.server.url]
    root.set("API_KEY", "st_" + "x" * 32)
    assert root.run("auth", "whoami") == 5
    root.set("API_KEY", "")
    root.set("URL", f"http://127.0.0.1:{free_port()}")
    assert root.run("auth", "whoami") == 6
    assert root.run("auth", "whoami", "--url", f"{root.server.url}/") == 0
    assert root.run("auth", "keys", "revoke", str(stored["id"]), "--url", root.server.url) == 0
    assert root.keys == {}
    assert root.run("auth", "whoami", "--url", root.server.url) == 5


@pytest.mark.parametrize(
    ("content", "mode", "cure"),
    [("{}", 0o640, "chmod 600"), ("{}", 0o604, "chmod 600"), ('{"a": 1}', 0o600, "log in again"), ("{", 0o600, "log")],
)
def test_a_key_file_that_cannot_be_trusted(terminal: Terminal, content: str, mode: int, cure: str) -> None:
    path = terminal.home / KEYS
    path.parent.mkdir()
    path.write_text(content)
    path.chmod(mode)
    for words in (["auth", "whoami"], ["auth", "login", "root"], ["auth", "logout"]):
        assert (terminal.run(*words, stdin=PASSWORD), cure in terminal.err) == (5, True)


def test_keys_with_a_scope(root: Terminal) -> None:
    assert root.run("auth", "keys", "create", "robot", "--scope", "config.view", "--expires-days", "2") == 0
    key = root.out.strip()
    mine = next(row for row in root.json("auth", "keys", "list") if key.startswith(row["prefix"]))
    assert mine["scoped_permissions"] == ["config.view"]
    root.set("API_KEY", key)
    assert [root.run("configs", "list"), root.run("users", "list")] == [0, 5]
    assert "admin.users" in root.err


def test_users(root: Terminal, root_key: str) -> None:
    made = root.json("users", "create", "ada", "--email", "ada@example.com", "--level", "viewer", stdin=PASSWORD)
    assert [level["name"] for level in made["levels"]] == ["viewer"]
    assert "researcher" in {level["name"] for level in root.json("users", "levels", "list")}
    raised = root.json("users", "levels", "grant", "ada@example.com", "researcher")
    assert "job.submit" in raised["permissions"]
    assert "job.submit" not in root.json("users", "permissions", "deny", "ada", "job.submit")["permissions"]
    assert "job.submit" in root.json("users", "permissions", "reset", "ada", "job.submit")["permissions"]
    assert "metrics.read" in root.json("users", "permissions", "grant", made["id"], "metrics.read")["permissions"]
    assert "metrics.read" in root.json("users", "permissions", "list")
    lowered = root.json("users", "levels", "withdraw", "ada", "viewer")
    assert [level["name"] for level in lowered["levels"]] == ["researcher"]
    assert root.json("users", "set", "ada", "--display-name", "Ada L.")["display_name"] == "Ada L."
    assert root.json("users", "set", "ada", "--display-name", "")["display_name"] is None
    assert root.run("users", "set", "ada", "--password", stdin="another-password") == 0
    root.set("API_KEY", "")
    assert root.run("auth", "login", "ada", stdin="another-password") == 0
    assert root.run("users", "list") == 5
    root.set("API_KEY", root_key)
    assert root.json("users", "set", "ada", "--no-active", "--email", "a@example.com")["is_active"] is False
    assert {user["username"] for user in root.json("users", "list")} == {"root"}
    assert {user["username"] for user in root.json("users", "list", "--include-inactive")} == {"root", "ada"}
    assert root.json("users", "show", "ada")["email"] == "a@example.com"
    assert root.run("users", "delete", "ada") == 0
    assert root.run("users", "show", "ada") == 1


def test_environments(root: Terminal, tmp_path: Path) -> None:
    create = ["--model-family", "pixart_sigma", "--model-flavour", "nano", "--tag", "x", "--description", "One"]
    made = root.json("configs", "create", "one", *create)
    assert (made["environment"]["tags"], made["config"]["--model_type"]) == (["x"], "lora")
    words = ["max_train_steps=5", "--learning_rate=1e-4", "validation_prompt=7", "use_ema=yes", "report_to="]
    etag = root.json("configs", "show", "one")["metadata"]["etag"]
    assert root.run("configs", "set", "one", *words, "--if-match", etag.strip('"')) == 0, root.err
    stored = root.json("configs", "show", "one")
    given = {name: stored["config"][f"--{name}"] for name in ("max_train_steps", "learning_rate", "validation_prompt")}
    assert given == {"max_train_steps": 5, "learning_rate": 0.0001, "validation_prompt": "7"}
    assert (stored["config"]["--use_ema"], stored["config"]["--report_to"]) == (True, "none")
    assert root.run("configs", "set", "one", "max_train_steps=6", "--if-match", etag) == 1
    assert "etag_mismatch" in root.err
    assert root.run("configs", "set", "one", "validation_prompt=", "--tag", "y") == 0
    changed = root.json("configs", "show", "one")
    assert ("--validation_prompt" in changed["config"], changed["metadata"]["tags"]) == (False, ["y"])
    versions = root.json("configs", "history", "one")["versions"]
    assert [version["is_current"] for version in versions] == [True, False, False]
    assert root.run("configs", "restore", "one", versions[1]["etag"].strip('"')) == 0
    assert root.json("configs", "show", "one")["config"] == stored["config"]
    file = tmp_path / "one.json"
    assert root.run("configs", "export", "one", "-o", str(file)) == 0
    assert json.loads(file.read_text())["config"] == stored["config"]
    assert root.run("configs", "import", str(file)) == 1
    assert root.run("configs", "import", str(file), "--overwrite") == 0
    assert root.run("configs", "import", "-", "--name", "two", stdin=file.read_text()) == 0
    assert root.json("configs", "show", "two")["config"] == stored["config"]
    assert root.json("configs", "export", "two", "--bare") == stored["config"]
    assert root.run("configs", "copy", "two", "three") == 0
    assert root.run("configs", "rename", "three", "four") == 0
    assert root.run("configs", "activate", "four") == 0
    assert root.json("configs", "list")["active"] == "four"
    assert [root.run("configs", "delete", name) for name in ("four", "two")] == [1, 0]
    assert root.run("configs", "deactivate", "four") == 0
    assert {config["name"] for config in root.json("configs", "list")["configs"]} >= {"one", "four"}


@pytest.mark.parametrize(
    "words",
    [
        ["max_train_steps=5"],
        ["max_train_steps=5", "num_train_epochs=5"],
        ["max_train_steps=5", "learning_rat=1", "model_type=lorra"],
        ["model_family=pixart"],
    ],
)
def test_a_validation_says_the_same_here_and_there(root: Terminal, words: list[str]) -> None:
    config = {"--model_family": "pixart_sigma", "--data_backend_config": "same/multidatabackend.json"}
    body = {"data": {"config": config, "dataloader": [], "_metadata": {"name": "same"}}, "overwrite": True}
    assert root.server.http.post("/api/configs/import", json=body).status_code == 201
    codes = [root.run("configs", "validate", "same", *words, "--json")]
    there = json.loads(root.out)
    root.set("URL", "")
    codes.append(root.run("configs", "validate", "same", *words, "--json"))
    here = json.loads(root.out)
    assert here == {name: value for name, value in there.items() if name in here}
    assert codes == [0 if here["valid"] else 64] * 2
    assert root.run("configs", "validate", "same", *words) == codes[0]
    assert all(item["code"] in root.out for item in here["errors"])


def test_the_schema_is_the_same_here_and_there(root: Terminal) -> None:
    there = root.json("schema")
    root.set("URL", "")
    assert root.json("schema") == there


@pytest.mark.parametrize(
    ("words", "stdin", "code"),
    [
        (["auth", "login", "root"], "wrong", 5),
        (["auth", "login", "root"], "", 5),
        (["auth", "login"], "", 5),
        (["auth", "keys", "revoke", "999"], "", 1),
        (["auth", "keys", "revoke", "first"], "", 2),
        (["users", "create", "bob"], "", 2),
        (["users", "create", "b", "--email", "b@example.com"], PASSWORD, 1),
        (["users", "set", "root"], "", 2),
        (["users", "show", "nobody"], "", 1),
        (["users", "delete", "root"], "", 1),
        (["users", "levels", "grant", "root", "king"], "", 1),
        (["configs", "show", "none"], "", 1),
        (["configs", "show", "../users"], "", 1),
        (["configs", "create", "a b", "--model-family", "flux"], "", 1),
        (["configs", "set", "none"], "", 2),
        (["configs", "set", "none", "a=1"], "", 1),
        (["configs", "import", "no-such-file.json"], "", 64),
        (["configs", "import", "-"], "{", 64),
        (["configs", "bogus"], "", 2),
        (["shutdown", "--jobs", "maybe"], "", 2),
        (["completion", "tcsh"], "", 2),
        (["train", "--env", "none"], "", 1),
        (["train", "max_train_steps=1"], "", 1),
    ],
)
def test_what_the_shell_is_told(root: Terminal, words: list[str], stdin: str, code: int) -> None:
    assert root.run(*words, stdin=stdin) == code
    assert (root.err + root.out).strip()
    assert "Traceback" not in root.err


def test_a_refusal_as_json(root: Terminal) -> None:
    assert root.run("configs", "show", "none", "--json") == 1
    assert json.loads(root.out)["code"] == "unknown_config"


def start_words(server: ServerProcess, name: str, **more: int) -> list[str]:
    options = server.options(output_dir=f"output/{name}", **more)
    return [f"{option}={value}" for option, value in options.items()]


def test_a_run_is_followed_to_its_end(root: Terminal) -> None:
    words = start_words(root.server, "whole", max_train_steps=3)
    assert root.run("train", *words, "--json") == 0, root.err
    assert "Training started" in root.err
    events = [json.loads(line) for line in root.out.splitlines()]
    assert [event["data"]["to"] for event in events if event["type"] == "job.status"][-1] == "completed"
    indices = [event["index"] for event in events]
    assert indices == sorted(set(indices))


class Follower:
    """`train` in a process of its own, where torch and its company cannot be imported."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        code = (
            "import sys\n"
            "for name in ('torch', 'diffusers', 'transformers', 'numpy'): sys.modules[name] = None\n"
            "from simpletuner.cli.main import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "train", *start_words(server, name), "--json"],
            env=dict(os.environ) | {"PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.job_id: str = json.loads(self.process.stdout.readline())["job_id"]
        server.wait_status(self.job_id, "running")

    def read_until(self, text: str) -> None:
        assert self.process.stderr is not None
        assert any(text in line for line in self.process.stderr), text

    def end(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def follower(root: Terminal, request: pytest.FixtureRequest) -> Iterator[Follower]:
    built = Follower(root.server, request.node.name)
    yield built
    built.process.kill()
    built.process.communicate()


def test_a_run_is_followed_across_a_restart_and_stopped(root: Terminal, follower: Follower) -> None:
    assert root.run("shutdown", "--jobs", "keep") == 0
    root.server.process.wait(timeout=15)
    assert root.run("auth", "whoami") == 6
    follower.read_until("The job goes on without the server")
    root.server.start()
    follower.process.send_signal(signal.SIGINT)
    follower.read_until("Asked to stop. Once more to cancel")
    assert (follower.end(), root.server.wait_status(follower.job_id, "stopped")["status"]) == (75, "stopped")


def test_two_signals_cancel(root: Terminal, follower: Follower) -> None:
    """The trainer stands still meanwhile, or it would be gone after the first."""
    processes = processes_of(root.server.folder(follower.job_id))
    trainer = next(process for process in processes if str(FAKE_TRAINER) in cmd(process))
    trainer.suspend()
    follower.process.send_signal(signal.SIGTERM)
    follower.read_until("Asked to stop")
    follower.process.send_signal(signal.SIGINT)
    follower.read_until("Asked to cancel")
    trainer.resume()
    assert (follower.end(), root.server.wait_status(follower.job_id, "cancelled")["status"]) == (75, "cancelled")


@pytest.mark.parametrize(
    ("status", "end", "code"),
    [
        ("completed", {"code": 0}, 0),
        ("stopped", {"code": 75}, 75),
        ("stopped", {"signal": 9}, 75),
        ("cancelled", None, 75),
        ("failed", {"code": 71}, 71),
        ("failed", {"signal": 11}, 139),
        ("lost", None, 137),
    ],
)
def test_a_follower_ends_as_the_trainer_did(status: str, end: dict[str, int] | None, code: int) -> None:
    assert exit_code_of({"status": status, "exit": end}) == code


def test_every_command_explains_itself() -> None:
    app = build_app()
    for path in (*COMMANDS, *GROUPS):
        command = app
        for word in path.split():
            command = command[word]
        assert command.help


def test_bash_completes(root: Terminal, tmp_path: Path) -> None:
    assert root.run("completion", "bash") == 0
    script = tmp_path / "completion.bash"
    script.write_text(root.out)
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "simpletuner"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m simpletuner.cli.main "$@"\n')
    command.chmod(0o755)
    ask = 'for line; do read -ra COMP_WORDS <<< "$line"; [[ $line == *" " ]] && COMP_WORDS+=(""); '
    ask += 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _simpletuner_words; echo "${COMPREPLY[*]}"; done'
    lines = ["simpletuner conf", "simpletuner users levels ", "simpletuner shutdown --jobs ", "simpletuner train --en"]
    lines += ["simpletuner train --env x learning_ra", "simpletuner train learning_rate = "]
    ran = subprocess.run(
        ["bash", "-c", f'source "{script}"; {ask}', "-", *lines],
        env=dict(os.environ) | {"PYTHONPATH": str(SOURCE), "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = ["configs", "list grant withdraw", "keep stop cancel", "--env", "learning_rate=", ""]
    assert (ran.stdout.splitlines(), ran.stderr) == (answers, "")


@pytest.mark.skipif(which("fish") is None, reason="no fish here")
def test_fish_completes(root: Terminal, tmp_path: Path) -> None:
    assert root.run("completion", "fish") == 0
    (tmp_path / "simpletuner.fish").write_text(root.out)
    ask = f'source {tmp_path}/simpletuner.fish; complete -C "simpletuner shutdown --jobs "'
    told = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True).stdout
    assert [line.partition("\t")[0] for line in told.splitlines()] == ["cancel", "keep", "stop"]


@pytest.mark.skipif(which("zsh") is None, reason="no zsh here")
def test_zsh_completes_where_it_is_sourced_and_where_it_is_loaded(root: Terminal, tmp_path: Path) -> None:
    """A file of $fpath is the body of a function of its name: it has to call what it defines."""
    assert root.run("completion", "zsh") == 0
    (tmp_path / "_simpletuner").write_text(root.out)
    sourced = f"autoload -Uz compinit; compinit -u -D; source {tmp_path}/_simpletuner; print $_comps[simpletuner]"
    loaded = (
        f"fpath=({tmp_path} $fpath); autoload -Uz _simpletuner; _arguments() {{ print asked; return 1 }}; _simpletuner"
    )
    for ask, answer in ((sourced, "_cyclopts_simpletuner\n"), (loaded, "asked\n")):
        told = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=False)
        assert (told.stdout, told.stderr) == (answer, "")
