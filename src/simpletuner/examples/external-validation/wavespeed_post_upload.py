"""Draw the validation prompt with the checkpoint's LoRA on WaveSpeed. Key: WAVESPEED_API_KEY.

WaveSpeed's own store takes no LoRA files: the address of the upload, or a hub repository, is needed.
"""

from __future__ import annotations

import os

from provider import Provider, find_lora, lora_input, read_lora_request, save_images

MODEL = os.environ.get("WAVESPEED_MODEL", "wavespeed-ai/flux-dev-lora")


def main() -> None:
    request = read_lora_request(__doc__)
    wavespeed = Provider(os.environ.get("WAVESPEED_BASE_URL", "https://api.wavespeed.ai"), "WAVESPEED_API_KEY")
    lora, number = find_lora(request, None), 0
    for width, height in request.sizes:
        wanted = lora_input(request, lora) | {
            "size": f"{width}*{height}",
        }
        made = wavespeed.ask("POST", f"{wavespeed.base}/api/v3/{MODEL}", json=wanted)
        address = f"{wavespeed.base}/api/v3/predictions/{made['data']['id']}/result"
        done = wavespeed.wait(address, lambda answer: answer["data"]["status"], "completed", ("failed",))
        number = save_images(request, done["data"]["outputs"], number)


if __name__ == "__main__":
    main()
