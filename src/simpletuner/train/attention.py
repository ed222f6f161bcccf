"""Which of torch's kernels computes attention in training: a forced one, or the fastest, found by measuring.

No GPU has measured yet: what is proven on a CPU is the same code with the kernels that a CPU has. docs/adr/0033.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from simpletuner.errors import ExitCode, UserError

KERNELS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Names of `attention_mechanism`. The last one can do everything, and needs the memory for it."""
FUSED = tuple(KERNELS)[:-1]

_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference from `math` in fp32, relative to the largest value."""
_REPEATS = 5


class Call(NamedTuple):
    """What one call of attention is given; shapes are (B, heads, tokens, width)."""

    query: torch.Size
    key: torch.Size
    dtype: torch.dtype
    mask: tuple[torch.Size, torch.dtype] | None


class Calls(TorchFunctionMode):
    """Counts the calls of attention that are made inside; on shapes alone too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Call] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen[_call(*args, **(kwargs or {}))] += 1
        return func(*args, **(kwargs or {}))


def _call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Call:
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)
    return Call(query.shape, key.shape, query.dtype, mask)


def has_kernel(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """For the simplest of calls."""
    size = torch.Size((1, 1, 64, 64))
    return seconds_of(Call(size, size, dtype, None), name, device) is not None


def check_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError `attention_unavailable` (69) where the device has no such kernel."""
    if has_kernel(name, device, dtype):
        return
    there = ", ".join(known for known in KERNELS if has_kernel(known, device, dtype))
    raise unavailable(name, f"this device has none for {str(dtype).removeprefix('torch.')}. It has {there}")


def unavailable(name: str, reason: str) -> UserError:
    return UserError(
        "attention_unavailable",
        f"Attention cannot be computed by {name!r}: {reason}.",
        hint="With --attention_mechanism diffusers the fastest kernel that can is taken.",
        pointer="/--attention_mechanism",
        exit_code=ExitCode.OUTSIDE,
    )


def fastest_first(calls: Mapping[Call, int], device: torch.device) -> dict[str, float | None]:
    """The kernels in the order in which they are to be asked, with their seconds for the dearest of the calls.

    Those that cannot do that call, or not right, have none and come late: another call may still take them.
    """
    found: dict[str, float | None] = {}
    dearest = 0.0
    for call, count in calls.items():
        timed = {name: seconds_of(call, name, device) for name in FUSED}
        cost = count * min((seconds for seconds in timed.values() if seconds is not None), default=0.0)
        if cost >= dearest:
            found, dearest = timed, cost
    order = sorted(found, key=lambda name: found[name] or float("inf"))
    return {name: found[name] for name in order} | {"math": None}


def seconds_of(call: Call, name: str, device: torch.device) -> float | None:
    """Forward and backward, the least of some; None where the kernel cannot, or is not right."""
    one_head = call._replace(query=_one_head(call.query), key=_one_head(call.key), mask=_one_head_mask(call.mask))
    try:
        with sdpa_kernel(KERNELS[name]):
            found = _outputs(*_drawn(one_head, device))
            if not _is_right(found, one_head, device):
                return None
            inputs, mask = _drawn(call, device)
            return min(_timed(inputs, mask, device) for _ in range(_REPEATS))
    except RuntimeError:
        # "No available kernel", or none that this shape fits.
        return None


def _one_head(size: torch.Size) -> torch.Size:
    return torch.Size((1, 1, *size[2:]))


def _one_head_mask(mask: tuple[torch.Size, torch.dtype] | None) -> tuple[torch.Size, torch.dtype] | None:
    return mask and (torch.Size((1,) * (len(mask[0]) - 2) + tuple(mask[0][-2:])), mask[1])


def _drawn(call: Call, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """Query, key, value; and a mask that leaves out every other key."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(size, generator=generator, device=device).to(call.dtype).requires_grad_()
        for size in (call.query, call.key, call.key)
    ]
    if call.mask is None:
        return inputs, None
    size, dtype = call.mask
    left_out = (torch.arange(size[-1], device=device) % 2 == 1).expand(size)
    if dtype is torch.bool:
        return inputs, ~left_out
    return inputs, torch.zeros(size, dtype=dtype, device=device).masked_fill(left_out, -10_000.0)


def _outputs(inputs: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Of attention and of its derivative to each input."""
    output = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], attn_mask=mask)
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def _timed(inputs: Sequence[Tensor], mask: Tensor | None, device: torch.device) -> float:
    started = time.perf_counter()
    _outputs(inputs, mask)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _is_right(found: Sequence[Tensor], call: Call, device: torch.device) -> bool:
    inputs, mask = _drawn(call, device)
    exact = [some.detach().float().requires_grad_() for some in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = _outputs(exact, mask if mask is None or mask.dtype is torch.bool else mask.float())
    limit = _TOLERANCE[call.dtype]
    return all(
        bool((a.float() - b).abs().max() <= limit * b.abs().max().clamp(min=1e-6))
        for a, b in zip(found, wanted, strict=True)
    )
