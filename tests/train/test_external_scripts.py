"""The external-validation scripts that ship: against local servers that speak each provider's API, and a tiny model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_world import TinyWorld

import simpletuner.examples
from simpletuner.errors import ExitCode
from simpletuner.families.registry import load_spec

SCRIPTS = Path(simpletuner.examples.__file__).parent / "external-validation"
NANO = load_spec("pixart_sigma").flavours["nano"].repository
PROMPT = "-a 'red' $cat; \"x\""
Answer = Callable[["Provider", str, str, bytes], Any]


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


class Provider(ThreadingHTTPServer):
    """Answers as `answer(self, method, path, body)` says: an object, or bytes, or None for 404."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.answer = answer
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str]] = []
        self.keys: list[str | None] = []
        self.uploaded = b""
        self.wanted: dict[str, Any] = {}
        self.polls = 0


class _Exchange(BaseHTTPRequestHandler):
    server: Provider

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path))
        self.server.keys.append(self.headers.get("Authorization"))
        found = self.server.answer(self.server, self.command, self.path.partition("?")[0], body)
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

    do_GET = do_POST = do_PUT = do_any

    def log_message(self, *_: Any) -> None:
        pass


def replicate(server: Provider, method: str, path: str, body: bytes) -> Any:
    match method, path:
        case "POST", "/v1/files":
            server.uploaded = body
            return {"id": "f", "urls": {"get": f"{server.base}/v1/files/f"}}
        case "POST", "/v1/models/black-forest-labs/flux-dev-lora/predictions":
            server.wanted = json.loads(body)["input"]
            return {"id": "p1", "status": "starting"}
        case "GET", "/v1/predictions/p1":
            server.polls += 1
            failed = server.wanted["prompt"] == "fail"
            status = "processing" if server.polls < 3 else "failed" if failed else "succeeded"
            return {"status": status, "output": [f"{server.base}/images/out-0.png"], "error": "too bad"}
        case "GET", "/images/out-0.png":
            return picture()
        case _:
            return None


def wavespeed(server: Provider, method: str, path: str, body: bytes) -> Any:
    match method, path:
        case "POST", "/api/v3/wavespeed-ai/flux-dev-lora":
            server.wanted = json.loads(body)
            return {"code": 200, "data": {"id": "t1", "status": "created"}}
        case "GET", "/api/v3/predictions/t1/result":
            server.polls += 1
            status = "processing" if server.polls < 3 else "completed"
            return {"code": 200, "data": {"status": status, "outputs": [f"{server.base}/out.png"]}}
        case "GET", "/out.png":
            return picture()
        case _:
            return None


