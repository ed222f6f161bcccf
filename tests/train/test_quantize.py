"""Quantised frozen bases: what is quantised, what it costs, and that adapters train over it. training.md §4.5."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.config.rules import QUANTISED
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.precision import (
    PRECISIONS,
    QuantisedLinear,
    check_precision,
    dequantise,
    multiply_out,
    plain_tensors,
)
from simpletuner.families.quantize import Via, describe_quantised, is_quantised, load_quantised, quantised_names
from simpletuner.families.registry import load_spec

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BF16 = torch.bfloat16
NEEDS_CUDA = ("fp8-torchao", "int4-torchao")
ON_CPU = tuple(name for name in PRECISIONS if name not in NEEDS_CUDA)
CHOSEN = [pytest.param(name, marks=pytest.mark.long) if name == "int4-quanto" else name for name in ON_CPU]
"""Quanto compiles a C++ extension for int4 where it is used for the first time: half a minute."""
PIXART_KEPT = load_spec("pixart_sigma").unquantised
FLUX_KEPT = ("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.*", "proj_out")
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Tiny:
    """A small model on disk, a batch for it, what is kept, and the name of its attention class."""

    model_class: type[Any]
    folder: Path
    kept: Sequence[str]
    batch: dict[str, Any]
    attention: str

    def load(self, precision: str, dtype: torch.dtype = BF16, via: Via = "accelerator") -> nn.Module:
        return load_quantised(
            self.model_class,
            self.folder,
            precision,
            default_dtype=dtype,
            exclude=self.kept,
            device=CPU,
            via=via,
        )

    def reference(self, dtype: torch.dtype = BF16) -> nn.Module:
        return self.model_class.from_pretrained(self.folder, torch_dtype=dtype)

    def output(self, model: nn.Module) -> Tensor:
        dtype = cast("torch.dtype", model.dtype)
        batch = {name: cast_to(value, dtype) for name, value in self.batch.items()}
        return model(**batch, return_dict=False)[0]


def cast_to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture(scope="module")
def pixart(model: Path) -> Tiny:
    generator = torch.Generator().manual_seed(1)
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "timestep": torch.tensor([5, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Tiny(PixArtTransformer2DModel, model / "transformer", PIXART_KEPT, batch, "Attention")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        in_channels=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    folder = tmp_path_factory.mktemp("flux")
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    return Tiny(FluxTransformer2DModel, folder, FLUX_KEPT, batch, "FluxAttention")


@pytest.fixture(params=["pixart", "flux"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.getfixturevalue(request.param)


def digest(modules: Sequence[nn.Module]) -> str:
    """Over every byte of weights and biases, codes and scales included."""
    found = hashlib.sha256()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            for part in plain_tensors(parameter):
                found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).mul(0.02).to(BF16)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


# ---- which modules


def test_the_table_and_the_options_name_the_same_precisions() -> None:
    assert set(PRECISIONS) == set(QUANTISED)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_size_flux(precision: str) -> None:
    """Acceptance 28: 494 quantised, 10 kept, 11.834 B weights."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            in_channels=64,
            guidance_embeds=True,
        )
    names = quantised_names(model, precision, FLUX_KEPT)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert (len(names), len(linears - set(names))) == (494, 10)
    assert sum(cast("nn.Linear", model.get_submodule(name)).weight.numel() for name in names) == 11_834_228_736
    assert "proj_out" not in names and "single_transformer_blocks.37.proj_out" in names


def test_full_size_pixart() -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_layers=42, sample_size=128, caption_channels=4096, use_additional_conditions=False
        )
    names = quantised_names(model, "int8-quanto", PIXART_KEPT)
    kept = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(names)
    assert len(names) == 42 * 10
    assert {name.split(".")[0] for name in kept} == {"adaln_single", "caption_projection", "proj_out"}


def test_torchao_takes_multiples_of_sixteen_only() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 24), nn.Linear(24, 16))
    assert quantised_names(model, "int8-torchao", ()) == ["0"]
    assert quantised_names(model, "int8-quanto", ()) == ["0", "1", "2"]


# ---- values


def test_int8_golden() -> None:
    """Per row s = max|w| / 127 in the weight's type, q = round(w / s); Gaussian rows lose at most 1 %."""
    weight = gaussian(2000, 3072)
    found: Any = PRECISIONS["int8-quanto"].quantise(weight.clone(), None, CPU).weight
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(BF16)
    codes = (weight.float() / scale.float()).clamp(-127, 127).round()
    assert torch.equal(found._scale, scale)
    assert torch.equal(found._data, codes.to(torch.int8))
    assert relative(found._data.float() * found._scale.float(), weight) <= 0.01


