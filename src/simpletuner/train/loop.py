"""The training loop, whole. The order after a step is fixed: metrics, requests, checkpoint, validation, end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from simpletuner.data.loader import Batch
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import Objective
from simpletuner.families.base import Family
from simpletuner.train.due import Due
from simpletuner.train.lead import Between, Lead
from simpletuner.train.metrics import StepFacts
from simpletuner.train.ranks import Ranks
from simpletuner.train.sentinel import Used
from simpletuner.train.state import TrainState
from simpletuner.train.update import Update

Outcome = Literal["completed", "stop", "cancel", "yield"]


@dataclass(slots=True)
class Run:
    """All that the loop uses; built in `train/run.py`."""

    batches: Iterator[Batch]
    family: Family
    denoiser: nn.Module
    objective: Objective
    loss: Loss
    update: Update
    state: TrainState
    lead: Lead
    due: Due
    between: Between
    ranks: Ranks
    accumulation: int
    autocast: torch.dtype | None


def train(run: Run) -> Outcome:
    """Until the last step, or until asked to end. Each step: every micro-step of the accumulation, then one update.

    Gradients are of the mean over all samples of a step, those of all ranks. Raises RollBack, and UserError `diverged`
    or `dead_run` (72), `rank_lost` (69).
    """
    state, ranks, device = run.state, run.ranks, next(run.denoiser.parameters()).device
    total_loss = torch.zeros((), device=device)
    used: list[Used] = []
    count, waited_s = 0, 0.0
    while not run.due.end(state):
        asked_at = time.perf_counter()
        batch = next(run.batches).to(device)
        waited_s += time.perf_counter() - asked_at
        size = len(batch.samples)
        visits = list(zip(batch.samples, batch.visits, strict=True))
        drawn = run.objective.draw(batch.latents_BCHW, visits, step=state.step, first=count + ranks.rank * size)
        noised = drawn.to(device)
        with torch.autocast(device.type, run.autocast, enabled=run.autocast is not None):
            predicted = run.family.predict(run.denoiser, noised.latents_BCHW, noised.t_B, batch)
        loss = run.loss(predicted, noised, batch.mask_BHW) / (run.accumulation * ranks.count)
        run.update.begin(state.step)
        loss.backward()
        total_loss += loss.detach()
        used.append(Used(batch.members, batch.latents_BCHW.shape, count))
        count += size * ranks.count
        if not batch.is_last_micro:
            continue
        ranks.add_up([*run.update.own_gradients, total_loss])
        rate = run.update.rate(state.step)
        norm = run.update.apply(state.step)
        state.advance(batch.next_position, count)
        facts = StepFacts(state.step, batch.position.epoch, rate, count, waited_s, tuple(used))
        requests = run.lead.hear(facts, total_loss, norm)
        total_loss.zero_()
        used, count, waited_s = [], 0, 0.0
        is_to_save, is_to_look = run.due.checkpoint(state, requests), run.due.validation(state, requests)
        if is_to_save:
            run.between.checkpoint(state, requests)
        if is_to_look:
            run.between.validate(state, requests)
        if is_to_save or is_to_look:
            state.best = ranks.share(state.best)
        if requests.end is not None:
            return requests.end
    return "completed"
