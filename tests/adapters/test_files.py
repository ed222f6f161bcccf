"""What is read from an adapter file, against what the libraries say of the same adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from denoisers import add_lora, add_lycoris, flux, live_peft, pixart, save_flux_lora
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.adapters.file import Kind, read_adapter
from simpletuner.adapters.names import FAMILIES, underscored
from simpletuner.adapters.readers import family_fits, keys_of, readers_of
from simpletuner.errors import UserError


@pytest.mark.parametrize(("family", "build"), [("flux", flux), ("pixart_sigma", pixart)])
def test_the_names_of_a_family_are_those_of_its_denoiser(family: str, build) -> None:
    names = FAMILIES[family].all_modules()
    model = build()
    live = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert live - names == set()
    # What the table has in addition: numbers of blocks beyond the tiny model's, and PixArt's embedders of size.
    additional = {name for name in names - live if not re.search(r"blocks\.([2-9]|\d\d)\.", name)}
    assert {name for name in additional if not re.search(r"(resolution|aspect_ratio)_embedder", name)} == set()
    assert {module for module, meant in underscored(names).items() if len(meant) > 1} == set()


def test_a_peft_file_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    model = flux()
    add_lora(model, alpha=2.0, rank_pattern={"to_out.0": 2}, alpha_pattern={"add_q_proj": 5.0})
    adapter = read_adapter(save_flux_lora(model, tmp_path))
    live = live_peft(model)
    assert (adapter.kind, adapter.family, adapter.algorithms) == (Kind.PEFT, None, ("locon",))
    assert (adapter.ranks, adapter.alphas, adapter.dtypes) == ((2, 4), (2.0, 5.0), ("float32",))
    assert {module.module for module in adapter.modules} == set(live)
    for module in adapter.modules:
        torch.testing.assert_close(module.delta(), live[module.module], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.transformer.", "unet."])
def test_other_prefixes_of_peft(tmp_path: Path, prefix: str) -> None:
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    save_file({f"{prefix}a.b.lora_A.weight": down, f"{prefix}a.b.lora_B.weight": up}, tmp_path / "a.safetensors")
    (module,) = read_adapter(tmp_path / "a.safetensors").modules
    assert module.module == "a.b"
    torch.testing.assert_close(module.delta(), up @ down)


@pytest.mark.parametrize(
    ("algo", "more", "rank"),
    [
        ("lora", {}, 4),
        ("loha", {}, 4),
        ("lokr", {"factor": 4, "linear_dim": 2}, 2),
        ("lokr", {"factor": 4, "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True}, None),
        ("full", {}, None),
    ],
)
def test_a_lycoris_file_is_read_as_lycoris_reads_it(tmp_path: Path, algo: str, more: dict, rank: int | None) -> None:
    network = add_lycoris(flux(), algo, **more)
    path = tmp_path / "a.safetensors"
    wanted = {module.lora_name: module.get_diff_weight()[0].detach().reshape(module.shape) for module in network.loras}
    network.save_weights(str(path), None, {"simpletuner_family": "flux"})
    adapter = read_adapter(path, family="flux")
    assert (adapter.kind, adapter.family) == (Kind.LYCORIS, "flux")
    assert adapter.algorithms == ({"lora": "locon"}.get(algo, algo),)
    assert {module.unit for module in adapter.modules} == set(wanted)
    for module in adapter.modules:
        assert module.rank == rank
        torch.testing.assert_close(module.delta(), wanted[module.unit], rtol=0, atol=1e-5)
    assert readers_of(adapter, keys_of(path), "flux") == ("lycoris", "comfyui")


@pytest.mark.parametrize(
    ("algo", "more"),
    [("diag-oft", {"constraint": 0}), ("boft", {}), ("glora", {}), ("lora", {"dora_wd": True})],
)
def test_what_depends_on_the_base_weight_asks_for_it(tmp_path: Path, algo: str, more: dict) -> None:
    model = flux()
    network = add_lycoris(model, algo, **more)
    network.save_weights(str(tmp_path / "a.safetensors"), None, None)
    bases = {f"lycoris_{name.replace('.', '_')}": module for name, module in flux().named_modules()}
    module = read_adapter(tmp_path / "a.safetensors").modules[0]
    with pytest.raises(UserError) as raised:
        module.delta()
    assert raised.value.code == "adapter_needs_base"
    (live,) = [lora for lora in network.loras if lora.lora_name == module.unit]
    base = bases[module.unit].weight.detach()
    wanted = live.get_merged_weight()[0] - base
    torch.testing.assert_close(module.delta(base), wanted.detach(), rtol=0, atol=1e-5)


def test_readers_of_a_file_whose_alpha_is_in_the_header(tmp_path: Path) -> None:
    for alpha, readers in ((2.0, ("diffusers",)), (4.0, ("diffusers", "comfyui"))):
        model = flux()
        add_lora(model, rank=4, alpha=alpha)
        path = save_flux_lora(model, tmp_path / str(alpha))
        adapter = read_adapter(path)
        assert family_fits(adapter) == ("flux",)
        assert readers_of(adapter, keys_of(path), "flux") == readers


@pytest.mark.parametrize(
    ("old", "new"),
    [("lora_A.weight", "lora_X.weight"), ("lora_B.weight", "lora_magnitude_vector"), ("transformer.", "text_encoder.")],
)
def test_unknown_keys_are_named(tmp_path: Path, old: str, new: str) -> None:
    model = flux()
    add_lora(model)
    path = save_flux_lora(model, tmp_path)
    tensors = load_file(path)
    first = next(key for key in tensors if old in key)
    tensors[first.replace(old, new)] = tensors.pop(first)
    save_file(tensors, path)
    with pytest.raises(UserError) as raised:
        read_adapter(path)
    assert raised.value.code == "adapter_unknown_keys"
    assert first.replace(old, new) in raised.value.message


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in ("text.safetensors", "model.safetensors", "absent.safetensors"):
        with pytest.raises(UserError) as raised:
            read_adapter(tmp_path / name)
        assert raised.value.code == "adapter_unreadable"


def test_another_family(tmp_path: Path) -> None:
    weights = {"transformer.a.lora_A.weight": torch.zeros(1, 2), "transformer.a.lora_B.weight": torch.zeros(2, 1)}
    for header, stated in (
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "stable-diffusion-xl-v1-base"),
        ({"simpletuner_family": "pixart_sigma", "modelspec.architecture": "x"}, "pixart_sigma"),
    ):
        save_file(weights, tmp_path / "a.safetensors", metadata=header)
        assert read_adapter(tmp_path / "a.safetensors").family == stated
        with pytest.raises(UserError) as raised:
            read_adapter(tmp_path / "a.safetensors", family="sd3")
        assert raised.value.code == "adapter_other_family"