BOUNDS = {
    "int8-quanto": 0.01, "int8-torchao": 0.01, "fp8-quanto": 0.03, "fp8wo-torchao": 0.03, "int4-quanto": 0.12,
    "nf4-bnb": 0.12,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("precision", CHOSEN)
def test_a_quantised_linear(precision: str, dtype: torch.dtype) -> None:
    """Close to the plain one, also with a row of zeros; exact gradient to the input; autocast; deepcopy."""
    weight, bias = gaussian(64, 256).to(dtype), gaussian(1, 64)[0].to(dtype)
    weight[5] = 0
    module = PRECISIONS[precision].quantise(weight.clone(), bias.clone(), CPU)
    x = gaussian(6, 256).mul(50).to(dtype).reshape(2, 3, 256).requires_grad_()
    found, wanted = module(x), nn.functional.linear(x, weight, bias)
    assert found.dtype == dtype
    assert relative(found, wanted) < BOUNDS[precision]
    found.sum().backward()
    rows = cast("Tensor", module(torch.eye(256, dtype=dtype)) - bias)  # Wᵀ, through the kernel itself
    assert relative(cast("Tensor", x.grad), rows.sum(1).expand(2, 3, 256)) < (0.02 if dtype is BF16 else 1e-4)
    with torch.autocast("cpu", BF16):
        assert relative(module(x.detach().float()), wanted) < BOUNDS[precision] + 0.01
    assert torch.equal(deepcopy(module)(x), module(x))


@pytest.mark.parametrize("precision", CHOSEN)
def test_the_graph_holds_no_dequantised_weight(precision: str) -> None:
    """torchao's own weight-only product leaves a bf16 copy of each weight until the backward pass."""
    module = PRECISIONS[precision].quantise(gaussian(64, 256), None, CPU)
    held: list[int] = []
    x = gaussian(2, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        module(x).sum().backward()
    assert sum(held) < 64 * 256
    if isinstance(module, QuantisedLinear):
        assert torch.equal(
            cast("Tensor", x.grad)[0], torch.ones(1, 64, dtype=BF16).matmul(dequantise(module.weight))[0]
        )


def test_a_weight_that_can_only_be_multiplied_with() -> None:
    """What int4-torchao's backward pass rests on, tried on a layout that this device has."""
    weight = cast("Any", PRECISIONS["int8-torchao"].quantise(gaussian(48, 2048), None, CPU).weight)
    assert torch.equal(multiply_out(weight), weight.dequantize())


def test_a_trained_bias_gets_its_gradient() -> None:
    module = PRECISIONS["int8-quanto"].quantise(gaussian(16, 32), torch.zeros(16, dtype=BF16), CPU)
    module.bias.requires_grad_()
    module(gaussian(6, 32).reshape(2, 3, 32)).sum().backward()
    assert torch.equal(cast("Tensor", module.bias.grad), torch.full((16,), 6.0, dtype=BF16))


# ---- loading


@pytest.mark.parametrize("precision", CHOSEN)
def test_loading(tiny: Tiny, precision: str) -> None:
    found, wanted = tiny.load(precision), tiny.reference()
    names = set(quantised_names(wanted, precision, tiny.kept))
    modules = dict(found.named_modules())
    assert {name for name, module in modules.items() if is_quantised(module)} == names != set()
    for name, parameter in wanted.named_parameters():
        if name.rpartition(".")[0] not in names or name.endswith(".bias"):
            assert torch.equal(found.get_parameter(name), parameter), name
    for name, buffer in wanted.named_buffers():
        assert torch.equal(found.get_buffer(name), buffer) and found.get_buffer(name).dtype == buffer.dtype
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not any(parameter.is_meta for parameter in found.parameters())
    assert (found.training, found.dtype) == (False, BF16)
    with torch.no_grad():
        assert relative(tiny.output(found), tiny.output(wanted)) < 0.1
    told = describe_quantised(found)
    assert (told["quantised_modules"], told["quantised_modules"] + told["kept_modules"]) == (
        len(names),
        sum(isinstance(module, nn.Linear) for module in wanted.modules()),
    )
    assert told["quantised_weights"] == sum(wanted.get_parameter(f"{name}.weight").numel() for name in names)
    assert found.state_dict()


@pytest.mark.parametrize("via", ["cpu", "pipeline"])
@pytest.mark.parametrize("precision", CHOSEN)
def test_every_way_gives_equal_weights(flux: Tiny, precision: str, via: Via) -> None:
    ways = [list(flux.load(precision, via=way).modules()) for way in ("accelerator", via)]
    assert digest(ways[0]) == digest(ways[1])


def test_shards_and_variants(flux: Tiny, tmp_path: Path) -> None:
    model = flux.reference()
    cast("Any", model).save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded = load_quantised(
        FluxTransformer2DModel,
        tmp_path,
        "int8-quanto",
        default_dtype=BF16,
        exclude=FLUX_KEPT,
        device=CPU,
        variant="fp16",
    )
    assert digest(list(sharded.modules())) == digest(list(flux.load("int8-quanto").modules()))


def renamed(weights: dict[str, Tensor]) -> None:
    weights["proj_out.weights"] = weights.pop("proj_out.weight")


def reshaped(weights: dict[str, Tensor]) -> None:
    weights["transformer_blocks.0.attn.to_q.weight"] = torch.zeros(32, 16)


def reshaped_kept(weights: dict[str, Tensor]) -> None:
    weights["proj_out.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (renamed, "1 missing (proj_out.weight); 1 unknown (proj_out.weights)"),
        (reshaped, "to_q.weight has shape (32, 16)"),
        (reshaped_kept, "proj_out.bias has shape (3,)"),
    ],
)
def test_weights_that_do_not_fit(
    flux: Tiny, copied: Callable[[Path, str], Path], damage: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    folder = copied(flux.folder, "damaged")
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    error = refusal(folder)
    assert (error.code, error.exit_code) == ("model_weights_mismatch", ExitCode.OUTSIDE)
    assert said in error.message


def test_files_that_are_cut_short_or_missing(flux: Tiny, copied: Callable[[Path, str], Path]) -> None:
    folder = copied(flux.folder, "cut")
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(folder).code == "model_weights_mismatch"
    file.unlink()
    assert refusal(folder).code == "model_part_missing"
    index = {"weight_map": {"proj_out.weight": "gone-1-of-1.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "gone-1-of-1.safetensors" in refusal(folder).message


def refusal(folder: Path, precision: str = "int8-quanto", device: torch.device = CPU) -> UserError:
    with pytest.raises(UserError) as raised:
        load_quantised(FluxTransformer2DModel, folder, precision, default_dtype=BF16, exclude=FLUX_KEPT, device=device)
    return raised.value


@pytest.mark.parametrize("precision", NEEDS_CUDA)
def test_what_this_device_cannot_do_is_said_before_loading(precision: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "absent", precision)
    assert (error.code, error.exit_code) == ("precision_unavailable", ExitCode.OUTSIDE)
    assert "CUDA device of compute capability" in error.message


def test_a_device_of_another_kind() -> None:
    with pytest.raises(UserError, match="a device of type cpu or cuda") as raised:
        check_precision("nf4-bnb", torch.device("xpu"), BF16)
    assert raised.value.exit_code == ExitCode.OUTSIDE


@pytest.mark.parametrize(("precision", "package"), [("nf4-bnb", "bitsandbytes"), ("int8-quanto", "optimum")])
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, precision: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: cannot be imported
    with pytest.raises(UserError, match="pip install") as raised:
        check_precision(precision, CPU, BF16)
    assert (raised.value.code, raised.value.exit_code) == ("precision_unavailable", ExitCode.CONFIG)


# ---- adapters over it


@dataclass(frozen=True)
class Attached:
    """A model with an adapter: the adapter's weights, and the modules of the base, found before it was attached."""

    model: nn.Module
    parameters: list[nn.Parameter]
    base: list[nn.Module]
    network: Any = None


@pytest.fixture
def preset() -> Iterator[Callable[[str], None]]:
    """LyCORIS keeps its preset in the class."""
    before = (LycorisNetwork.TARGET_REPLACE_MODULE, LycorisNetwork.ENABLE_CONV)
    yield lambda attention: LycorisNetwork.apply_preset({"target_module": [attention], "enable_conv": False})
    LycorisNetwork.TARGET_REPLACE_MODULE, LycorisNetwork.ENABLE_CONV = before


def attach(tiny: Tiny, precision: str, adapter: str, preset: Callable[[str], None]) -> Attached:
    model = tiny.load(precision)
    base = list(model.modules())
    torch.manual_seed(7)
    if adapter == "peft":
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)), model)
        return Attached(model, [p for name, p in model.named_parameters() if "lora_" in name], base)
    preset(tiny.attention)
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, algo=adapter, factor=4, bypass_mode=True)
    network.apply_to()
    network.to(BF16)
    return Attached(model, list(network.parameters()), base, network)


