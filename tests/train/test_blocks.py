"""How blocks run may change memory and time, never the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.bench.device import peak_bytes
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import NANO_JOBS, Job, Works
from simpletuner.errors import UserError
from simpletuner.train.attention import KERNELS, Call, check_kernel, fastest_first, seconds_of
from simpletuner.train.blocks import blocks_of

CPU = torch.device("cpu")
KEPT = "gradient_checkpointing_keeps"
WAYS: dict[str, dict[str, Any]] = {
    "kept": {"gradient_checkpointing": False},
    "recomputed": {"gradient_checkpointing": True},
    "attention kept": {"gradient_checkpointing": True, KEPT: "attention"},
    "every second": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
}
PIXART, FLUX = NANO_JOBS[0], NANO_JOBS[2]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    return Works(Scene(tmp_path_factory.mktemp("blocks"), 8))


def gradients(works: Works, job: Job, options: dict[str, Any]) -> list[Tensor]:
    """The loss and every gradient of one step."""
    work = works.build(job, CPU, options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in work.denoiser.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
    torch.manual_seed(2)
    loss = work.loss(work.batch)
    loss.backward()
    return [loss.detach(), *(some.grad for some in work.denoiser.parameters() if some.grad is not None)]


@pytest.mark.parametrize("job", [PIXART, FLUX], ids=lambda job: job.name)
def test_recomputing_changes_no_bit(works: Works, job: Job) -> None:
    plain, *others = (gradients(works, job, options) for options in WAYS.values())
    assert plain[0].isfinite()
    assert any(some.abs().max() > 0 for some in plain[1:])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao"])
def test_attention_is_kept_over_a_quantised_base_too(works: Works, precision: str) -> None:
    for options in (WAYS["recomputed"], WAYS["attention kept"]):
        work = works.build(FLUX, CPU, options | {"base_model_precision": precision})
        work.step()


def test_what_is_kept_takes_memory_and_spares_attention(works: Works) -> None:
    wide = replace(PIXART, size=512)
    peaks = {name: peak_bytes(works.build(wide, CPU, options)) for name, options in WAYS.items()}
    ordered = [peaks[name] or 0 for name in ("kept", "attention kept", "recomputed")]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(ordered)) == 3
    assert (peaks["recomputed"] or 0) < (peaks["every second"] or 0) < (peaks["kept"] or 0)


@pytest.mark.parametrize(("way", "runs"), [("kept", 1.0), ("recomputed", 2.0), ("every second", 1.5)])
def test_blocks_run_as_often_as_asked(works: Works, way: str, runs: float) -> None:
    work = works.build(PIXART, CPU, WAYS[way])
    ran = list[nn.Module]()
    blocks = blocks_of(work.denoiser)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: ran.append(module))
    work.loss(work.batch).backward()
    extra = -(-len(blocks) // 2) if way == "every second" else (runs - 1) * len(blocks)
    assert len(ran) == len(blocks) + extra


@pytest.mark.slow
@pytest.mark.parametrize("job", [PIXART, pytest.param(FLUX, marks=pytest.mark.long)], ids=["PixArt", "Flux"])
@pytest.mark.parametrize("way", [pytest.param("kept", marks=pytest.mark.long), "attention kept"])
def test_compiled_blocks_compute_the_same(works: Works, job: Job, way: str) -> None:
    forced = {"attention_mechanism": "flash"} if way == "kept" else {}
    fp32 = (
        WAYS[way]
        | forced
        | {"base_model_precision": "fp32", "base_model_default_dtype": "fp32", "mixed_precision": "no"}
    )
    plain = gradients(works, job, fp32)
    torch.compiler.reset()
    compiled = gradients(works, job, fp32 | {"dynamo_backend": "aot_eager", "dynamo_fullgraph": True})
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_that_cannot_be_compiled_say_so(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    work = works.build(PIXART, CPU, {"dynamo_backend": "inductor"})
    with fresh_cache(), pytest.raises(UserError) as failed:
        work.step()
    assert failed.value.code == "compile_failed"
    assert "BasicTransformerBlock" in failed.value.message


def test_a_kernel_that_is_not_there_is_refused(works: Works) -> None:
    with pytest.raises(UserError) as failed:
        check_kernel("cudnn", CPU, torch.bfloat16)
    assert failed.value.code == "attention_unavailable"
    assert "flash, math" in failed.value.message
    check_kernel("flash", CPU, torch.bfloat16)


def test_a_forced_kernel_is_the_one_that_runs(works: Works) -> None:
    for name, expected in (("flash", True), ("math", False)):
        work = works.build(PIXART, CPU, {"attention_mechanism": name})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work.loss(work.batch).backward()
        ran = {event.key for event in profile.key_averages()}
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) is expected
        assert ("aten::_scaled_dot_product_attention_math" in ran) is not expected


def test_the_fastest_right_kernel_comes_first() -> None:
    call = Call(torch.Size((1, 2, 64, 32)), torch.Size((1, 2, 16, 32)), torch.bfloat16, None)
    masked = call._replace(mask=(torch.Size((1, 1, 1, 16)), torch.bfloat16))
    order = fastest_first({call: 3, masked: 1}, CPU)
    assert list(order) == ["flash", *(name for name in KERNELS if name not in ("flash", "math")), "math"]
    assert order["flash"] is not None
    assert order["cudnn"] is None
    assert seconds_of(masked, "math", CPU) is not None
