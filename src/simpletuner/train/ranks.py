"""The processes of one run: who is who, and what they tell each other. training.md §6.2, §9; docs/adr/0021."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from simpletuner.train.requests import rank_lost

T = TypeVar("T")

_PATIENCE = timedelta(days=1)
"""Rank 0 may draw, save and upload for hours; a rank that died is noticed by its connection, not by this."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count` equal ones. Alone, every method does nothing and costs nothing.

    Every rank has to call the same methods in the same order. Each raises UserError `rank_lost` (69) when another one
    is gone.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 writes all files but the caches, draws, and speaks for the others."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes, in place, the sum of that of all ranks."""
        if self.count > 1:
            with _together():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        if self.count > 1:
            with _together():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def share(self, value: T) -> T:
        """What rank 0 says; what the others pass is not looked at."""
        if self.count == 1:
            return value
        holder = [value]
        with _together():
            dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def gather(self, value: T) -> list[T]:
        """What each rank says, in order."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        with _together():
            dist.all_gather_object(found, value)
        return cast(list[T], found)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Rank 0 does it, then the others: they find in the caches what it did."""
        if not self.is_main:
            self.share(None)
        yield
        if self.is_main:
            self.share(None)

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


ALONE = Ranks()


def join_ranks(num_processes: int) -> Ranks:
    """Meet the others, as torchrun's variables say. With GPUs each rank has one of its own.

    Raises UserError `rank_lost` (69).
    """
    if num_processes == 1:
        return ALONE
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        # Words go between the hosts' processors: a GPU is not waited for.
        backend = "cpu:gloo,cuda:nccl"
    with _together():
        dist.init_process_group(backend, timeout=_PATIENCE)
    return Ranks(rank, dist.get_world_size())


@contextmanager
def _together() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise rank_lost("it no longer answers") from error
