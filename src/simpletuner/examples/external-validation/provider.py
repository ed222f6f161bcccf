"""A hosted service that draws with a LoRA: its scripts differ in addresses and names of fields, not in what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import httpx2
from request import Request, build_parser, read_request, refuse


class Provider:
    """`scheme`: the word before the key in the Authorization header."""

    def __init__(self, base: str, key_name: str, scheme: str = "Bearer") -> None:
        key = os.environ.get(key_name)
        if not key:
            refuse(f"Set {key_name}: it is read from the environment, so that it is in no configuration and no event.")
        self.base = base
        self._http = httpx2.Client(headers={"Authorization": f"{scheme} {key}"}, timeout=60)

    def ask(self, method: str, address: str, **keys: Any) -> Any:
        answer = self._http.request(method, address, **keys)
        if answer.is_error:
            refuse(f"{method} {address}: {answer.status_code} {answer.text[:500]}")
        return answer.json()

    def wait(self, address: str, find_status: Callable[[Any], str], done: str, failed: tuple[str, ...]) -> Any:
        """Ask again until the work is done; whoever started this script limits how long."""
        pause_s = float(os.environ.get("POLL_S", "2"))
        while True:
            answer = self.ask("GET", address)
            status = find_status(answer)
            if status == done:
                return answer
            if status in failed:
                refuse(f"{address}: {status}: {str(answer)[:1000]}")
            time.sleep(pause_s)


def save_images(request: Request, addresses: list[str], first: int) -> int:
    """Download without the key: images lie on servers of their own. Returns the number for the next one."""
    for number, address in enumerate(addresses, first):
        suffix = PurePosixPath(urlsplit(address).path).suffix or ".png"
        answer = httpx2.get(address, follow_redirects=True, timeout=60)
        if answer.is_error:
            refuse(f"GET {address}: {answer.status_code}")
        file = request.file(number, suffix)
        file.write_bytes(answer.content)
        print(file)
    return first + len(addresses)


def read_lora_request(description: str | None, families: tuple[str, ...] = ("flux",)) -> Request:
    request = read_request(build_parser(description).parse_args())
    if not any(family in request.family for family in families):
        refuse(f"The model that is asked here is no {request.family or 'model of an unnamed family'}.")
    if (request.model_type, request.lora_type) != ("lora", "standard"):
        refuse("The model that is asked here takes plain LoRA files: --model_type lora, --lora_type standard.")
    return request


def find_lora(request: Request, upload: Callable[[Request], str] | None) -> str:
    """Where the service finds the file: uploaded by the run, in the hub repository, else uploaded now by `upload`."""
    if request.remote or request.huggingface:
        return request.remote or request.huggingface
    if upload is None or not request.checkpoint:
        refuse("There is no address of the LoRA file: give --remote or --huggingface.")
    return upload(request)


def lora_input(request: Request, lora: str) -> dict[str, Any]:
    """What services that run diffusers' LoRA pipelines call alike; each has its own way to name a size."""
    return {
        "prompt": request.prompt,
        "loras": [{"path": lora, "scale": 1.0}],
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "seed": request.seed,
    }
