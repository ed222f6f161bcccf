"""Products of half-precision tensors on processors that have no arithmetic for them.

Where oneDNN has no kernels for bf16 (x86 without AVX-512), torch falls back to plain loops: a convolution takes a
hundred times as long as in fp32, a matrix product ten to thirty times. Widened to fp32, multiplied, rounded once, the
result is that of a native kernel, which accumulates in fp32 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


def lacking_types() -> frozenset[torch.dtype]:
    """The half types that this processor cannot multiply."""
    supported: dict[torch.dtype, bool] = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_supported in supported.items() if not is_supported)


@contextmanager
def fast_half_products(lacking: frozenset[torch.dtype] | None = None) -> Generator[None]:
    """Inside the block, products on the CPU of `lacking` types (those of this processor) are computed in fp32.

    Beneath autograd, so that backward is served too; tensors of other types go to torch's kernels as before.
    """
    lacking = lacking_types() if lacking is None else lacking
    library = Library("aten", "IMPL")
    if lacking:
        with warnings.catch_warnings(action="ignore"):  # that kernels are replaced is the intention
            for name in _PRODUCTS:
                library.impl(name, _widened(name, lacking), "CPU", with_keyset=True, allow_override=True)
    try:
        yield
    finally:
        library._destroy()  # pyright: ignore[reportPrivateUsage]


def _widened(name: str, lacking: frozenset[torch.dtype]) -> Callable[..., Any]:
    original = get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, first: Tensor, *rest: Any, **settings: Any) -> Any:
        if first.dtype not in lacking:
            return original.call_boxed(keys, first, *rest, **settings)
        wide = [argument.float() if isinstance(argument, Tensor) else argument for argument in (first, *rest)]
        found = original.call_boxed(keys, *wide, **settings)
        if isinstance(found, Tensor):
            return found.to(first.dtype)
        return tuple(None if part is None else part.to(first.dtype) for part in found)

    return product
