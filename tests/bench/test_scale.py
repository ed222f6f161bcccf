"""The benchmark of large datasets builds what it says; nothing here judges a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.bench import event_log, scale
from simpletuner.bench.scene import Scene
from simpletuner.data.plan import EpochPlan

pytestmark = pytest.mark.slow


def test_a_synthetic_dataset_is_served_whole(tmp_path: Path) -> None:
    (dataset,) = Scene(tmp_path, 8).config().image_datasets
    manifest = scale.synthetic_manifest(dataset, 100, tmp_path)
    assert len(manifest.kept) == len(set(manifest.paths)) == len(manifest.effective_captions()) == 100
    assert len(manifest.buckets()) == 10
    plan = EpochPlan([manifest.planned_set()], seed=1, batch_size=5)
    groups = [group for _, group in zip(range(plan.groups_in_epoch(0)), plan.walk(), strict=False)]
    assert sorted(entry.sample for group in groups for entry in group.entries) == list(range(100))


def test_every_kind_of_poll_is_measured(tmp_path: Path) -> None:
    found = event_log.main(tmp_path, rows=300, polls=5)
    assert {kind: len(times) for kind, times in found.items()} == {"at the end": 5, "from anywhere": 5, "of one job": 5}
