"""Frozen bases in few bits. training.md §4.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from test_adapters import answer
from torch import nn

from simpletuner.errors import UserError
from simpletuner.families.flux.spec import SPEC as FLUX
from simpletuner.families.pixart_sigma.spec import SPEC as PIXART
from simpletuner.families.quantize import PRECISIONS, load_quantised

TINY: dict[str, Any] = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 128, "pooled_projection_dim": 64, "in_channels": 16, "axes_dims_rope": (8, 12, 12),
    "guidance_embeds": True,
}  # fmt: skip
ON_CPU = ("int8-quanto", "int4-quanto", "fp8-quanto", "int8-torchao", "fp8wo-torchao", "nf4-bnb")
ERROR = {"int8-quanto": 0.02, "int8-torchao": 0.02, "fp8-quanto": 0.08, "fp8wo-torchao": 0.08}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    FluxTransformer2DModel(**TINY).to(torch.bfloat16).save_pretrained(place, max_shard_size="400KB")
    assert len(list(place.glob("*.safetensors"))) > 1, "in shards, as large models are"
    return place


def loaded(folder: Path, precision: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_quantised(FluxTransformer2DModel, folder, precision, dtype=dtype, unquantised=FLUX.unquantised)


@pytest.mark.parametrize("precision", ON_CPU)
def test_a_base_in_few_bits(folder: Path, precision: str) -> None:
    model = loaded(folder, precision, torch.bfloat16)
    whole = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    kept = {"x_embedder", "context_embedder", "proj_out", "norm_out.linear", "time_text_embed.text_embedder.linear_1"}
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, whole.get_submodule(name).weight), name
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = answer(model).float(), answer(whole).float()
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 0 < error < ERROR.get(precision, 0.3), error


def test_int8_is_the_rows_own_scale() -> None:
    """s = max|w| / 127 per output row; Gaussian rows lose at most 1 %."""
    torch.manual_seed(1)
    linear = nn.Linear(512, 64, bias=False).requires_grad_(False)
    weight = linear.weight.clone()
    scale = weight.abs().amax(1, keepdim=True) / 127
    wanted = torch.round(weight / scale) * scale
    found: Any = PRECISIONS["int8-quanto"][0](linear)
    assert torch.allclose(found.weight.dequantize(), wanted, atol=1e-6)
    assert ((found.weight.dequantize() - weight).norm() / weight.norm()).item() < 0.01


@pytest.mark.parametrize("precision", sorted(set(PRECISIONS) - set(ON_CPU)))
def test_what_this_device_cannot_is_said_before_reading(tmp_path: Path, precision: str) -> None:
    with pytest.raises(UserError) as raised:
        load_quantised(FluxTransformer2DModel, tmp_path, precision, dtype=torch.bfloat16, unquantised=())
    assert (raised.value.code, raised.value.exit_code) == ("precision_unavailable", 69) and raised.value.hint


def test_a_missing_weight_is_named(folder: Path, tmp_path: Path) -> None:
    whole = FluxTransformer2DModel(**TINY)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "x_embedder.bias"}, file)
    with pytest.raises(UserError) as raised:
        loaded(tmp_path, "int8-quanto")
    assert raised.value.code == "model_part_missing" and "x_embedder.bias" in raised.value.message


def test_buffers_that_no_file_holds_are_right(model: Path) -> None:
    folder = model / "transformer"
    found: Any = load_quantised(
        PixArtTransformer2DModel, folder, "int8-quanto", dtype=torch.float32, unquantised=PIXART.unquantised
    )
    whole = PixArtTransformer2DModel.from_pretrained(folder)
    assert torch.equal(found.pos_embed.pos_embed, whole.pos_embed.pos_embed)
    assert sum("QLinear" in type(module).__name__ for module in found.modules()) == 20