def fal(server: Provider, method: str, path: str, body: bytes) -> Any:
    match method, path:
        case "POST", "/storage/upload/initiate":
            return {"file_url": "https://cdn.test/lora", "upload_url": f"{server.base}/put?signed=1"}
        case "PUT", "/put":
            server.uploaded = body
            return {}
        case "POST", "/fal-ai/flux-lora":
            server.wanted = json.loads(body)
            return {"request_id": "r1"}
        case "GET", "/fal-ai/flux-lora/requests/r1/status":
            server.polls += 1
            return {"status": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"][min(server.polls, 3) - 1]}
        case "GET", "/fal-ai/flux-lora/requests/r1":
            return {"images": [{"url": f"{server.base}/image.png"}]}
        case "GET", "/image.png":
            return picture()
        case _:
            return None


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Provider]]:
    servers: list[Provider] = []

    def start(answer: Answer) -> Provider:
        servers.append(Provider(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(script: str, server: Provider | None, *words: str, key: str | None = "secret") -> Any:
    environment = dict(os.environ) | {"POLL_S": "0.01", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(place).absolute()) for place in sys.path if place)
    if server is not None:
        environment |= {f"{name}_BASE_URL": server.base for name in ("REPLICATE", "WAVESPEED", "FAL")}
        environment["FAL_STORE_URL"] = server.base
    if key is not None:
        environment |= dict.fromkeys(("REPLICATE_API_TOKEN", "WAVESPEED_API_KEY", "FAL_KEY"), key)
    command = [sys.executable, str(SCRIPTS / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    save_file({"transformer.a.lora_A.weight": torch.ones(2, 2)}, checkpoint / "pytorch_lora_weights.safetensors")
    return [
        f"--output={tmp_path / 'out'}", f"--prompt={PROMPT}", f"--checkpoint={checkpoint}", "--remote=",
        "--huggingface=", "--family=flux", "--model-type=lora", "--lora-type=standard", "--step=4", "--steps=9",
        "--guidance=2.5", "--seed=", "--resolution=1024x768",
    ]  # fmt: skip


def check_image(tmp_path: Path, ended: Any) -> None:
    assert ended.returncode == 0, ended.stderr
    file = tmp_path / "out/step_4_0.png"
    assert ended.stdout == f"{file}\n" and Image.open(file).size == (8, 8)


def test_replicate(serve: Callable[[Answer], Provider], words: list[str], tmp_path: Path) -> None:
    server = serve(replicate)
    check_image(tmp_path, run("replicate_post_upload.py", server, *words))
    assert server.wanted == {
        "prompt": PROMPT, "lora_weights": f"{server.base}/v1/files/f", "num_inference_steps": 9, "guidance": 2.5,
        "seed": 0, "aspect_ratio": "4:3", "output_format": "png",
    }  # fmt: skip
    assert (tmp_path / "checkpoint-4/pytorch_lora_weights.safetensors").read_bytes() in server.uploaded
    assert server.polls == 3
    assert server.keys == ["Bearer secret"] * (len(server.keys) - 1) + [None], "the image's server gets no key"


def test_an_upload_of_the_run_is_used_where_there_is_one(
    serve: Callable[[Answer], Provider], words: list[str], tmp_path: Path
) -> None:
    server = serve(replicate)
    check_image(tmp_path, run("replicate_post_upload.py", server, *words, "--huggingface=me/lora"))
    assert server.wanted["lora_weights"] == "me/lora" and server.uploaded == b""


def test_wavespeed(serve: Callable[[Answer], Provider], words: list[str], tmp_path: Path) -> None:
    server = serve(wavespeed)
    without = run("wavespeed_post_upload.py", server, *words)
    assert without.returncode == 1 and "--remote" in without.stderr and server.asked == []
    check_image(tmp_path, run("wavespeed_post_upload.py", server, *words, "--remote=https://bucket.test/lora"))
    assert server.wanted == {
        "prompt": PROMPT, "loras": [{"path": "https://bucket.test/lora", "scale": 1.0}], "num_inference_steps": 9,
        "guidance_scale": 2.5, "seed": 0, "size": "1024*768",
    }  # fmt: skip


def test_fal(serve: Callable[[Answer], Provider], words: list[str], tmp_path: Path) -> None:
    server = serve(fal)
    check_image(tmp_path, run("fal_post_upload.py", server, *words, "--resolution=[512]", "--seed=7"))
    assert server.wanted == {
        "prompt": PROMPT, "loras": [{"path": "https://cdn.test/lora", "scale": 1.0}], "num_inference_steps": 9,
        "guidance_scale": 2.5, "seed": 7, "image_size": {"width": 512, "height": 512}, "output_format": "png",
    }  # fmt: skip
    assert server.uploaded == (tmp_path / "checkpoint-4/pytorch_lora_weights.safetensors").read_bytes()
    keyed = dict(zip(server.asked, server.keys, strict=True))
    assert keyed["PUT", "/put?signed=1"] is None and keyed["POST", "/fal-ai/flux-lora"] == "Key secret"


def test_what_goes_wrong_is_said(serve: Callable[[Answer], Provider], words: list[str], tmp_path: Path) -> None:
    script = "replicate_post_upload.py"
    failed = run(script, serve(replicate), *words, "--prompt=fail")
    assert failed.returncode == 1 and "too bad" in failed.stderr
    refused = run(script, serve(lambda *_: None), *words)
    assert refused.returncode == 1 and "404" in refused.stderr
    keyless = run(script, serve(replicate), *words, key=None)
    assert keyless.returncode == 1 and "REPLICATE_API_TOKEN" in keyless.stderr
    other = run("fal_post_upload.py", serve(fal), *words, "--family=pixart_sigma")
    assert other.returncode == 1 and "pixart_sigma" in other.stderr
    lycoris = run("fal_post_upload.py", serve(fal), *words, "--lora-type=lycoris")
    assert lycoris.returncode == 1 and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    """What the script draws with the untouched model."""
    folder = tmp_path_factory.mktemp("base")
    ended = run(
        "use_second_gpu.py", None, "--gpu=", f"--model={NANO}", f"--output={folder}", "--model-type=full",
        f"--checkpoint={NANO}", "--prompt=red", "--steps=2", "--guidance=4.5", "--resolution=128",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return Image.open(folder / "step_last_0.png")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["standard", "full", "lycoris"])
def test_a_run_that_is_validated_on_another_device(
    shared: TinyWorld, tmp_path: Path, base_image: Image.Image, kind: str
) -> None:
    """From the placeholders of a run to an image that shows what was trained; here the other device is the CPU."""
    out = tmp_path / "out"
    script = (
        f"{sys.executable} {SCRIPTS / 'use_second_gpu.py'} --gpu= --model={NANO} --output={out} "
        "--checkpoint={local_checkpoint_path} --model-type={model_type} --lora-type={lora_type} --step={global_step} "
        "--prompt={validation_prompt} --steps={validation_num_inference_steps} --guidance={validation_guidance} "
        "--seed={validation_seed} --resolution={validation_resolution}"
    )
    options = {"model_type": "full"} if kind == "full" else {"model_type": "lora", "lora_type": kind, "lora_rank": 4}
    ran = shared.run(
        output_dir=f"second-{kind}", pretrained_model_name_or_path=NANO, cache_dir="nano", cache_dir_text="nano/text",
        validation_method="external-script", validation_external_script=script, validation_disable=False,
        validation_prompt="red", validation_resolution=128, validation_num_inference_steps=2, max_train_steps=2,
        validation_step_interval=0, learning_rate=1e-2, **options,
    )  # fmt: skip
    (hook,) = ran.of_type("training.hook")
    assert (ran.code, hook["data"]["status"]) == (ExitCode.DONE, "completed"), hook["data"]["output_tail"]
    trained = Image.open(out / "step_2_0.png")
    assert trained.size == (128, 128)
    assert trained.tobytes() != base_image.tobytes()
