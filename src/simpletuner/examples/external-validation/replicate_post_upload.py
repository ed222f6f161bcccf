"""Draw the validation prompt with the checkpoint's LoRA on Replicate. Key: REPLICATE_API_TOKEN.

A local checkpoint is uploaded to Replicate's file store, where it is kept for a day.
"""

from __future__ import annotations

import os
from math import gcd
from typing import Any

from provider import Provider, find_lora, read_lora_request, save_images
from request import Request

MODEL = os.environ.get("REPLICATE_MODEL", "black-forest-labs/flux-dev-lora")


def main() -> None:
    request = read_lora_request(__doc__)
    replicate = Provider(os.environ.get("REPLICATE_BASE_URL", "https://api.replicate.com"), "REPLICATE_API_TOKEN")

    def upload(request: Request) -> str:
        with request.weights.open("rb") as file:
            answer = replicate.ask("POST", f"{replicate.base}/v1/files", files={"content": file})
        return answer["urls"]["get"]

    lora, number = find_lora(request, upload), 0
    for width, height in request.sizes:
        divisor = gcd(width, height)
        wanted: dict[str, Any] = {
            "prompt": request.prompt,
            "lora_weights": lora,
            "num_inference_steps": request.steps,
            "guidance": request.guidance,
            "seed": request.seed,
            "aspect_ratio": f"{width // divisor}:{height // divisor}",
            "output_format": "png",
        }
        made = replicate.ask("POST", f"{replicate.base}/v1/models/{MODEL}/predictions", json={"input": wanted})
        address = f"{replicate.base}/v1/predictions/{made['id']}"
        done = replicate.wait(address, lambda answer: answer["status"], "succeeded", ("failed", "canceled"))
        output = done["output"]
        number = save_images(request, [output] if isinstance(output, str) else output, number)


if __name__ == "__main__":
    main()
