"""Draw the validation prompt with a checkpoint on another GPU of this machine, while training goes on on its own.

Reads full checkpoints, LoRA and LyCORIS. Without a GPU of that number it draws on the CPU.
"""

from __future__ import annotations

import json
import os
from inspect import signature
from pathlib import Path
from typing import Any, cast

from request import Request, build_parser, read_request, refuse


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--model", required=True, help="hub name or folder of the base model")
    parser.add_argument("--gpu", default="1", help="number of the GPU, as nvidia-smi counts")
    arguments = parser.parse_args()
    request = read_request(arguments)
    if not Path(request.checkpoint).is_dir():
        refuse(f"There is no checkpoint in {request.checkpoint!r}.")
    # Before torch is imported, which would look at the trainer's.
    os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpu
    draw(request, arguments.model)


def draw(request: Request, model: str) -> None:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    if request.model_type == "full":
        folder = Path(request.checkpoint) / "transformer"
        pipeline.transformer = type(pipeline.transformer).from_pretrained(folder, torch_dtype=dtype)
    elif request.lora_type == "lycoris":
        put_lycoris(pipeline.transformer, request.weights, dtype)
    else:
        put_lora(pipeline, request.weights)
    pipeline.to(device)
    # PixArt's pipeline would otherwise draw in the nearest of its own sizes.
    binning = "use_resolution_binning"
    exact = {binning: False} if binning in signature(pipeline.__call__).parameters else {}
    for number, (width, height) in enumerate(request.sizes):
        image = pipeline(
            request.prompt,
            width=width,
            height=height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            **exact,
        ).images[0]
        file = request.file(number, ".png")
        image.save(file)
        print(file)


def put_lycoris(denoiser: Any, file: Path, dtype: Any) -> None:
    from lycoris.wrapper import create_lycoris_from_weights

    network, _ = create_lycoris_from_weights(1.0, str(file), denoiser)
    network.apply_to()
    network.to(dtype=dtype)
    denoiser.add_module("lycoris", network)


def put_lora(pipeline: Any, file: Path) -> None:
    """Through the pipeline; where diffusers has no reader for it (PixArt), through peft, as the file's header says."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils.save_and_load import set_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file

    if isinstance(pipeline, LoraBaseMixin):
        cast(Any, pipeline).load_lora_weights(file.parent, weight_name=file.name)
        return
    with safe_open(file, "pt") as opened:
        header: dict[str, Any] = json.loads(opened.metadata()["lora_adapter_metadata"])
    settings = {key.removeprefix("transformer."): value for key, value in header.items()}
    inject_adapter_in_model(LoraConfig(**settings), pipeline.transformer)
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    set_peft_model_state_dict(pipeline.transformer, tensors)


if __name__ == "__main__":
    main()
