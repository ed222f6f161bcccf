"""The laws of the epoch plan, training.md §3.7."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.data.plan import Entry, EpochPlan, PlannedSet, Position, check_full_batch
from simpletuner.errors import UserError

SQUARE, WIDE = (1024, 1024), (1280, 832)


def planned(id: str = "a", squares: int = 7, wides: int = 0, repeats: int = 0, probability: float = 1.0) -> PlannedSet:
    numbers = np.arange(squares + wides, dtype=np.int32)
    return PlannedSet(id, {SQUARE: numbers[:squares], WIDE: numbers[squares:]}, repeats, probability)


def served(plan: EpochPlan, num_epochs: int) -> list[tuple[str, Entry]]:
    groups = islice(plan.walk(), plan.groups_before(num_epochs))
    return [(group.dataset_id, entry) for group in groups for entry in group.entries]


def test_epochs_of_a_stream_that_the_batch_does_not_divide() -> None:
    plan = EpochPlan([planned()], seed=1, batch_size=2)
    assert [plan.groups_in_epoch(e) for e in range(4)] == [3, 4, 3, 4]
    groups = list(islice(plan.walk(), 7))
    assert [group.position for group in groups[:4]] == [Position(0, 0), Position(0, 1), Position(0, 2), Position(1, 0)]
    assert groups[2].next_position == Position(1, 0)
    assert Counter(entry.sample for group in groups for entry in group.entries) == dict.fromkeys(range(7), 2)


sets = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2), st.sampled_from([0.1, 1.0, 5.0])),
    min_size=1,
    max_size=3,
).map(lambda rows: [planned(f"set{n}", *row) for n, row in enumerate(rows) if row[0] + row[1]])


@settings(deadline=None)
@given(sets.filter(bool), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_uses_per_pass(sets: list[PlannedSet], seed: int, batch_size: int, num_epochs: int, uniform: bool) -> None:
    """L passes serve each sample L·(repeats+1) times, less one unfinished group a stream; each visit once."""
    plan = EpochPlan(sets, seed=seed, batch_size=batch_size, uniform=uniform)
    uses = served(plan, num_epochs)
    assert len(set(uses)) == len(uses)
    for one in sets:
        counts = Counter(entry.sample for id, entry in uses if id == one.id)
        for members in one.buckets.values():
            missing = [num_epochs * (one.repeats + 1) - counts[int(sample)] for sample in members]
            assert all(n >= 0 for n in missing)
            assert sum(missing) < batch_size
    # Every visit number below the count has been served, but for the entries of an unfinished group.
    full = served(plan, num_epochs * batch_size)
    for one in sets:
        for members in one.buckets.values():
            for sample in members:
                visits = {entry.visit for id, entry in full if id == one.id and entry.sample == int(sample)}
                assert visits == set(range(num_epochs * batch_size * (one.repeats + 1)))


@settings(deadline=None)
@given(sets.filter(bool), st.integers(0, 40), st.integers(1, 3))
def test_walk_from_anywhere_is_the_same_walk(sets: list[PlannedSet], num_groups: int, batch_size: int) -> None:
    plan = EpochPlan(sets, seed=3, batch_size=batch_size)
    whole = list(islice(plan.walk(), num_groups + 5))
    position = whole[num_groups - 1].next_position if num_groups else Position()
    assert list(islice(EpochPlan(sets, seed=3, batch_size=batch_size).walk(position), 5)) == whole[num_groups:]
    assert plan.position_after(num_groups) == whole[num_groups].position


def test_ranks_share_the_groups_of_one_rank() -> None:
    sets = [planned("a", 7, 9, 1), planned("b", 5, 0)]
    one, two = EpochPlan(sets, seed=3, batch_size=4), EpochPlan(sets, seed=3, batch_size=2, world_size=2)
    for whole, halves in zip(islice(one.walk(), 30), islice(two.walk(), 30), strict=True):
        assert whole == halves
        assert halves.of_rank(0, 2) + halves.of_rank(1, 2) == whole.entries


def test_weights_shape_the_order_only() -> None:
    sets = [planned("rare", 40, probability=0.05), planned("often", 40)]
    plan = EpochPlan(sets, seed=3, batch_size=1)
    order = [id for id, _ in served(plan, 1)]
    assert Counter(order) == {"rare": 40, "often": 40}
    assert order[:20].count("rare") < 5


def test_uniform_ignores_sizes() -> None:
    sets = [planned("small", 50), planned("large", 5000)]
    shares: list[int] = []
    for uniform in (False, True):
        first = islice(EpochPlan(sets, seed=3, batch_size=1, uniform=uniform).walk(), 80)
        shares.append(sum(group.dataset_id == "small" for group in first))
    assert shares[0] < 6 and 25 < shares[1] < 51


def test_passes_differ_and_the_seed_matters() -> None:
    first, second = (
        [entry.sample for _, entry in served(EpochPlan([planned("a", 30)], seed=seed, batch_size=1), 2)]
        for seed in (1, 2)
    )
    assert first != second
    assert first[:30] != first[30:]


def test_order_survives_another_hash_seed() -> None:
    code = (
        "import numpy as np; from itertools import islice; from simpletuner.data.plan import *\n"
        "sets = [PlannedSet(n, {(64, 64): np.arange(9, dtype=np.int32), (128, 64): np.arange(9, 12, dtype=np.int32)},"
        " 1) for n in 'ab']\n"
        "print([(g.dataset_id, g.entries) for g in islice(EpochPlan(sets, seed=7, batch_size=2).walk(), 40)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_no_full_batch() -> None:
    plan = EpochPlan([planned("a", 3)], seed=1, batch_size=8)
    with pytest.raises(UserError) as caught:
        check_full_batch(plan, 2)
    assert caught.value.code == "no_full_batch"
    assert "`repeats` to 1 " in caught.value.hint
    check_full_batch(EpochPlan([planned("a", 3, repeats=1)], seed=1, batch_size=8), 2)


def test_golden_order() -> None:
    """A changed order would break the resume of every run under way: a diff here is a decision."""
    groups = list(islice(EpochPlan([planned("a", 4, 2), planned("b", 3)], seed=1337, batch_size=2).walk(), 4))
    assert [(group.dataset_id, group.bucket, group.entries) for group in groups] == GOLDEN


GOLDEN: list[object] = [
    ("b", (1024, 1024), ((1, 0), (2, 0))),
    ("a", (1280, 832), ((4, 0), (5, 0))),
    ("a", (1024, 1024), ((1, 0), (0, 0))),
    ("a", (1024, 1024), ((2, 0), (3, 0))),
]
