"""Files written anew for another program: ΔW stays, and the program's real loader, where there is one, agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from denoisers import (
    ATTENTION,
    EVERYTHING,
    add_lora,
    add_lycoris,
    flux,
    flux_output,
    live_peft,
    load_peft,
    pipeline,
    pixart,
    pixart_output,
    save_flux_lora,
)
from diffusers import FluxPipeline
from lycoris import create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters.convert import convert
from simpletuner.adapters.file import read_adapter
from simpletuner.adapters.readers import check_file, family_fits, keys_of, readers_of
from simpletuner.errors import UserError


def as_calls(live: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    return {name: delta.clone for name, delta in live.items()}


def converted(source: Path, to: str, target: Path, family: str = "flux") -> Path:
    convert(read_adapter(source), to, target, family)
    return target


def assert_same_output(model: nn.Module, wanted: Tensor) -> None:
    torch.testing.assert_close(flux_output(model), wanted, rtol=0, atol=1e-5)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Tensor]:
    """(file as diffusers writes it, ΔW, output) of an adapter on everything, alpha ÷ rank not one and not the same."""
    model = flux()
    add_lora(
        model,
        alpha=2.0,
        targets=EVERYTHING,
        rank_pattern={"to_out.0": 2, "to_k": 3},
        alpha_pattern={"add_q_proj": 3.0, "proj_mlp": 8.0},
    )
    return save_flux_lora(model, tmp_path), live_peft(model), flux_output(model)


@pytest.mark.parametrize(
    "route", [("diffusers",), ("comfyui",), ("kohya", "diffusers"), ("comfyui", "kohya", "comfyui")]
)
def test_diffusers_loads_what_was_converted(tmp_path: Path, trained, route: tuple[str, ...]) -> None:
    path, live, wanted = trained
    for number, to in enumerate(route):
        path = converted(path, to, tmp_path / f"{number}.safetensors")
        assert check_file(path, to, as_calls(live)) == []
    model = flux()
    assert not torch.allclose(flux_output(model), wanted, atol=1e-3)
    pipeline(model).load_lora_weights(path)
    assert_same_output(model, wanted)


def test_the_header_is_what_diffusers_writes(tmp_path: Path, trained) -> None:
    path, _, wanted = trained
    target = converted(path, "diffusers", tmp_path / "again.safetensors")
    model = flux()
    # Without use_safetensors diffusers 0.42 takes the tensors and leaves the header, and the alphas, unread.
    model.load_lora_adapter(str(target), prefix="transformer", use_safetensors=True)
    assert_same_output(model, wanted)
    with safe_open(target, framework="pt") as file:
        header = file.metadata()
    assert header["simpletuner_family"] == "flux"
    assert header["modelspec.architecture"] == "flux-1-dev/lora"
    assert '"transformer.lora_alpha": 2' in header["lora_adapter_metadata"]


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_alpha_survives_every_conversion(tmp_path: Path, alpha: float) -> None:
    model = flux()
    add_lora(model, rank=4, alpha=alpha, targets=ATTENTION)
    path = save_flux_lora(model, tmp_path)
    for number, to in enumerate(("kohya", "comfyui", "kohya", "diffusers", "comfyui", "diffusers")):
        path = converted(path, to, tmp_path / f"{number}.safetensors")
    adapter = read_adapter(path, family="flux")
    assert (adapter.alphas, adapter.ranks) == ((alpha,), (4,))
    original = {module.module: module for module in read_adapter(save_flux_lora(model, tmp_path)).modules}
    for module in adapter.modules:
        for weight, value in module.weights.items():
            assert torch.equal(value, original[module.module].weights[weight])


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    model = flux()
    add_lora(model, alpha=2.0)
    path = save_flux_lora(model, tmp_path)
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    for to in ("diffusers", "comfyui", "kohya"):
        assert read_adapter(converted(path, to, tmp_path / f"{to}.safetensors")).dtypes == ("bfloat16",)


def test_a_part_of_an_attention_alone(tmp_path: Path) -> None:
    model = flux()
    add_lora(model, targets=["to_v", "add_k_proj", "proj_mlp"])
    path, live = save_flux_lora(model, tmp_path), live_peft(model)
    kohya = converted(path, "kohya", tmp_path / "kohya.safetensors")
    assert check_file(kohya, "kohya", as_calls(live), family="flux") == []
    back = read_adapter(converted(kohya, "diffusers", tmp_path / "back.safetensors"))
    assert {module.module for module in back.modules} == set(live)
    assert back.ranks == (4,)


def test_diffusers_reads_the_double_blocks_of_kohya(tmp_path: Path) -> None:
    """The single blocks' fused layer is of the full width there: see the next test."""
    model = flux()
    add_lora(
        model,
        alpha=1.5,
        targets=r"transformer_blocks\.\d\.(attn\.(to_[qkv]|to_out\.0|add_._proj|to_add_out)|ff.*net\.(0\.proj|2)|norm1(_context)?\.linear)",
    )
    live, wanted = live_peft(model), flux_output(model)
    path = converted(save_flux_lora(model, tmp_path), "kohya", tmp_path / "kohya.safetensors")
    model = flux()
    pipeline(model).load_lora_weights(path)
    assert live.keys() == {
        name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")
    }
    assert_same_output(model, wanted)


