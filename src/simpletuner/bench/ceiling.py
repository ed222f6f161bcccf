"""`bench ceiling`: what the device itself can do on the shapes of the models: matrix products, and moving bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from simpletuner.bench.device import release, seconds_of
from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import Job, Works, jobs_for

REPEATS = 10
_COPIED = {"cuda": 2**31, "cpu": 2**26}
"""Bytes of a copy: more than any cache holds."""

Product = tuple[int, int, int]
"""(M, K, N) of M×K times K×N."""


def measure(scene: Scene, steps: int, device: torch.device, jobs: Sequence[Job] | None = None) -> Measured:
    """`steps` bounds how often each is repeated."""
    repeats = min(REPEATS, steps)
    works = Works(scene)
    found = Measured(benchmark="ceiling", figures=[_bandwidth(repeats, device)])
    for job in jobs or jobs_for(device):
        products = products_of(works, job)
        speeds = {product: _product_speed(product, repeats, device) for product in products}
        flops = {product: 2 * product[0] * product[1] * product[2] * count for product, count in products.items()}
        seconds = sum(flops[product] / speeds[product] for product in products)
        found.figures.append(
            Figure(
                name=f"{job.name}: matrix products in bf16",
                value=sum(flops.values()) / seconds / 1e12,
                unit="TFLOP/s",
                least=min(speeds.values()) / 1e12,
                most=max(speeds.values()) / 1e12,
                note=f"{len(products)} shapes of its linear layers, weighted by their FLOPs in a forward pass",
            )
        )
        found.details[job.name] = {"×".join(map(str, product)): speed / 1e12 for product, speed in speeds.items()}
        release(device)
    return found


def products_of(works: Works, job: Job) -> Counter[Product]:
    """Of the linear layers in one forward pass, from the meta device."""
    family, denoiser, batch = works.shapes(job)
    found: Counter[Product] = Counter()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        found[inputs[0].numel() // module.in_features, module.in_features, module.out_features] += 1

    hooks = [some.register_forward_hook(note) for some in denoiser.modules() if isinstance(some, nn.Linear)]
    with torch.no_grad():
        family.predict(denoiser, batch.latents_BCHW, torch.zeros(job.batch, device="meta").long(), batch)
    for hook in hooks:
        hook.remove()
    return found


def _product_speed(product: Product, repeats: int, device: torch.device) -> float:
    """FLOP/s."""
    rows, inner, columns = product
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        torch.mm(left, right.T, out=out)  # as a linear layer does, whose weight lies transposed

    seconds_of(multiply, 2, device)
    return 2 * rows * inner * columns / seconds_of(multiply, repeats, device)


def _bandwidth(repeats: int, device: torch.device) -> Figure:
    size = _COPIED[device.type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds_of(lambda: target.copy_(source), 2, device)
    speeds = [2 * size / seconds_of(lambda: target.copy_(source), 1, device) for _ in range(repeats)]
    return Figure(
        name="memory, read and written",
        value=max(speeds) / 1e9,
        unit="GB/s",
        least=min(speeds) / 1e9,
        most=max(speeds) / 1e9,
        note=f"the fastest of {repeats} copies of {size / 1e6:.0f} MB",
    )
