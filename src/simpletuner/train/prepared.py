"""What a run trains and the optimizer that does it, made of a loaded denoiser; spread over the ranks where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.families.base import Family
from simpletuner.train.backward_update import BackwardUpdate
from simpletuner.train.buffer import build_buffers
from simpletuner.train.ema import Ema
from simpletuner.train.optim import build_optimizers
from simpletuner.train.ranks import Ranks
from simpletuner.train.report import Reporter
from simpletuner.train.state import seed_generators
from simpletuner.train.trained import FullWeights, Trained, prepare_denoiser
from simpletuner.train.update import Update

if TYPE_CHECKING:
    from simpletuner.train.company import Company


class Prepared(NamedTuple):
    trained: Trained
    update: Update
    company: Company | None
    """Where weights are spread over the ranks."""

    def attend(self) -> None:
        """Of the ranks but the first: do along what that does."""
        if self.company is not None:
            self.company.attend()

    def release(self) -> None:
        """Of the first."""
        if self.company is not None:
            self.company.release()


def prepare(
    denoiser: nn.Module,
    config: TrainConfig,
    family: Family,
    total_steps: int,
    *,
    device: torch.device,
    ranks: Ranks,
    reporter: Reporter,
    probe: Callable[[nn.Module], Tensor],
    kernels: Sequence[str] | None,
) -> Prepared:
    """Rank 0 keeps the moving average for all, unless each has a part of the weights; `probe`: as of FullWeights."""
    seed = config.run.seed or 0
    # Again, so that an adapter begins alike whatever had to be encoded before.
    seed_generators(seed)
    adapter = prepare_denoiser(denoiser, config, family.spec, kernels)
    if (backend := config.compute.dynamo_backend) != "no":
        reporter.notify("compiling", f"The first step compiles the blocks ({backend}): it may take minutes.")
    company, kind = None, type(denoiser)
    if adapter is not None:
        from simpletuner.train.trained_adapter import AdapterWeights, load_adapter_file

        if config.adapter.init_lora:
            load_adapter_file(adapter, config.adapter.init_lora)
        trained: Trained = AdapterWeights(denoiser, adapter, family.spec.name)
        reporter.notify("adapter_attached", f"{trained.adapter_name}.", **adapter.facts())
    else:
        trained = FullWeights(family, denoiser, probe)
    if config.fsdp.fsdp_enable:
        # Not at the top: a run without it imports none of torch's distributed checkpoints.
        from simpletuner.train.company import Company
        from simpletuner.train.sharding import build_sharded_buffers, shard
        from simpletuner.train.spread_weights import SpreadWeights

        mesh = shard(denoiser, config.fsdp, ranks, device)
        buffers = build_sharded_buffers(denoiser, mesh)
        company = Company(denoiser, ranks)
        if adapter is None:
            trained = SpreadWeights(family, denoiser, probe, kind, company)
    else:
        buffers = build_buffers(denoiser, gradients=not config.optimizer.optimizer_release_gradients)
    is_spread = any(buffer.is_sharded for buffer in buffers)
    averages = config.precision.use_ema and (ranks.is_main or is_spread)
    ema = Ema(buffers, config.precision.ema_decay) if averages else None
    optimizers = build_optimizers(config.optimizer.optimizer, buffers, seed, reporter.warn)
    keeps = config.model.model_type == "lora"
    make = partial(BackwardUpdate, denoiser) if config.optimizer.optimizer_release_gradients else Update
    update = make(buffers, optimizers, config.optimizer, total_steps, ema, keeps_weights=keeps, ranks=ranks)
    if company is not None:
        company.follow(update)
    return Prepared(trained, update, company)
