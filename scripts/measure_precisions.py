"""Bytes, error and time of each quantised precision over a Flux of true width: one double and one single block.

Random Gaussian weights, 256 image and 512 text tokens; the error is ‖a − b‖ ÷ ‖b‖ of the output against bf16. Prints
rows for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from simpletuner.errors import UserError
from simpletuner.families.precision import PRECISIONS
from simpletuner.families.quantize import describe_quantised, load_quantised

KEPT = ("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.*", "proj_out")
BF16 = torch.bfloat16


def write_base(folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).to(BF16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.save_pretrained(folder, max_shard_size="300MB")


def build_batch(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, BF16)

    return {
        "hidden_states": noise(1, 256, 64).requires_grad_(),
        "encoder_hidden_states": noise(1, 512, 4096),
        "pooled_projections": noise(1, 768),
        "timestep": torch.tensor([0.5], device=device, dtype=BF16),
        "guidance": torch.tensor([1.0], device=device, dtype=BF16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)).to(device),
        "txt_ids": torch.zeros(512, 3, device=device),
    }


def measure(model: Any, batch: dict[str, Tensor], repeats: int) -> tuple[Tensor, float]:
    """The output, and the median seconds of a forward and a backward pass to the input; without `repeats` the first."""
    output, seconds = torch.empty(0), list[float]()
    for _ in range(repeats + 1):
        started = time.perf_counter()
        output = model(**batch, return_dict=False)[0]
        output.float().square().mean().backward()
        if output.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return output.detach().float(), median(seconds[min(1, repeats) :])


def load(folder: Path, name: str, device: torch.device) -> Any:
    if name == "bf16":
        model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=BF16)
        return model.requires_grad_(False).to(device)
    return load_quantised(FluxTransformer2DModel, folder, name, default_dtype=BF16, exclude=KEPT, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.set_num_threads(1)
    print("| precision | base, MB | bits per quantised weight | output error | forward + backward, s | loading, s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_base(folder)
        wanted = None
        for name in ["bf16", *asked.precisions]:
            started = time.perf_counter()
            try:
                model = load(folder, name, device)
            except UserError as error:
                print(f"| {name} | – | – | – | {error.message} | |")
                continue
            loading = time.perf_counter() - started
            output, seconds = measure(model, build_batch(device), asked.repeats)
            wanted = output if wanted is None else wanted
            error = ((output - wanted).norm() / wanted.norm()).item()
            told = describe_quantised(model)
            weights = told["quantised_weights"]
            bits = f"{told['quantised_bytes'] * 8 / weights:.2f}" if weights else "16"
            print(
                f"| {name} | {told['bytes'] / 1e6:.0f} | {bits} | {error:.4f} | {seconds:.2f} | {loading:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
