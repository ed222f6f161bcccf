"""Draw the validation prompt with the checkpoint's LoRA on fal.ai. Key: FAL_KEY.

A local checkpoint is uploaded to fal's own store.
"""

from __future__ import annotations

import os

import httpx2
from provider import Provider, find_lora, lora_input, read_lora_request, save_images
from request import WEIGHTS, Request, refuse

MODEL = os.environ.get("FAL_MODEL", "fal-ai/flux-lora")
STORE = os.environ.get("FAL_STORE_URL", "https://rest.alpha.fal.ai")


def main() -> None:
    request = read_lora_request(__doc__)
    fal = Provider(os.environ.get("FAL_BASE_URL", "https://queue.fal.run"), "FAL_KEY", "Key")

    def upload(request: Request) -> str:
        kind = "application/octet-stream"
        asked = {"content_type": kind, "file_name": WEIGHTS}
        place = fal.ask("POST", f"{STORE}/storage/upload/initiate?storage_type=fal-cdn-v3", json=asked)
        content = request.weights.read_bytes()
        # The address is signed: it needs no key.
        answer = httpx2.put(place["upload_url"], content=content, headers={"Content-Type": kind}, timeout=600)
        if answer.is_error:
            refuse(f"The upload to fal.ai failed: {answer.status_code} {answer.text[:500]}")
        return place["file_url"]

    lora, number = find_lora(request, upload), 0
    for width, height in request.sizes:
        wanted = lora_input(request, lora) | {
            "image_size": {"width": width, "height": height},
            "output_format": "png",
        }
        made = fal.ask("POST", f"{fal.base}/{MODEL}", json=wanted)
        address = f"{fal.base}/{MODEL}/requests/{made['request_id']}"
        fal.wait(f"{address}/status", lambda answer: answer["status"], "COMPLETED", ("FAILED", "CANCELED"))
        images: list[dict[str, str]] = fal.ask("GET", address)["images"]
        number = save_images(request, [image["url"] for image in images], number)


if __name__ == "__main__":
    main()
