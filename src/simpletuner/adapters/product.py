"""ΔW as a product of two thin matrices, compared without being multiplied out: 14 GB for a Flux adapter otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.adapters.names import Layer


@dataclass(frozen=True, slots=True)
class Product:
    """ΔW = scale · up @ down; up (out, r), down (r, in); of a convolution the kernel's sides are part of `in`."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.flatten(1).shape[1]

    def dense(self) -> Tensor:
        """ΔW in fp32, (out, in)."""
        up, down = self._factors()
        return up @ down

    def norm(self) -> float:
        """‖ΔW‖, Frobenius: that of R₁R₂ᵀ, where up = Q₁R₁ and downᵀ = Q₂R₂."""
        up, down = self._factors()
        first, second = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.T, mode="r").R
        return float(torch.linalg.matrix_norm(first @ second.T))

    def minus(self, other: Product) -> Product:
        (up, down), (their_up, their_down) = self._factors(), other._factors()
        return Product(torch.cat([up, -their_up], 1), torch.cat([down, their_down]))

    def _factors(self) -> tuple[Tensor, Tensor]:
        up, down = self.up.detach().flatten(1).float().cpu(), self.down.detach().flatten(1).float().cpu()
        return up * self.scale, down


Delta = Tensor | Product
"""ΔW of one module; a tensor of (out, in) or a kernel's shape, or a bias-like vector."""


def fused(layer: Layer, deltas: Mapping[str, Delta]) -> Delta:
    """ΔW of a fused layer from its parts', (Σ out, in) in fp32; a part that is not there is zero."""
    products = {name: delta for name, delta in deltas.items() if isinstance(delta, Product)}
    if len(products) == len(deltas):
        return _fused_product(layer, products)
    flat = {name: delta.dense() if isinstance(delta, Product) else _matrix(delta) for name, delta in deltas.items()}
    width = next(iter(flat.values())).shape[1]
    rows = [flat[part.module] if part.module in flat else torch.zeros(part.rows * width, width) for part in layer.parts]
    whole = torch.cat(rows)
    return swap_halves(whole) if layer.swapped else whole


def relative_error(found: Delta, wanted: Delta) -> float:
    """‖found − wanted‖ ÷ ‖wanted‖ (Frobenius); 0 for two zeros, infinity where only `wanted` is zero."""
    if isinstance(found, Product) and isinstance(wanted, Product):
        norm, gap = wanted.norm(), found.minus(wanted).norm()
    else:
        target = _dense(wanted)
        norm, gap = float(torch.linalg.vector_norm(target)), float(torch.linalg.vector_norm(_dense(found) - target))
    if norm == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / norm


def swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _fused_product(layer: Layer, products: Mapping[str, Product]) -> Product:
    if len(layer.parts) == 1:
        only = next(iter(products.values()))
        return Product(swap_halves(only.up), only.down, only.scale) if layer.swapped else only
    width = next(iter(products.values())).shape[1]
    blocks: list[Tensor] = []
    for part in layer.parts:
        product = products.get(part.module)
        blocks.append(
            torch.zeros(part.rows * width, 0) if product is None else product.up.detach().float().cpu() * product.scale
        )
    present = [products[part.module] for part in layer.parts if part.module in products]
    return Product(torch.block_diag(*blocks), torch.cat([product.down.detach().float().cpu() for product in present]))


def _dense(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, Product) else _matrix(delta)


def _matrix(delta: Tensor) -> Tensor:
    whole = delta.detach().float().cpu()
    return whole.reshape(-1, 1) if whole.ndim == 1 else whole.flatten(1)
