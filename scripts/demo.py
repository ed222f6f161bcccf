"""`make demo`: the main job, through the public HTTP API of a real server, on real pictures.

It teaches the embedded nano model a new style: the model has only ever seen coloured flat icons and is fine-tuned on
the black-and-white drawings of the same names, some of which are held out. At the end it shows where the images of the
same prompts and seeds before and after are, the loss, and the held-out loss on fixed noise.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from scripts.icons import draw, fetch_packages, read_icons
from scripts.report import write_contact_sheet, write_loss_plot

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "demo-run"
DOWNLOADS = ROOT / "demo-run" / "downloads"
PICTURE_SIZE = 96
HELD_OUT_EVERY = 25
ENDS = ("completed", "stopped", "cancelled", "failed", "lost", "rejected")
PROMPTS = {
    "heart": "red heart",
    "cat": "cat face",
    "house": "house",
    "star": "star",
    "fish": "fish",
    "car": "automobile",
    "smile": "smiling face",
    "tree": "evergreen tree",
}
OPTIONS = {
    "--max_train_steps": 480,
    "--num_train_epochs": 0,
    "--train_batch_size": 16,
    "--learning_rate": 0.0005,
    "--optimizer": "adamw_bf16",
    "--lr_scheduler": "cosine",
    "--lr_warmup_steps": 20,
    "--seed": 1337,
    "--snr_gamma": 5,
    "--use_ema": True,
    "--ema_decay": 0.99,
    "--ema_validation": "ema_only",
    "--gradient_checkpointing": False,
    "--vae_batch_size": 16,
    "--validation_step_interval": 240,
    "--validation_num_inference_steps": 20,
    "--validation_seed": 12345,
    "--validation_negative_prompt": "",
    "--eval_steps_interval": 480,
    "--eval_timesteps": 10,
    "--checkpoint_step_interval": 240,
    "--checkpoints_total_limit": 2,
    "--output_dir": "output",
    "--data_backend_config": "ink-style/multidatabackend.json",
}


def main() -> int:
    started_at = time.monotonic()
    fresh_folder()
    train, held_out = write_pictures()
    say(f"{train} drawings to train on, {held_out} held out: {RUN / 'datasets'}")
    with serve() as client:
        say(f"Server: {client.base_url} (documentation: {client.base_url}docs)")
        prepare_environment(client)
        job_id = start(client)
        values = follow(client, job_id)
    sheet = write_contact_sheet(RUN / "output", list(PROMPTS), RUN / "before-after.png")
    plot = write_loss_plot(RUN / "output" / "training_metrics.jsonl", RUN / "loss.png")
    before, after = values[0], values[-1]
    print(f"""
Done in {time.monotonic() - started_at:.0f} s.

  Held-out loss, fixed noise   {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.1f} %)
  Images, before and after     {sheet}
  All validation images        {RUN / "output" / "validation_images"}
  Loss plot                    {plot}
  Checkpoints                  {RUN / "output"}/checkpoint-*
  The model, for diffusers     {RUN / "output" / "pipeline"}
""")
    return 0 if after < before else 1


def say(text: str) -> None:
    print(f"• {text}", flush=True)


def fresh_folder() -> None:
    """Keep the downloads of an earlier demo, nothing else."""
    RUN.mkdir(exist_ok=True)
    for path in RUN.iterdir():
        if path != DOWNLOADS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_pictures() -> tuple[int, int]:
    modules = fetch_packages(DOWNLOADS, ("ink",))
    counts = {"train": 0, "held-out": 0}
    for number, (name, svg) in enumerate(read_icons(modules, "ink")):
        part = "held-out" if number % HELD_OUT_EVERY == 0 else "train"
        folder = RUN / "datasets" / part
        folder.mkdir(parents=True, exist_ok=True)
        draw(svg, PICTURE_SIZE).save(folder / f"{name.replace('-', '_')}.png")
        counts[part] += 1
    return counts["train"], counts["held-out"]


@contextmanager
def serve() -> Generator[httpx2.Client]:
    """A real server on a free loopback port, its workspace being the demo's folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "simpletuner.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    with (RUN / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, "--workspace", str(RUN)], stdout=log, stderr=log, env=os.environ)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as client:
            wait_until_healthy(client, server)
            yield client
    finally:
        server.terminate()
        server.wait(20)


