"""What memory a run will need, phase by phase, found by rehearsing it on shapes. training.md §10.4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from simpletuner.config.prompt import parse_resolutions
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.geometry import Size
from simpletuner.data.loader import Batch
from simpletuner.data.manifest import Manifest
from simpletuner.data.prepare import MASK
from simpletuner.families.base import build_family
from simpletuner.families.spec import FamilySpec
from simpletuner.families.weights import autocast_dtype, weight_dtype
from simpletuner.train.attention import Call, Calls
from simpletuner.train.buffer import FlatParameters, build_buffers, clip_gradients
from simpletuner.train.ema import Ema
from simpletuner.train.libraries import LIBRARIES
from simpletuner.train.memory import MemoryPlan, Phase
from simpletuner.train.memory_parts import Parts
from simpletuner.train.meter import Meter, rehearsal
from simpletuner.train.optim import OPTIMIZERS, build_optimizers
from simpletuner.train.trained import prepare_denoiser

_CPU = torch.device("cpu")
_SAMPLE = 256
"""Side of the small weight on which a library's optimizer shows how large its state is."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The largest work of each kind that the data holds; sizes are (width, height) in pixels."""

    encoded: tuple[int, Size]
    """Pictures that go through the autoencoder at once."""
    trained: Size
    references: tuple[Size, ...]

    @classmethod
    def of(cls, manifests: Iterable[Manifest], config: TrainConfig, vae_batch_size: int | None = None) -> Shapes:
        """Of everything that training reads, with at most `vae_batch_size` pictures encoded at once."""
        encoded: list[tuple[int, Size]] = []
        trained: list[tuple[Size, tuple[Size, ...]]] = []
        combined = config.data.conditioning_multidataset_sampling == "combined"
        for manifest in manifests:
            pictures = [mates for mates in manifest.mates if mates.kind != MASK]
            for members in manifest.buckets().values():
                row = int(members[0])
                count = min(len(members), vae_batch_size or manifest.dataset.vae_batch_size)
                encoded += [(count, part.plan(row).target) for part in (manifest, *pictures)]
                sizes = sorted((mates.plan(row).target for mates in pictures), key=_area)
                trained.append((manifest.plan(row).target, tuple(sizes if combined else sizes[-1:])))
        largest = max(trained, key=lambda sizes: _area(sizes[0]) + sum(map(_area, sizes[1])))
        return cls(max(encoded, key=lambda some: some[0] * _area(some[1])), *largest)


@dataclass(frozen=True, slots=True)
class Training:
    """What the phases of training take, in bytes."""

    phases: dict[Phase, int]
    checkpoint_bytes: int
    """On disk: trained weights, their average, the optimizer's state."""
    caption_bytes: int
    """Of the longest caption's embeddings."""


