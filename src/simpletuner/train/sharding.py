"""Spreads a denoiser's weights over the ranks (FSDP2), with this rank's part in the flat buffers of the optimizer.

Sums are taken by FSDP as it reduces: the loss is divided by the number of ranks already. docs/adr/0031.
"""

from __future__ import annotations

import hashlib
import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from simpletuner.config.fsdp_options import FsdpOptions
from simpletuner.errors import UserError
from simpletuner.train.blocks import blocks_of
from simpletuner.train.buffer import FlatParameters, build_buffers
from simpletuner.train.ranks import Ranks

# diffusers' blocks return slices of what they computed, and nobody writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

_ROWS = 8
"""What has no multiple of so many rows stays whole: up to as many ranks it is the same that is cut."""


class ShardedParameters(FlatParameters):
    """This rank's rows of parameters that are spread over all; `weights` and `grads` are where FSDP has them too."""

    is_sharded = True

    def __init__(self, named: dict[str, nn.Parameter], denoiser: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__([(name, nn.Parameter(_local(parameter))) for name, parameter in named.items()])
        self.mesh = mesh
        self.stream = mesh.get_local_rank()
        self._shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        denoiser.load_state_dict(self.spread(self.weights), strict=False, assign=True)
        there = dict(denoiser.named_parameters())
        for name, gradient in self.spread(self.grads).items():
            there[name].grad = gradient

    def spread(self, flat: Tensor) -> dict[str, DTensor]:
        return {
            name: DTensor.from_local(view, self.mesh, [Shard(0)], run_check=False)
            for name, view in self.named_views(flat)
        }

    @property
    def layout(self) -> str:
        """Of the whole tensors, however many ranks there are."""
        rows = [str(self.weights.dtype), *(f"{name}:{shape}" for name, shape in self._shapes.items())]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def shard(denoiser: nn.Module, options: FsdpOptions, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """Frozen or trained; what cannot be cut into equal rows, and an adapter, stays whole on every rank.

    Raises UserError `unknown_block_class`.
    """
    mesh = init_device_mesh(device.type, (ranks.count,))
    blocks = _chosen_blocks(denoiser, options.fsdp_transformer_layer_cls_to_wrap)
    is_adapter = any(not parameter.requires_grad for parameter in denoiser.parameters())
    rows = math.lcm(_ROWS, ranks.count)
    whole = {
        parameter
        for parameter in denoiser.parameters()
        if parameter.ndim == 0 or parameter.shape[0] % rows or (is_adapter and parameter.requires_grad)
    }
    again = options.fsdp_reshard_after_forward
    for module in (*blocks, denoiser):
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=whole)
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return mesh


def build_sharded_buffers(denoiser: nn.Module, mesh: DeviceMesh) -> list[FlatParameters]:
    """Of each type the parameters that are spread, then those that are whole on every rank."""
    by_type: dict[torch.dtype, dict[str, nn.Parameter]] = {}
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad and isinstance(parameter, DTensor):
            by_type.setdefault(parameter.dtype, {})[name] = parameter
    sharded = [ShardedParameters(named, denoiser, mesh) for named in by_type.values()]
    return [*sharded, *build_buffers(denoiser, without=frozenset(name for named in by_type.values() for name in named))]


def gather(buffer: ShardedParameters, flat: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """On rank 0 the whole tensors in host memory, one after the other; on the others nothing. All have to call it."""
    found: dict[str, Tensor] = {}
    for name, view in buffer.named_views(flat):
        part = view.contiguous()
        parts = [torch.empty_like(part) for _ in range(ranks.count)] if ranks.is_main else None
        dist.gather(part, parts)
        if parts is not None:
            found[name] = torch.cat(parts).cpu()
    return found


def _chosen_blocks(denoiser: nn.Module, classes: str | None) -> list[nn.Module]:
    blocks = blocks_of(denoiser)
    if not classes:
        return blocks
    wanted = {name.strip() for name in classes.split(",")}
    there = sorted({type(block).__name__ for block in blocks})
    if unknown := sorted(wanted - set(there)):
        raise UserError(
            "unknown_block_class",
            f"The model repeats no block of the class {', '.join(unknown)}.",
            hint=f"It has {', '.join(there)}.",
            pointer="/--fsdp_transformer_layer_cls_to_wrap",
        )
    return [block for block in blocks if type(block).__name__ in wanted]


def _local(parameter: nn.Parameter) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()
