"""Lion (arXiv:2302.06675) as torch-optimi has it: no weight decay, and Kahan sums for bf16 weights. training.md §5."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.train.elementwise import Rule
from simpletuner.train.rounding import nearest

_BETA1, _BETA2 = 0.9, 0.99


def lion_rule(dtype: torch.dtype) -> Rule:
    """For weights of fp32 or bf16. The state has the library's names."""
    if dtype is torch.bfloat16:
        return Rule(state=("exp_avg", "kahan_comp"), factors=_factors, change=lion_with_kahan_sums)
    return Rule(state=("exp_avg",), factors=_factors, change=lion)


def _factors(rate: float, step: int) -> tuple[float]:
    return (-rate,)


def lion(
    weights: Tensor,
    grads: Tensor,
    first: Tensor,
    scale: Tensor,
    finite: Tensor,
    counter: int | Tensor,
    rate: float | Tensor,
) -> None:
    """One step on fp32 tensors, (N,) each, in place. `rate` is −η; where not `finite` nothing changes."""
    direction, moment = _looked_at(grads, first, scale)
    _store((direction.mul_(rate).add_(weights), moment), (weights, first), finite)


def lion_with_kahan_sums(
    weights: Tensor,
    grads: Tensor,
    first: Tensor,
    lost: Tensor,
    scale: Tensor,
    finite: Tensor,
    counter: int | Tensor,
    rate: float | Tensor,
) -> None:
    """The same on bf16 tensors, arithmetic in fp32. `lost` is what rounding has kept from the weights so far."""
    direction, moment = _looked_at(grads, first, scale)
    owed = direction.mul_(rate).add_(lost)
    old = weights.float()
    new = nearest(old + owed)
    _store((new, moment, owed.sub_(new.sub(old))), (weights, first, lost), finite)


def _looked_at(grads: Tensor, first: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of what is moved against, and the next moment, fp32. No argument changes, whatever its type."""
    g, m = grads.float() * scale, first.float()
    return m.lerp(g, 1 - _BETA1).sign_(), m.lerp(g, 1 - _BETA2)


def _store(values: tuple[Tensor, ...], targets: tuple[Tensor, ...], finite: Tensor) -> None:
    for value, target in zip(values, targets, strict=True):
        torch.where(finite, value.to(target.dtype), target, out=target)
