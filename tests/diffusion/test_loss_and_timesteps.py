"""Which timesteps are drawn, and how wrong a prediction is. training.md §4.2; acceptance 20–22."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.training_options import LossOptions
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import DiffusionObjective, Noised
from simpletuner.diffusion.timesteps import StratifiedTimesteps, timestep_weights
from simpletuner.families.registry import load_spec

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def drawn(options: LossOptions, samples: int, steps: int, seed: int = 3) -> np.ndarray:
    """Steps × samples."""
    timesteps = StratifiedTimesteps(timestep_weights(1000, options), seed=seed, samples_per_step=samples)
    rows = [timesteps.draw(step, 0, [(f"set/{index}", step) for index in range(samples)]) for step in range(steps)]
    return np.stack(rows)


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_a_biased_part_has_its_share_whatever_the_batch(samples: int) -> None:
    options = LossOptions(timestep_bias_strategy="later", timestep_bias_multiplier=10, timestep_bias_portion=0.25)
    found = drawn(options, samples, 16000 // samples)
    assert np.mean(found >= 750) == pytest.approx(10 / 13, abs=0.01)
    for column in found.T[: 2 if samples < 8 else 1]:
        assert np.mean(column >= 750) == pytest.approx(10 / 13, abs=0.04), "every sample keeps the full marginal"


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(
    ("flavour", "low", "high"), [("900M-1024-v0.7-stage1", 200, 999), ("900M-1024-v0.7-stage2", 0, 199)]
)
def test_an_expert_keeps_to_its_range(flavour: str, low: int, high: int, samples: int) -> None:
    values = load_spec("pixart_sigma").flavours[flavour].values
    found = drawn(LossOptions(**values), samples, 12000 // samples)
    assert (found.min(), found.max()) == (low, high)


@given(
    strategy=st.sampled_from(["none", "earlier", "later", "range"]),
    multiplier=st.floats(0.1, 100),
    portion=st.floats(0, 1),
    strength=st.floats(0.01, 0.99),
    refiner=st.booleans(),
    inverted=st.booleans(),
)
def test_weights_are_a_distribution_of_two_heights(
    strategy: Any, multiplier: float, portion: float, strength: float, refiner: bool, inverted: bool
) -> None:
    options = LossOptions(
        timestep_bias_strategy=strategy,
        timestep_bias_multiplier=multiplier,
        timestep_bias_portion=portion,
        timestep_bias_begin=100,
        timestep_bias_end=300,
        refiner_training=refiner,
        refiner_training_strength=strength,
        refiner_training_invert_schedule=inverted,
    )
    weights = timestep_weights(1000, options)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    heights = np.unique(weights[weights > 0])
    assert heights[-1] / heights[0] == pytest.approx(1) or heights[-1] / heights[0] == pytest.approx(
        max(multiplier, 1 / multiplier)
    )
    border = round(strength * 1000)
    allowed = slice(border, 1000) if inverted else slice(0, border)
    if refiner:
        assert (weights[allowed] > 0).all() and np.count_nonzero(weights) == len(weights[allowed])


@pytest.mark.parametrize("samples", [2, 8, 50])
def test_the_samples_of_a_step_are_stratified(samples: int) -> None:
    for row in drawn(LossOptions(), samples, 20):
        assert sorted(int(t * samples / 1000) for t in row) == list(range(samples))


def test_the_marginal_is_uniform() -> None:
    counts = np.bincount(drawn(LossOptions(), 4, 5000).ravel() // 100, minlength=10)
    assert counts.tolist() == pytest.approx([2000] * 10, rel=0.1)


def noised(t: int = 250, shape: tuple[int, ...] = (1, 4, 2, 2), weight: float = 1.0) -> Noised:
    objective = DiffusionObjective(LINEAR, LossOptions(), seed=1, samples_per_step=1)
    at = objective.at_levels(torch.zeros(shape), torch.zeros(shape), [t / 1000] * shape[0])
    return Noised(at.latents_BCHW, at.target_BCHW, at.t_B, torch.full((shape[0],), weight), at.level_B, at.ratio_B)


@pytest.mark.parametrize(("schedule", "width"), [("snr", 0.335), ("exponential", 0.562), ("constant", 0.1)])
def test_huber_widths(schedule: Any, width: float) -> None:
    loss = Loss(LossOptions(loss_type="huber", huber_schedule=schedule, huber_c=0.1))
    assert loss.width(noised(250)).item() == pytest.approx(width, abs=6e-4)


@pytest.mark.parametrize("difference", [0.0, 0.01, 0.5, 30.0])
def test_losses(difference: float) -> None:
    predicted = torch.full((1, 4, 2, 2), difference)
    c = 0.1
    bent = (difference**2 + c**2) ** 0.5 - c
    wanted = {"l2": difference**2, "huber": 2 * c * bent, "smooth_l1": 2 * bent}
    for kind, value in wanted.items():
        loss = Loss(LossOptions(loss_type=kind, huber_schedule="constant", huber_c=c))  # pyright: ignore[reportArgumentType]
        assert loss(predicted, noised()).item() == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_the_loss_is_a_weighted_mean_in_fp32() -> None:
    at = noised(shape=(2, 4, 2, 2))
    at = Noised(at.latents_BCHW, at.target_BCHW, at.t_B, torch.tensor([1.0, 3.0]), at.level_B, at.ratio_B)
    predicted = torch.ones(2, 4, 2, 2, dtype=torch.bfloat16)
    predicted[1] = 2
    loss = Loss(LossOptions())(predicted, at)
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx((1 * 1 + 3 * 4) / 2)


def test_every_sample_counts_alike_and_every_element_of_it() -> None:
    """The mean over a batch is the mean of the samples' own losses: splitting a batch changes nothing."""
    predicted = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    at = noised(shape=(4, 4, 2, 2))
    loss = Loss(LossOptions(loss_type="huber"))
    one = noised()
    apart = torch.stack([loss(row[None], one) for row in predicted]).mean()
    assert loss(predicted, at).item() == pytest.approx(apart.item(), rel=1e-6)
