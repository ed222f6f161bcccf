"""Tiny denoisers with adapters on them, and what the libraries themselves say of those adapters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
EVERYTHING = [
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *("norm.linear", "norm1.linear", "norm1_context.linear"),
]


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        in_channels=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ).eval()


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
        patch_size=2,
    ).eval()


@torch.no_grad()
def flux_output(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(1, 4, 16, generator=draw),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=draw),
        pooled_projections=torch.randn(1, 32, generator=draw),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


@torch.no_grad()
def pixart_output(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return model(
        torch.randn(1, 4, 8, 8, generator=draw),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=draw),
        timestep=torch.tensor([500]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def pipeline(model: nn.Module) -> FluxPipeline:
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    return FluxPipeline(None, vae, None, None, None, None, model)  # pyright: ignore[reportArgumentType]


def add_lora(model: nn.Module, *, rank: int = 4, alpha: float = 2.0, targets: list[str] | None = None, **more) -> None:
    """A LoRA with random values on both sides, so that ΔW is not zero."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or ATTENTION, **more), model)
    randomise(model, "lora_")


def add_lycoris(model: nn.Module, algo: str, **more) -> LycorisNetwork:
    preset = {"target_module": ["FluxAttention", "Attention"], "enable_conv": False}
    options = {"linear_dim": 4, "linear_alpha": 2.0} | more
    network = create_lycoris(model, 1.0, algo=algo, preset=_preset(preset), **options)
    network.apply_to()
    randomise(network, "")
    return network


def _preset(values: dict[str, object]) -> str:
    """lycoris takes a preset by name: its tables are shared, so this one is put there under its own."""
    from lycoris.config import PRESET

    PRESET["attention-of-tests"] = values
    return "attention-of-tests"


@torch.no_grad()
def randomise(model: nn.Module, part: str) -> None:
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


def live_peft(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def load_peft(model: nn.Module, path: Path) -> None:
    """With peft alone: PixArt's model and pipeline have no loader of their own."""
    with safe_open(path, framework="pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
    configuration = LoraConfig(**{key.removeprefix("transformer."): value for key, value in packed.items()})
    state = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    inject_adapter_in_model(configuration, model)
    assert set_peft_model_state_dict(model, state).unexpected_keys == []


def save_flux_lora(model: nn.Module, folder: Path) -> Path:
    """With diffusers' own writer."""
    configuration = model.peft_config["default"].to_dict()
    for key, value in configuration.items():
        if isinstance(value, set):
            configuration[key] = sorted(value)
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=configuration,
    )
    return folder / "pytorch_lora_weights.safetensors"
