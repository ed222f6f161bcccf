"""What a quantised base costs and saves: bytes, output error against bf16, seconds of forward and backward.

python -m scripts.make_wide_flux build/wide-flux && python -m scripts.measure_precisions build/wide-flux
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from simpletuner.errors import UserError
from simpletuner.families.flux.spec import SPEC
from simpletuner.families.quantize import PRECISIONS, load_quantised


def inputs(denoiser: nn.Module) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, 256, denoiser.config["in_channels"]),
        "encoder_hidden_states": (1, 128, denoiser.config["joint_attention_dim"]),
        "pooled_projections": (1, denoiser.config["pooled_projection_dim"]),
    }
    found: dict[str, object] = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }
    ids = {"img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(128, 3)}
    return found | ids | {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([1.0]), "return_dict": False}


def size_of(value: Tensor) -> int:
    """Bytes of a tensor, of a quantised one of its parts."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(size_of(vars(value).get(name, value)) for name in names if name in vars(value))
    state = vars(value).get("quant_state")
    return value.nbytes + (state.absmax.nbytes if state is not None else 0)


def measure(name: str, denoiser: nn.Module, wanted: Tensor | None) -> Tensor:
    given = inputs(denoiser)
    hidden = given["hidden_states"]
    assert isinstance(hidden, Tensor)
    hidden.requires_grad_()
    start = time.perf_counter()
    output = denoiser(**given)[0]
    output.float().square().sum().backward()
    seconds = time.perf_counter() - start
    size = sum(size_of(value) for value in denoiser.parameters()) / 1e9
    error = 0.0 if wanted is None else ((output - wanted).float().norm() / wanted.float().norm()).item()
    print(f"| {name} | {size:.2f} GB | {100 * error:.2f} % | {seconds:.2f} s |", flush=True)
    return output.detach()


def main() -> None:
    folder = Path(sys.argv[1]) / "transformer"
    whole = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).requires_grad_(False)
    print("| precision | base | output error | forward + backward |\n|---|---|---|---|")
    wanted = measure("bf16", whole, None)
    del whole
    for name in PRECISIONS:
        try:
            denoiser = load_quantised(
                FluxTransformer2DModel, folder, name, dtype=torch.bfloat16, unquantised=SPEC.unquantised
            )
        except UserError as error:
            print(f"| {name} | – | – | {error.hint} |", flush=True)
            continue
        measure(name, denoiser, wanted)


if __name__ == "__main__":
    main()
