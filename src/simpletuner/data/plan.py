"""Which samples make up which batch: a pure function of (seed, epoch, index). training.md §3.7.

Each dataset and bucket owns an endless *stream*: permutation after permutation (*pass* after pass) of its
m = n·(repeats+1) entries, cut into *groups* of g = B·R. An epoch serves the whole groups that its share of the stream
completes, so that nothing is ever pruned: what does not fill a group opens the next epoch's first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.geometry import Bucket, bucket_name
from simpletuner.data.keys import key_seed, u, word
from simpletuner.errors import UserError

Members = NDArray[np.int32]
"""Sample numbers within a dataset."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where the plan goes on; all that a checkpoint keeps of it."""

    epoch: int = 0
    index: int = 0


START = Position()


class Entry(NamedTuple):
    """One use of a sample. `visit` numbers the uses of that sample, over all epochs, from 0."""

    sample: int
    visit: int


@dataclass(frozen=True, slots=True)
class Group:
    """B·R entries of one dataset and bucket, at one position."""

    dataset_id: str
    bucket: Bucket
    entries: tuple[Entry, ...]
    position: Position
    next_position: Position

    def of_rank(self, rank: int, world_size: int) -> tuple[Entry, ...]:
        """The entries of one rank. In order, so that R ranks of B see what one rank of R·B sees."""
        size = len(self.entries) // world_size
        return self.entries[rank * size : (rank + 1) * size]


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """What the plan must know of a dataset."""

    id: str
    buckets: Mapping[Bucket, Members]
    repeats: int = 0
    probability: float = 1.0

    @property
    def size(self) -> int:
        """Entries of one pass over all buckets."""
        return sum(map(len, self.buckets.values())) * (self.repeats + 1)


class _Stream:
    """The endless sequence of entries of one dataset and bucket. Keeps the permutations of the latest two passes."""

    def __init__(self, planned: PlannedSet, bucket: Bucket, seed: int, group_size: int) -> None:
        self.bucket = bucket
        self.members = planned.buckets[bucket]
        self.length = len(self.members) * (planned.repeats + 1)
        self._group_size = group_size
        self._uses = planned.repeats + 1
        self._key = (seed, planned.id, bucket_name(bucket))
        self._orders: dict[int, Members] = {}

    def groups_before(self, epoch: int) -> int:
        return epoch * self.length // self._group_size

    def entries(self, group: int) -> tuple[Entry, ...]:
        first = group * self._group_size
        return tuple(self._entry(number) for number in range(first, first + self._group_size))

    def _entry(self, number: int) -> Entry:
        pass_number, place = divmod(number, self.length)
        repeat, member = divmod(int(self._order(pass_number)[place]), len(self.members))
        return Entry(int(self.members[member]), pass_number * self._uses + repeat)

    def _order(self, pass_number: int) -> Members:
        order = self._orders.get(pass_number)
        if order is None:
            # The raw words of a bit generator never change between numpy versions; its shuffles may.
            words = np.random.Philox(key=key_seed("plan", *self._key, pass_number)).random_raw(self.length)
            order = np.argsort(words, kind="stable").astype(np.int32)
            self._orders = {n: kept for n, kept in self._orders.items() if n == pass_number - 1} | {pass_number: order}
        return order


class EpochPlan:
    """All groups of a run, in order.

    A new walk costs O(index); a step costs O(datasets + buckets), whatever the number of samples, except that each
    pass of a stream shuffles it once. Two walks may run side by side, but not in two threads.
    """

    def __init__(
        self, sets: Sequence[PlannedSet], *, seed: int, batch_size: int, world_size: int = 1, uniform: bool = False
    ) -> None:
        """`uniform` draws datasets by probability alone; otherwise by probability × size."""
        self.sets = tuple(planned for planned in sets if planned.size)
        if not self.sets:
            raise ValueError("an epoch plan needs at least one sample")
        self.seed = seed
        self.group_size = batch_size * world_size
        self._streams = [
            [_Stream(planned, bucket, seed, self.group_size) for bucket in sorted(planned.buckets)]
            for planned in self.sets
        ]
        self._weights = [planned.probability * (1 if uniform else planned.size) for planned in self.sets]

    def groups_before(self, epoch: int) -> int:
        """Groups of all epochs before this one."""
        return sum(stream.groups_before(epoch) for streams in self._streams for stream in streams)

    def groups_in_epoch(self, epoch: int) -> int:
        return self.groups_before(epoch + 1) - self.groups_before(epoch)

    def position_after(self, num_groups: int) -> Position:
        """The position when this many groups have been served."""
        low, high = 0, 1
        while self.groups_before(high) <= num_groups:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.groups_before(middle) <= num_groups else (low, middle)
        return Position(low, num_groups - self.groups_before(low))

    def walk(self, position: Position = START) -> Iterator[Group]:
        """The groups from `position` on, without end."""
        epoch, index = position.epoch, position.index
        while True:
            yield from self._walk_epoch(epoch, index)
            epoch, index = epoch + 1, 0

    def _walk_epoch(self, epoch: int, start: int) -> Iterator[Group]:
        left = [
            [stream.groups_before(epoch + 1) - stream.groups_before(epoch) for stream in streams]
            for streams in self._streams
        ]
        left_of_set = [sum(counts) for counts in left]
        num_groups = sum(left_of_set)
        for index in range(num_groups):
            key = (self.seed, epoch, index)
            which = _pick([w if n else 0 for w, n in zip(self._weights, left_of_set, strict=True)], u("pick", *key))
            counts = left[which]
            bucket = _pick_count(counts, word("pick", *key, "bucket"))
            stream = self._streams[which][bucket]
            if index >= start:
                group = stream.groups_before(epoch + 1) - counts[bucket]
                after = Position(epoch, index + 1) if index + 1 < num_groups else Position(epoch + 1, 0)
                entries = stream.entries(group)
                yield Group(self.sets[which].id, stream.bucket, entries, Position(epoch, index), after)
            counts[bucket] -= 1
            left_of_set[which] -= 1


def _pick(weights: Sequence[float], uniform: float) -> int:
    threshold = uniform * sum(weights)
    last = 0
    for index, weight in enumerate(weights):
        if not weight:
            continue
        threshold -= weight
        last = index
        if threshold < 0:
            break
    return last


def _pick_count(counts: Sequence[int], random_word: int) -> int:
    threshold = (sum(counts) * random_word) >> 64
    for index, count in enumerate(counts):
        threshold -= count
        if threshold < 0:
            return index
    raise AssertionError("a bucket was asked of a dataset without groups left")


def check_full_batch(plan: EpochPlan, num_epochs: int) -> None:
    """Raises `no_full_batch` where `num_epochs` epochs do not fill a single group."""
    if plan.groups_before(num_epochs):
        return
    planned, bucket, size = max(
        ((planned, bucket, len(members)) for planned in plan.sets for bucket, members in planned.buckets.items()),
        key=lambda row: row[2] * (row[0].repeats + 1),
    )
    repeats = -(-plan.group_size // (size * num_epochs)) - 1
    raise UserError(
        "no_full_batch",
        f"{num_epochs} epoch(s) do not fill one batch of {plan.group_size}: the fullest bucket, "
        f"{bucket_name(bucket)} of dataset {planned.id!r}, has {size} sample(s).",
        hint=f"Set its `repeats` to {repeats} or more, lower `train_batch_size`, or train for more epochs.",
    )