def wait_until_healthy(client: httpx2.Client, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if server.poll() is not None:
            sys.exit(f"The server ended:\n{(RUN / 'server.log').read_text()}")
        try:
            client.get("/health").raise_for_status()
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    sys.exit(f"The server does not answer:\n{(RUN / 'server.log').read_text()}")


def call(client: httpx2.Client, method: str, path: str, **arguments: Any) -> Any:
    answer = client.request(method, path, **arguments)
    if answer.is_error:
        sys.exit(f"{method} {path} answered {answer.status_code}:\n{answer.text}")
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def prepare_environment(client: httpx2.Client) -> None:
    """The tutorial's steps: create, describe the data, merge hyper-parameters, activate, validate."""
    identity = {"name": "ink-style", "model_family": "pixart_sigma", "model_flavour": "nano", "model_type": "full"}
    call(client, "POST", "/api/configs/environments", json=identity)
    picture = {"type": "local", "resolution": 64, "resolution_type": "pixel_area", "caption_strategy": "filename"}
    datasets = [
        {"id": "ink", "dataset_type": "image", "instance_data_dir": "datasets/train", **picture},
        {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "datasets/held-out", **picture},
        {"id": "captions", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    (RUN / "config" / "ink-style" / "multidatabackend.json").write_text(json.dumps(datasets, indent=2))
    config = call(client, "GET", "/api/configs/ink-style")["config"]
    merged = {**config, **OPTIONS, "--user_prompt_library": PROMPTS}
    body = {"name": "ink-style", "description": "Ink drawings", "tags": ["demo"], "config": merged}
    call(client, "PUT", "/api/configs/ink-style", json=body)
    call(client, "POST", "/api/configs/ink-style/activate")
    fields = {"__active_tab__": (None, "model"), "--num_train_epochs": (None, "0")}
    verdict = call(client, "POST", "/api/training/validate", files=fields)
    if "Configuration Valid" not in verdict:
        sys.exit(verdict)
    say("Configuration Valid")


def start(client: httpx2.Client) -> str:
    fields = {"__active_tab__": (None, "model"), "--num_train_epochs": (None, "0")}
    answer = call(client, "POST", "/api/training/start", files=fields)
    say(f"Job {answer['job_id']} {answer['status']}")
    return answer["job_id"]


def follow(client: httpx2.Client, job_id: str) -> list[float]:
    """Print what happens until the job ends; returns the held-out losses in order."""
    values: list[float] = []
    index = 0
    while True:
        query = {"since_index": index, "job_id": job_id, "wait": 30, "images": "url"}
        page = call(client, "GET", "/api/training/events", params=query)
        index = page["next_index"]
        for event in page["events"]:
            if event["type"] == "training.metric":
                values.append(event["data"]["value"])
            if line := line_of(event):
                say(line)
            if event["type"] == "job.status" and event["data"]["to"] not in (
                "queued",
                "starting",
                "running",
                "stopping",
            ):
                if event["data"]["to"] != "completed":
                    sys.exit(f"The job ended as {event['data']['to']}: {event['message']}\nLog: {RUN / '.simpletuner'}")
                return values


def line_of(event: dict[str, Any]) -> str:
    kind = event["type"]
    if kind == "training.progress":
        progress = event["progress"]
        metrics, step = progress["metrics"], progress["current"]
        if step % 10 and step not in (1, progress["total"]):
            return ""
        eta = progress["eta_seconds"]
        return f"step {step}/{progress['total']}  loss {metrics['loss']:.4f}  {eta:.0f} s left"
    if kind == "lifecycle.stage" and event["stage"]["status"] == "completed":
        return f"{event['stage']['label']}: done"
    return event["message"] if kind in ("training.metric", "training.checkpoint", "error") else ""


if __name__ == "__main__":
    sys.exit(main())
