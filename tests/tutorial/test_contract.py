"""The commands of the contract's tutorial against tiny models behind the real names. api.md §7."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_world import ServerProcess
from pages import Answer, Block, read_blocks, run_blocks
from receiver import Receiver
from tiny_world import build_model
from warm_trainer import warm_trainers

from simpletuner.families.registry import load_spec

WITHIN_S = 540
HERE = Path(__file__).parent

SAYS = {
    "154": r'"needs_setup": true',
    "190": r'"code":"invalid_credentials"',
    "219": r'"title": "SimpleTuner"',
    "263": r"Configuration Valid.*dataset_path_missing",
    "263 without a run length": r"Validation Failed.*no_run_length.*Validation Failed.*Did you mean --learning_rate\?",
    "282": r'"job_id":"\w{12}","status":"running"',
    "303": r'"startup_progress".*"next_index".*lifecycle\.stage.*training\.status.*event: hello',
    "338": r'"request_id".*"request_id"',
    "+ the end of the first run": r'true.*"name": "adhoc-\w+",\n  "prompt": "test shot of <token>".*no_active_job'
    r".*no_active_job",
    "309": r'"status": "running"',
    "429": r'"success":true.*already_exists.*bad_path.*path_outside_root',
    "438": r'"files_uploaded":8,"folder":"[^"]*pixart-upload".*"files_uploaded":2,"errors":0.*\n10\n',
    "458": r"pixart-api-demo/multidatabackend\.json.*already_exists.*body_required",
    "515": r'"errors":\[\].*\[\["pixart","api"\],3\.8,true,(\d+),\1\]',
    "556": r'"active":"pixart-api-demo"',
    "564": r"Configuration Valid.*duplicate_key",
    "574": r'"status":"running"',
    "585": r'"status":"starting".*"total":1800,"rate":0\.0001.*lifecycle\.stage.*training\.progress.*"stopping".*'
    r'no_active_job.*"stopped".*unknown_job.*\[true\]',
    "608": r'kontext-api-demo/multidatabackend\.json.*"linear_dim":16',
    "673": r'"errors":\[\]',
    "716": r'"active":"kontext-api-demo".*Configuration Valid.*"job_id".*"cancelled"',
    "898": r'"kontext-api-demo","pixart-api-demo".*true.*"already_exists".*\.backups.*"idle".*'
    r'"allocated_gpus","available_gpus","devices","running_local_jobs"',
    "915": r"equal",
    "740": r'"allocated_gpus": \[\],\s+"available_gpus": \[\s+0\s+\],\s+"running_local_jobs": 0,\s+"devices"',
    "762": r'"total_gpus": 1.*\n7\n',
    "768": r'"status":"running","allocated_gpus":\[0\].*"status":"queued".*"queue_position":1.*"status":"rejected".*'
    r'gpus_unavailable.*unknown_config.*\["my-config","my-training-config"\]',
    "811": r'\{"local_gpu_max_concurrent":null,"local_job_max_concurrent":1\}.*"local_gpu_max_concurrent":6,'
    r'"local_job_max_concurrent":2.*"local_gpu_max_concurrent":null,"local_job_max_concurrent":2.*invalid_field',
    "830": r"queued.*exit 0.*rejected.*exit 4.*queued.*exit 0.*would be queued.*exit 3.*exit 9"
    r".*would be running.*exit 0",
    "849": r'^exit 0\n.*"name": "box",\s+"status": "idle",\s+"gpu_name": "cpu",\s+"gpu_count": 2',
    "856": r'\["auto","running",true\].*\["worker","running",true\].*\["local","running",false\].*exit 9',
    "885": r'\["labels","running",true\].*queued.*gpu_type=h100\* matches nobody.*true.*"busy_workers":1.*is draining.*'
    r"exit 0.*is removed",
    "160": r'"success":true.*"admin".*false.*setup_done',
    "175": r'"success":true.*invalid_credentials.*"prefix":"st_\w{8}"',
    "190 with accounts": r'unauthenticated.*invalid_credentials.*"idle"',
    "200": r'\["researcher"\].*already_exists.*true.*permission_denied.*permission_denied.*in no file',
}
REFUSED = {
    ("190", 401), ("429", 409), ("429", 400), ("429", 403), ("160", 409), ("175", 401), ("190 with accounts", 401),
    ("200", 409), ("200", 403), ("263 without a run length", 422), ("+ the end of the first run", 400),
    ("768", 409), ("768", 404), ("811", 422),
    ("458", 409), ("458", 422), ("585", 400), ("585", 404), ("898", 409),
}  # fmt: skip
PICTURES = """
from pathlib import Path
import numpy as np
from PIL import Image
draw = np.random.default_rng(0)
for folder in ("datasets/demo", "datasets/pseudo-camera-10k", "datasets/kontext/edit", "datasets/kontext/reference"):
    place = Path("/data") / folder
    place.mkdir(parents=True, exist_ok=True)
    for name in ("bench", "camera", "lamp", "chair"):
        coarse = Image.fromarray(draw.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize((1024, 1024), Image.Resampling.BICUBIC).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"a {name}")
"""


def put_on_hub(home: Path, repository: str, model: Path) -> None:
    """As the hub's client leaves a repository in its cache."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    shutil.copytree(model, folder / "snapshots" / ("0" * 40))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    home = tmp_path / "hub"
    put_on_hub(home, "terminusresearch/pixart-900m-1024-ft-v0.6", build_model(tmp_path / "tiny", patch_size=8))
    flux = Path(load_spec("flux").flavours["nano"].repository)
    put_on_hub(home, load_spec("flux").flavours["kontext"].repository, flux)
    environ = {"OMP_NUM_THREADS": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    with warm_trainers(**environ) as trainers:
        running = ServerProcess(tmp_path, DATASETS_DIR=str(tmp_path / "datasets"), **environ, **trainers)
        yield running
        running.close()


def statuses(answers: list[Answer]) -> set[tuple[str, int]]:
    """Of the requests below each heading."""
    return {(answer.block.heading, request.status) for answer in answers for request in answer.requests}


@pytest.mark.slow
@pytest.mark.timeout(WITHIN_S + 60)
def test_the_contract_runs_until_a_team_takes_over(server: ServerProcess) -> None:
    place = server.workspace
    receiver = Receiver()

    def mended(text: str) -> str:
        text = re.sub(r"(?<![\w.])/(data|workspace)/", rf"{place}/\1/", text)
        return text.replace("8001", str(server.port)).replace("RECEIVER", receiver.url)

    (place / "make_pictures.py").write_text(PICTURES.replace('"/data"', f'"{place}/data"'))
    blocks = [Block(block.heading, mended(block.commands)) for block in read_blocks(HERE / "contract.md")]
    answers = run_blocks(blocks, place, WITHIN_S, DATASETS_DIR=f"{place}/datasets")
    printed = {answer.block.heading: answer.output for answer in answers}
    assert [(name, text) for name, text in printed.items() if not re.search(SAYS.get(name, ""), text, re.DOTALL)] == []
    assert {found for found in statuses(answers) if found[1] >= 400} == REFUSED
    previews = [line for line in printed["375"].splitlines() if '"intermediary"' in line]
    assert [re.search(r"step (\d+)/20", line)[1] for line in previews[:6]] == ["1", "5", "9", "13", "17", "20"]
    kinds = [post.headers["X-SimpleTuner-Event"] for post in receiver.posts]
    assert {"job.status", "training.progress", "training.summary"} <= set(kinds)
    receiver.close()
