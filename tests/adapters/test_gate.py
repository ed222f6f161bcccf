"""The export gate: a saved file is whole for its reader, or says which key is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from denoisers import add_lora, add_lycoris, flux, live_peft, save_flux_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters.convert import convert
from simpletuner.adapters.file import read_adapter
from simpletuner.adapters.names import FLUX
from simpletuner.adapters.product import Product, fused, relative_error
from simpletuner.adapters.readers import READERS, check_file
from simpletuner.errors import UserError

Live = dict[str, Callable[[], Tensor]]


@pytest.fixture(params=["diffusers", "comfyui", "kohya", "lycoris"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str, Live]:
    """(file, its reader, live ΔW)."""
    model = flux()
    path = tmp_path / "a.safetensors"
    if request.param == "lycoris":
        network = add_lycoris(model, "lokr", factor=4, linear_dim=2)
        network.save_weights(str(path), None, {"simpletuner_family": "flux"})
        by_name = {f"lycoris_{n.replace('.', '_')}": n for n, m in flux().named_modules() if isinstance(m, nn.Linear)}
        return path, request.param, {by_name[m.lora_name]: lambda m=m: m.get_diff_weight()[0] for m in network.loras}
    add_lora(model)
    live: Live = {name: delta.clone for name, delta in live_peft(model).items()}
    convert(read_adapter(save_flux_lora(model, tmp_path)), request.param, path, "flux")
    return path, request.param, live


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=dict(read_adapter_header(path)))


def read_adapter_header(path: Path) -> dict[str, str]:
    return dict(read_adapter(path, strict=False).metadata)


def codes(problems) -> set[str]:
    return {problem.code for problem in problems}


def test_a_whole_file_passes(saved: tuple[Path, str, Live]) -> None:
    path, reader, live = saved
    assert check_file(path, reader, live) == []


def test_a_renamed_key_is_named(saved: tuple[Path, str, Live]) -> None:
    path, reader, live = saved
    old = next(key for key in load_file(path) if not key.endswith("alpha"))
    new = old.replace("blocks", "bricks", 1)
    rewrite(path, lambda tensors: tensors.update({new: tensors.pop(old)}))
    problems = check_file(path, reader, live)
    assert codes(problems) == {"export_mismatch"}
    assert any(new in problem.message for problem in problems)


def test_a_scaled_tensor_is_named(saved: tuple[Path, str, Live]) -> None:
    path, reader, live = saved
    key = next(key for key in load_file(path) if key.endswith((".lora_B.weight", ".lora_up.weight", ".lokr_w1")))
    rewrite(path, lambda tensors: tensors[key].mul_(1.01))
    (problem,) = check_file(path, reader, live)
    assert problem.code == "export_mismatch"
    assert key.rpartition(".lo")[0] in problem.message
    assert check_file(path, reader, live, tolerance=0.02) == []


def test_a_module_that_was_not_saved_is_named(saved: tuple[Path, str, Live]) -> None:
    path, reader, live = saved
    (problem,) = check_file(path, reader, live | {"context_embedder": next(iter(live.values()))})
    assert "context_embedder has no key" in problem.message


def test_another_readers_file_does_not_pass(tmp_path: Path) -> None:
    """Alpha in the header says nothing to ComfyUI, which knows the keys."""
    model = flux()
    add_lora(model, rank=4, alpha=2.0)
    live: Live = {name: delta.clone for name, delta in live_peft(model).items()}
    path = save_flux_lora(model, tmp_path)
    assert check_file(path, "diffusers", live, family="flux") == []
    problems = check_file(path, "comfyui", live, family="flux")
    assert len(problems) == len(live)
    assert all("off by" in problem.message for problem in problems)


def test_not_a_number_does_not_pass(saved: tuple[Path, str, Live]) -> None:
    path, reader, live = saved
    key = next(key for key in load_file(path) if key.endswith((".lora_B.weight", ".lora_up.weight", ".lokr_w1")))
    rewrite(path, lambda tensors: tensors[key].fill_(float("nan")))
    assert codes(check_file(path, reader, live)) == {"export_mismatch"}


def test_products_are_compared_as_what_they_multiply_to() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (
        Product(torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw), scale) for scale in (0.5, 3.0)
    )
    dense = (first.dense(), second.dense())
    assert first.norm() == pytest.approx(float(dense[0].norm()), rel=1e-5)
    assert relative_error(first, second) == pytest.approx(relative_error(*dense), rel=1e-5)
    assert relative_error(first, first) < 1e-6
    layer = FLUX.all_layers()["single_blocks_1_linear1"]
    parts = {
        part.module: Product(torch.randn(part.rows * 5, 2, generator=draw), torch.randn(2, 5, generator=draw), 0.5)
        for part in layer.parts[1:]
    }
    whole = fused(layer, {name: part.dense() for name, part in parts.items()})
    assert relative_error(fused(layer, parts), whole) < 1e-6
    nothing = Product(torch.zeros(6, 2), torch.randn(2, 5))
    assert (relative_error(nothing, nothing), relative_error(first, nothing)) == (0.0, float("inf"))


def test_a_file_that_is_no_adapter_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"half")
    assert codes(check_file(tmp_path / "a.safetensors", "diffusers", {}, family="flux")) == {"export_mismatch"}


def test_a_name_that_stands_for_two_modules() -> None:
    with pytest.raises(UserError) as raised:
        READERS["lycoris"].match(["lycoris_a_b.alpha"], ["a.b", "a_b"], FLUX)
    assert raised.value.code == "adapter_ambiguous_name"


def test_a_failed_conversion_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flux()
    add_lora(model)
    source = save_flux_lora(model, tmp_path)
    target = tmp_path / "kohya.safetensors"
    target.write_bytes(b"the old one")
    monkeypatch.setattr("simpletuner.adapters.convert.check_file", lambda *_, **__: check_file(source, "kohya", {}))
    with pytest.raises(UserError) as raised:
        convert(read_adapter(source), "kohya", target, "flux")
    assert raised.value.code == "export_mismatch"
    assert target.read_bytes() == b"the old one"
    assert not list(tmp_path.glob(".*.tmp"))
