"""Our own tutorial, every shell block of it, by bash, curl and jq against a live server. api.md §7."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_world import ServerProcess
from pages import Answer, Block, Request, read_blocks, run_blocks
from warm_trainer import warm_trainers

DOCS = Path(__file__).parents[2] / "docs"
WITHIN_S = 540

SAYS = {
    "2. Look around": r"SimpleTuner",
    "Pictures that are elsewhere": r'"files_uploaded": 16.*"instance_data_dir": "[^"]*uploaded".*18|16',
    "4. The short way: one request, no environment": r'Configuration Valid.*"valid": true.*"status": "completed"',
    "The 900M model": r"Configuration Valid",
    "Create": r"Environment pixart-demo created",
    "Describe the data": r"8 of 8 pictures are used",
    "Merge settings": r'"errors": \[\]',
    "Activate, validate, start": r'"active": "pixart-demo".*Configuration Valid',
    "Watch": r"\"status\": \"running\".*training\.status.*event: hello.*id: \d+.*'next_index'.*Queued",
    "Be told": r'"delivered": false',
    "Ask for a checkpoint or images now": r'"request_id".*"request_id".*intermediary\t/api/jobs/',
    "Stop, look, resume": r'"stopping".*"status": "stopped".*"is_complete": true.*"valid": true.*"status": "resumed".*'
    r'"status": "queued",\n  "status_reason": "Paused.*"success": true',
    "Cancel": r'"success": true.*"cancelled"',
    "More machines": r'"name": "box-1",\s+"status": "idle",\s+"gpu_name": "cpu".*box-1 +busy.*exit 9.*is removed',
    "The queue": r'"devices".*"max_concurrent_jobs": 1.*\{"status":"running","allocated_gpus":\[0\],"dry_run":true\}'
    r'.*exit 3.*exit 4.*blocked.*"reason_code":"needs_approval".*"local_gpu_max_concurrent":6.*'
    r'"local_gpu_max_concurrent":null.*exit 9.*DEVICE',
    "6. An adapter for Flux Kontext": r'"algo": "lora".*"active": "kontext-demo".*adapter_comfyui\.safetensors',
    "Proofs": r"Equal, byte for byte",
    "9. A team": r'"has_admin": (true|false).*"admin".*"levels": \[\n +"admin".*"researcher".*user\.create',
    "8. When something is wrong": r"Did you mean --learning_rate\?",
}
"""What has to be read below a heading, in this order."""
REFUSED = {Request(422, "POST", "/api/training/start")}
"""By intention: the only answers that are no success."""


@pytest.fixture(scope="module")
def trainers() -> Iterator[dict[str, str]]:
    with warm_trainers(OMP_NUM_THREADS="1") as environ:
        yield environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def server(tmp_path: Path, trainers: dict[str, str]) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path, **trainers)
    yield running
    running.close()


def blocks_of(page: str, port: int) -> list[Block]:
    """Without the first block, which starts the server: it is running. Headings are those of the English page."""
    headings = [block.heading for block in read_blocks(DOCS / "tutorial.en.md")]
    found = read_blocks(DOCS / page)
    assert "simpletuner server --host 127.0.0.1 --port 8001" in found[0].commands
    return [
        Block(heading, block.commands.replace("8001", str(port)))
        for heading, block in zip(headings, found, strict=True)
    ][1:]


def check(answers: list[Answer], says: dict[str, str]) -> None:
    assert [(answer.block.heading, answer.output) for answer in answers if answer.status != 0] == []
    requests = [request for answer in answers for request in answer.requests]
    assert {request for request in requests if not 200 <= request.status < 300} == REFUSED
    printed: dict[str, str] = {}
    for answer in answers:
        printed[answer.block.heading] = printed.get(answer.block.heading, "") + answer.output
    assert [(name, printed[name]) for name in says if not re.search(says[name], printed[name], re.DOTALL)] == []


def test_both_pages_have_the_same_commands() -> None:
    english, spanish = (read_blocks(DOCS / page) for page in ("tutorial.en.md", "tutorial.es.md"))
    assert [block.commands for block in english] == [block.commands for block in spanish]


def run_page(server: ServerProcess, blocks: list[Block], trainers: dict[str, str]) -> None:
    answers = run_blocks(blocks, server.workspace, WITHIN_S, SIMPLETUNER_DEVICES="cpu:1", **trainers)
    here = {block.heading for block in blocks}
    check(answers, {heading: pattern for heading, pattern in SAYS.items() if heading in here})


def check_products(server: ServerProcess) -> None:
    output = server.workspace / "output"
    produced = ("once/pipeline", "kontext/pytorch_lora_weights.safetensors", "foreground/checkpoint-10")
    assert [path for path in produced if not (output / path).exists()] == []
    assert list((output / "pixart-demo").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.timeout(WITHIN_S + 60)
def test_the_english_page_runs_on_an_open_server(server: ServerProcess, trainers: dict[str, str]) -> None:
    blocks = blocks_of("tutorial.en.md", server.port)
    run_page(server, blocks, trainers)
    assert {block.heading for block in blocks} == SAYS.keys() | {"3. Some pictures", "7. Without a server"}
    check_products(server)


@pytest.mark.slow
@pytest.mark.timeout(WITHIN_S + 60)
def test_the_spanish_page_runs_with_accounts(server: ServerProcess, trainers: dict[str, str]) -> None:
    """The team is made first; from there on every `curl` has its key from `.curlrc`."""
    blocks = blocks_of("tutorial.es.md", server.port)
    first = [block for block in blocks if block.heading in ("2. Look around", "9. A team")]
    run_page(server, first + [block for block in blocks if block not in first], trainers)
    assert (server.workspace / ".curlrc").stat().st_mode & 0o077 == 0
    check_products(server)
