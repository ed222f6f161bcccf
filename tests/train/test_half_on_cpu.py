"""Products of half types, widened to fp32. A processor that has them is taken for one that has not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simpletuner.train.half_on_cpu import fast_half_products

LACKING = frozenset({torch.bfloat16})


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def with_gradients(compute: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    result = compute(*leaves)
    result.backward(torch.ones_like(result))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("compute", "inputs"),
    [
        (torch.nn.functional.linear, (draw(2, 5, 8), draw(4, 8), draw(4))),
        (torch.matmul, (draw(3, 5, 8), draw(3, 8, 4))),
        (torch.baddbmm, (draw(3, 5, 4), draw(3, 5, 8), draw(3, 8, 4))),
        (torch.nn.functional.conv2d, (draw(2, 3, 6, 6), draw(4, 3, 3, 3), draw(4))),
        (torch.nn.functional.conv_transpose2d, (draw(2, 4, 6, 6), draw(4, 3, 3, 3))),
    ],
)
def test_products_are_those_of_fp32_rounded_once(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    exact = with_gradients(compute, *(value.float() for value in inputs))
    with fast_half_products(LACKING):
        found = with_gradients(compute, *inputs)
    assert [value.dtype for value in found] == [torch.bfloat16] * len(exact)
    # One rounding of each product; the gradient of a bias is a sum that torch itself makes.
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=2**-7)


def test_other_types_and_what_follows_are_untouched() -> None:
    inputs = [value.float() for value in (draw(5, 8), draw(8, 4))]
    native = torch.mm(*inputs)
    half = torch.mm(draw(5, 8), draw(8, 4))
    with fast_half_products(LACKING):
        assert torch.equal(torch.mm(*inputs), native)
    assert torch.equal(torch.mm(*inputs), native)
    assert torch.equal(torch.mm(draw(5, 8), draw(8, 4)), half)