def test_diffusers_reads_the_single_blocks_of_kohya(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    tensors: dict[str, Tensor] = {}
    for name, rows in shapes.items():
        prefix = f"transformer.single_transformer_blocks.37.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, 3072, generator=draw)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=draw)
        tensors[f"{prefix}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "comfyui.safetensors")
    path = converted(tmp_path / "comfyui.safetensors", "kohya", tmp_path / "kohya.safetensors")
    read = FluxPipeline.lora_state_dict(str(path))
    x = torch.randn(3072, 3, generator=draw)
    for name in shapes:
        prefix = f"transformer.single_transformer_blocks.37.{name}"
        found = read[f"{prefix}.lora_B.weight"] @ (read[f"{prefix}.lora_A.weight"] @ x)
        wanted = tensors[f"{prefix}.lora_B.weight"] @ (tensors[f"{prefix}.lora_A.weight"] @ x) * 0.25
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_dense_fused_layer_is_shared_out(tmp_path: Path) -> None:
    """As kohya itself trains it: q, k and v from one product."""
    down, up = torch.randn(6, 32), torch.randn(96, 6)
    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    kohya = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    path = converted(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "diffusers.safetensors")
    found = {module.module.rpartition(".")[2]: module.delta() for module in read_adapter(path).modules}
    whole = torch.cat([found["add_q_proj"], found["add_k_proj"], found["add_v_proj"]])
    torch.testing.assert_close(whole, up @ down * 0.5, rtol=0, atol=1e-5)


def test_the_last_layer_is_turned_round(tmp_path: Path) -> None:
    """shift and scale stand the other way round in the original code; diffusers' own reader turns them too."""
    down, up = torch.randn(2, 32), torch.randn(64, 2)
    prefix = "transformer.norm_out.linear"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, tmp_path / "a.safetensors")
    path = converted(tmp_path / "a.safetensors", "kohya", tmp_path / "kohya.safetensors")
    assert torch.equal(load_file(path)["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], up.roll(32, 0))
    read = FluxPipeline.lora_state_dict(str(path))
    assert torch.equal(read["norm_out.linear.lora_B.weight"], up)
    back = converted(path, "diffusers", tmp_path / "back.safetensors")
    assert torch.equal(load_file(back)[f"{prefix}.lora_B.weight"], up)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
def test_a_lycoris_lora_as_a_plain_one(tmp_path: Path, to: str) -> None:
    model = flux()
    network = add_lycoris(model, "lora", linear_dim=4, linear_alpha=0.5)
    wanted = flux_output(model)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), None, None)
    target = converted(path, to, tmp_path / "plain.safetensors")
    if to == "kohya":
        target = converted(target, "comfyui", tmp_path / "read.safetensors")
    model = flux()
    pipeline(model).load_lora_weights(target)
    assert_same_output(model, wanted)


@pytest.mark.parametrize(("algo", "more"), [("lokr", {"factor": 4}), ("loha", {}), ("full", {}), ("diag-oft", {})])
def test_other_algorithms_go_to_comfyui_only(tmp_path: Path, algo: str, more: dict) -> None:
    model = flux()
    network = add_lycoris(model, algo, **more)
    wanted = flux_output(model)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), None, None)
    for to in ("diffusers", "kohya"):
        with pytest.raises(UserError) as raised:
            converted(path, to, tmp_path / f"{to}.safetensors")
        assert raised.value.code == "export_not_expressible"
        assert not (tmp_path / f"{to}.safetensors").exists()
    target = converted(path, "comfyui", tmp_path / "comfyui.safetensors")
    assert "comfyui" in readers_of(read_adapter(target), keys_of(target), "flux")
    # For Flux ComfyUI reads lycoris' own names, so that lycoris reads the file as well.
    model = flux()
    loaded, _ = create_lycoris_from_weights(1.0, str(target), model)
    loaded.apply_to()
    assert_same_output(model, wanted)


def test_pixart(tmp_path: Path) -> None:
    model = pixart()
    add_lora(model, alpha=2.0, targets=["to_k", "to_q", "to_v", "to_out.0", "pos_embed.proj", "linear_1"])
    live, wanted = live_peft(model), pixart_output(model)
    path = save_flux_lora(model, tmp_path)
    assert family_fits(read_adapter(path)) == ("pixart_sigma",)
    comfyui = converted(path, "comfyui", tmp_path / "comfyui.safetensors", "pixart_sigma")
    assert check_file(comfyui, "comfyui", as_calls(live)) == []
    back = converted(comfyui, "diffusers", tmp_path / "back.safetensors", "pixart_sigma")
    assert check_file(back, "diffusers", as_calls(live)) == []
    model = pixart()
    load_peft(model, back)
    torch.testing.assert_close(pixart_output(model), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UserError) as raised:
        converted(path, "kohya", tmp_path / "kohya.safetensors", "pixart_sigma")
    assert raised.value.code == "export_not_expressible"


def test_pixart_lycoris_gets_comfyuis_names(tmp_path: Path) -> None:
    network = add_lycoris(pixart(), "lokr", factor=4)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), None, None)
    target = converted(path, "comfyui", tmp_path / "comfyui.safetensors", "pixart_sigma")
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys_of(target))


def test_another_family_is_refused(tmp_path: Path, trained) -> None:
    path, _, _ = trained
    with pytest.raises(UserError) as raised:
        converted(path, "comfyui", tmp_path / "a.safetensors", "pixart_sigma")
    assert raised.value.code == "adapter_unknown_keys"
    known = converted(path, "comfyui", tmp_path / "a.safetensors")
    with pytest.raises(UserError) as raised:
        converted(known, "comfyui", tmp_path / "b.safetensors", "pixart_sigma")
    assert raised.value.code == "adapter_other_family"
