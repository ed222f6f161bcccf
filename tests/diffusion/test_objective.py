"""Noise, targets and weights against training.md §4.2. Acceptance 20, 29."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simpletuner.config.training_options import LossOptions
from simpletuner.diffusion.objective import DiffusionObjective, Noised, alphas_cumulative, min_snr_weight

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
VISITS = [("set/a.png", 0), ("set/b.png", 3), ("set/a.png", 1), ("set/c.png", 0)]
LATENTS = torch.randn(4, 4, 6, 8, generator=torch.Generator().manual_seed(1))


def objective(seed: int = 7, samples: int = 4, prediction: Any = None, **options: Any) -> DiffusionObjective:
    return DiffusionObjective(
        LINEAR, LossOptions(**options), seed=seed, samples_per_step=samples, prediction_type=prediction
    )


def test_alphas_are_the_published_ones() -> None:
    alphas = alphas_cumulative(LINEAR)
    assert alphas.dtype == np.float64
    assert alphas[[0, 250, 999]] == pytest.approx([0.9999, 0.521423, 4.0358e-5], rel=2e-5)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_are_those_of_diffusers(schedule: str) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    theirs = DDPMScheduler(**(LINEAR | {"beta_schedule": schedule})).alphas_cumprod
    assert alphas_cumulative(LINEAR | {"beta_schedule": schedule}) == pytest.approx(theirs.numpy(), rel=2e-4)


def test_min_snr() -> None:
    alphas = alphas_cumulative(LINEAR)
    assert min_snr_weight(alphas, 5.0, "epsilon")[100] == pytest.approx(0.586, abs=5e-4)
    assert min_snr_weight(alphas, 5.0, "v_prediction")[100] == pytest.approx(0.524, abs=5e-4)
    snr = alphas / (1 - alphas)
    assert min_snr_weight(alphas, 5.0, "sample") == pytest.approx(np.minimum(snr, 5.0))
    assert min_snr_weight(np.zeros(1), 5.0, "epsilon") == pytest.approx([1.0])
    assert (min_snr_weight(alphas, None, "epsilon") == 1).all()


def noise_of(noised: Noised, latents: Tensor) -> Tensor:
    """ε from x_t, in fp64."""
    alphas = torch.from_numpy(alphas_cumulative(LINEAR))[noised.t_B].view(-1, 1, 1, 1)
    return (noised.latents_BCHW.double() - alphas.sqrt() * latents.double()) / (1 - alphas).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_targets(prediction: str) -> None:
    noised = objective(prediction=prediction).draw(LATENTS, VISITS, step=0, first=0)
    alphas = torch.from_numpy(alphas_cumulative(LINEAR))[noised.t_B].view(-1, 1, 1, 1)
    noise, x = noise_of(noised, LATENTS), LATENTS.double()
    wanted = {
        "epsilon": noise,
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * x,
        "sample": x,
    }[prediction]
    # ε is recovered by a division, ill-conditioned where there is little of it: compare where it is not.
    rows = (1 - alphas).view(-1) > 1e-3
    assert torch.allclose(noised.target_BCHW.double()[rows], wanted[rows], atol=2e-4)
    assert noised.latents_BCHW.dtype is noised.target_BCHW.dtype is noised.weight_B.dtype is torch.float32
    assert noised.t_B.dtype is torch.int64


def test_the_prediction_type_is_the_schedulers_unless_said_otherwise() -> None:
    config = LINEAR | {"prediction_type": "v_prediction"}
    assert DiffusionObjective(config, LossOptions(), seed=1, samples_per_step=1).prediction_type == "v_prediction"
    said = DiffusionObjective(config, LossOptions(), seed=1, samples_per_step=1, prediction_type="epsilon")
    assert said.prediction_type == "epsilon"


def test_noise_is_standard_normal_and_level_and_ratio_follow_t() -> None:
    latents = torch.zeros(64, 4, 16, 16)
    visits = [(f"set/{index}", 0) for index in range(64)]
    noised = objective(samples=64).draw(latents, visits, step=0, first=0)
    noise = noised.target_BCHW
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.01
    assert torch.equal(noised.level_B, noised.t_B / 1000)
    alphas = torch.from_numpy(alphas_cumulative(LINEAR))[noised.t_B]
    assert torch.allclose(noised.ratio_B.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"offset_noise": True, "noise_offset_probability": 0.5}])
def test_draws_do_not_depend_on_the_split_into_batches(options: dict[str, Any]) -> None:
    whole = objective(**options).draw(LATENTS, VISITS, step=9, first=0)
    parts = [objective(**options).draw(LATENTS[i : i + 2], VISITS[i : i + 2], step=9, first=i) for i in (0, 2)]
    for name in Noised.__slots__:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_draws_neither_use_nor_disturb_the_generators_of_the_process() -> None:
    first = objective().draw(LATENTS, VISITS, step=2, first=0)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state()
    second = objective().draw(LATENTS, VISITS, step=2, first=0)
    assert torch.equal(before, torch.get_rng_state())
    for name in Noised.__slots__:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_draws_depend_on_seed_sample_and_visit() -> None:
    latents = torch.zeros(1, 4, 6, 8)

    def noise(seed: int, sample: str, visit: int) -> bytes:
        drawn = objective(seed, samples=1).draw(latents, [(sample, visit)], step=0, first=0)
        return drawn.target_BCHW.numpy().tobytes()

    keys = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    assert len({noise(*key) for key in keys}) == 4


def test_the_noise_offset_is_one_number_a_channel() -> None:
    plain = objective().draw(LATENTS, VISITS, step=0, first=0).target_BCHW
    always = {"offset_noise": True, "noise_offset": 0.3, "noise_offset_probability": 1.0}
    shift = objective(**always).draw(LATENTS, VISITS, step=0, first=0).target_BCHW - plain
    assert float((shift - shift[:, :, :1, :1]).abs().max()) < 1e-6
    assert len(set(shift[:, :, 0, 0].flatten().tolist())) == 16
    never = objective(offset_noise=True, noise_offset_probability=0.0)
    assert torch.equal(never.draw(LATENTS, VISITS, step=0, first=0).target_BCHW, plain)


def test_levels_of_the_held_out_loss() -> None:
    noise = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    noised = objective().at_levels(LATENTS[:2], noise, [0.0, 0.9999])
    assert noised.t_B.tolist() == [0, 999]
    assert torch.equal(noised.target_BCHW, noise)