def train(tiny: Tiny, attached: Attached, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(attached.parameters, lr=0.02)
    losses: list[float] = []
    for _ in range(steps):
        loss = (tiny.output(attached.model).float() - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in attached.parameters)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("adapter", ["peft", "lora", "locon", "lokr", "loha"])
@pytest.mark.parametrize("precision", CHOSEN)
def test_an_adapter_trains_over_it(tiny: Tiny, precision: str, adapter: str, preset: Callable[[str], None]) -> None:
    """Before a step its output is the base's; steps change every weight of the adapter and no byte of the base."""
    with torch.no_grad():
        wanted = tiny.output(tiny.load(precision))
    attached = attach(tiny, precision, adapter, preset)
    bytes_before = digest(attached.base)
    weights_before = [parameter.detach().clone() for parameter in attached.parameters]
    with torch.no_grad():
        assert torch.equal(tiny.output(attached.model), wanted)
    train(tiny, attached, 2)
    assert digest(attached.base) == bytes_before
    changed = [not torch.equal(a, b) for a, b in zip(weights_before, attached.parameters, strict=True)]
    assert len(changed) > 0 and all(changed)
    with torch.no_grad():
        assert not torch.equal(tiny.output(attached.model), wanted)
    assert digest(attached.base) == bytes_before


@pytest.mark.parametrize("adapter", ["peft", "lokr"])
@pytest.mark.parametrize("precision", CHOSEN)
def test_recomputed_activations_change_nothing(
    tiny: Tiny, precision: str, adapter: str, preset: Callable[[str], None]
) -> None:
    plain = attach(tiny, precision, adapter, preset)
    recomputed = attach(tiny, precision, adapter, preset)
    recomputed.model.train()
    cast("Any", recomputed.model).enable_gradient_checkpointing()
    assert train(tiny, plain, 3) == train(tiny, recomputed, 3)


# ---- memory

LOAD = """
import sys
from pathlib import Path
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from simpletuner.families.precision import PRECISIONS
from simpletuner.families.quantize import describe_quantised, load_quantised

def status(name):
    return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(name)) * 1024

torch.set_num_threads(1)
cpu, kept = torch.device("cpu"), sys.argv[2].split()
PRECISIONS["int8-quanto"].quantise(torch.ones(16, 16, dtype=torch.bfloat16), None, cpu)  # its imports
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load_quantised(FluxTransformer2DModel, Path(sys.argv[1]), "int8-quanto", default_dtype=torch.bfloat16,
                       exclude=kept, device=cpu, via=sys.argv[3])
print(status("VmHWM") - before, describe_quantised(model)["bytes"])
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from /proc")
def test_no_more_in_memory_than_what_is_quantised_and_one_tensor(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=0,
            num_single_layers=7,
            attention_head_dim=128,
            num_attention_heads=8,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            in_channels=16,
            guidance_embeds=True,
        )
    whole = cast("nn.Module", model.to(BF16)).to_empty(device="cpu")
    for parameter in whole.parameters():
        nn.init.constant_(parameter, 0.01)
    full = sum(parameter.nbytes for parameter in whole.parameters())
    largest = max(parameter.nbytes for parameter in whole.parameters())
    cast("Any", whole).save_pretrained(tmp_path, max_shard_size="50MB")
    assert full > 200e6 and len(list(tmp_path.glob("*.safetensors"))) > 3
    words = [sys.executable, "-c", LOAD, str(tmp_path), " ".join(FLUX_KEPT), "accelerator"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(words, check=True, env=environment, capture_output=True, text=True)
    peak, quantised = map(int, ran.stdout.split()[-2:])
    limit = quantised + 2 * largest + 32e6  # of the size of a few tensors: what the allocator has not given back yet
    assert quantised < 0.55 * full and limit < 0.8 * full
    assert peak < limit