class Rehearsal:
    """Plays each phase of a run on shapes; a phase's bytes are those of its tensors at their peak."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, shapes: Shapes) -> None:
        self._config = config
        self._shapes = shapes
        self._family = build_family(config, spec, shapes_only=True)
        with rehearsal():
            vae: Any = self._family.load_autoencoder(_CPU)
        self._channels: int = vae.config["latent_channels"]
        self._latent_dtype: torch.dtype = vae.dtype

    def run(self, state_ratio: float | None) -> dict[Phase, int]:
        """Of all phases; `state_ratio` as of `training`."""
        return self.encoding() | self.training(state_ratio).phases

    def encoding(self) -> dict[Phase, int]:
        return {"text": self.text(), "latents": self.latents()}

    def text(self, batch_size: int | None = None) -> int:
        """All encoders are there together; each reads a batch of captions of full length."""
        count = batch_size or self._config.text_embeds.text_encoder_batch_size
        with rehearsal() as meter, torch.inference_mode():
            for encoder, slot in zip(self._family.load_text_encoders(_CPU), self._family.spec.text, strict=True):
                encoder(torch.zeros(count, slot.length, dtype=torch.long))
        return meter.peak_bytes

    def latents(self) -> int:
        with rehearsal() as meter, torch.inference_mode():
            vae = self._family.load_autoencoder(_CPU)
            count, (width, height) = self._shapes.encoded
            pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8).float()
            vae.encode(pixels.to(vae.dtype), return_dict=False)
        return meter.peak_bytes

    def training(self, state_ratio: float | None) -> Training:
        """`state_ratio`: bytes of optimizer state per trained weight, where a rehearsal cannot make that state."""
        with rehearsal() as meter:
            return self._training(meter, state_ratio)

    def _training(self, meter: Meter, ratio: float | None) -> Training:
        config, family = self._config, self._family
        denoiser = family.load_denoiser()
        prepare_denoiser(denoiser, config, family.spec, compiles=False)
        released = config.optimizer.optimizer_release_gradients
        buffers = build_buffers(denoiser, gradients=not released)
        before_state = meter.live_bytes
        # State that is alive as long as this list.
        kept: list[Any] = [Ema(buffers, config.precision.ema_decay)] if config.precision.use_ema else []
        if ratio is None:
            kept += build_optimizers(config.optimizer.optimizer, buffers, 0)
        if released:
            for parameter in denoiser.parameters():
                if parameter.requires_grad:
                    # The arithmetic of a step is seconds of shapes, and takes no memory worth the name.
                    parameter.register_post_accumulate_grad_hook(_release)
        state_bytes = round(sum(buffer.weights.numel() for buffer in buffers) * (ratio or 0.0))
        weights = sum(parameter.nbytes for parameter in denoiser.parameters() if parameter.requires_grad)
        checkpoint = weights + state_bytes + meter.live_bytes - before_state
        lasting = meter.live_bytes + state_bytes
        meter.restart()
        self._micro_step(denoiser)
        step = meter.peak_bytes + state_bytes
        meter.restart()
        validation = self._draw(denoiser, meter) + state_bytes
        meter.restart()
        save = meter.live_bytes + state_bytes + weights
        caption = sum(tensor.nbytes for tensor in family.longest_caption(denoiser).values())
        phases: dict[Phase, int] = {"step": step, "validation": validation, "save": save}
        if config.fsdp.fsdp_enable:
            phases = Parts(denoiser, config.fsdp, lasting, config.run.num_processes).phases(phases)
        return Training(phases, checkpoint, caption)

    def attention_calls(self) -> Counter[Call]:
        """Of a micro-step: forward, and what is recomputed."""
        with rehearsal(), Calls() as calls:
            denoiser = self._family.load_denoiser()
            prepare_denoiser(denoiser, self._config, self._family.spec, compiles=False)
            self._micro_step(denoiser)
        return calls.seen

    def _micro_step(self, denoiser: nn.Module) -> None:
        config = self._config
        dtype = autocast_dtype(config)
        batch = self._batch(denoiser, config.run.train_batch_size, self._shapes.trained, self._shapes.references)
        noisy, target = (torch.zeros(batch.latents_BCHW.shape) for _ in range(2))
        times = torch.zeros(len(noisy))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            predicted = self._family.predict(denoiser, noisy, times.long(), batch)
        torch.autograd.backward((predicted.float() - target).square().mean(dim=(1, 2, 3)).mean())

    def _draw(self, denoiser: nn.Module, meter: Meter) -> int:
        """The network at the largest validation size, then the autoencoder, which has come to stay."""
        options = self._config.validation
        if options.validation_disable:
            return meter.live_bytes
        vae: Any = self._family.load_autoencoder(_CPU)
        size = max(parse_resolutions(options.validation_resolution), key=_area)
        # Families that are not told of guidance draw with and without the prompt at once.
        count = 2 if self._family.spec.objective == "diffusion" else 1
        with torch.inference_mode():
            batch = self._batch(denoiser, count, size, self._shapes.references)
            self._family.predict(denoiser.eval(), batch.latents_BCHW, torch.zeros(count).long(), batch)
            vae.decode(batch.latents_BCHW[:1].to(vae.dtype), return_dict=False)
        return meter.peak_bytes

    def latent_bytes(self, size: Size) -> int:
        """Of a picture's cached latent."""
        stride = self._family.spec.latent.stride
        return self._channels * (size[1] // stride) * (size[0] // stride) * self._latent_dtype.itemsize

    def _batch(self, denoiser: nn.Module, count: int, size: Size, references: tuple[Size, ...]) -> Batch:
        entry = self._family.longest_caption(denoiser)
        return Batch.of_nobody(
            self._latent(count, size),
            self._family.collate_text([entry] * count),
            size,
            tuple(self._latent(count, reference) for reference in references),
        )

    def _latent(self, count: int, size: Size) -> Tensor:
        stride = self._family.spec.latent.stride
        return torch.zeros(count, self._channels, size[1] // stride, size[0] // stride)


def _release(parameter: Tensor) -> None:
    parameter.grad = None


def plan_memory(
    config: TrainConfig,
    spec: FamilySpec,
    manifests: Mapping[str, Manifest],
    device: torch.device,
    budget_bytes: int | None = None,
) -> MemoryPlan:
    """Of a run over these datasets. Raises UserError `will_not_fit` (71) where it would find no room to train in."""
    shapes = Shapes.of([manifests[entry.id] for entry in config.image_datasets], config)
    plan = rehearse(config, spec, shapes, device)
    plan.budget_bytes = budget_bytes
    plan.enter("step", "save")
    if not config.validation.validation_disable:
        plan.enter("validation")
    return plan


def rehearse(config: TrainConfig, spec: FamilySpec, shapes: Shapes, device: torch.device) -> MemoryPlan:
    """Takes about a second of CPU time and no memory worth the name."""
    return plan_phases(config, device, Rehearsal(config, spec, shapes).run(state_ratio(config, device)))


def plan_phases(config: TrainConfig, device: torch.device, phases: dict[Phase, int]) -> MemoryPlan:
    """Against what the device has, and on a CPU with what this process holds."""
    may_refuse = not config.model.i_know_what_i_am_doing
    return MemoryPlan(phases, device, held_bytes(), memory_of(device), may_refuse=may_refuse)


def memory_of(device: torch.device) -> int:
    """Bytes that there are, free or not."""
    if device.type == "cpu":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(device).total_memory


def held_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def state_ratio(config: TrainConfig, device: torch.device) -> float | None:
    """None for our own optimizers, which a rehearsal can run."""
    name = config.optimizer.optimizer
    if name not in LIBRARIES:
        return None
    dtype = torch.float32 if config.model.model_type == "lora" else weight_dtype(config)
    weight = nn.Parameter(torch.zeros(_SAMPLE, _SAMPLE, dtype=dtype, device=device))
    buffer = FlatParameters([("weight", weight)])
    buffer.grads.fill_(1e-3)
    optimizer = OPTIMIZERS[name](buffer, 0)
    optimizer.step(1e-4, 0, clip_gradients([buffer], 0.0, "norm"))
    return sum(tensor.nbytes for tensor in optimizer.state.values()) / buffer.weights.numel()


def _area(size: Size) -> int:
    return size[0] * size[1]
