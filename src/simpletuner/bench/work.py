"""A training step of a model with random weights, of nano's or of full size: what the rows of a GPU measure.

No dataset and no cache: one batch that does not change, through the family, the mean square, and the trainer's Update.
No GPU has run the full sizes yet; what runs on a CPU with nano is the same code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.bench.memory import write_datasets
from simpletuner.bench.scene import Scene
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.loader import Batch
from simpletuner.families.base import Family, build_family
from simpletuner.families.registry import load_spec
from simpletuner.families.weights import autocast_dtype
from simpletuner.train.adamw import ADAMW_BF16, rounded_adamw
from simpletuner.train.blocks import blocks_of
from simpletuner.train.buffer import build_buffers
from simpletuner.train.elementwise import CHUNKS, Backend, ElementwiseOptimizer
from simpletuner.train.optim import build_optimizers
from simpletuner.train.trained import prepare_denoiser
from simpletuner.train.update import Update

Options = Mapping[str, Any]

_PIXART_900M: Options = {
    "num_layers": 42, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128, "patch_size": 2,
    "interpolation_scale": 2, "norm_type": "ada_norm_single", "use_additional_conditions": False,
}  # fmt: skip
_FLUX: Options = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
_BF16: Options = {"base_model_precision": "bf16", "base_model_default_dtype": "bf16", "gradient_checkpointing": False}
_FULL: Options = _BF16 | {"model_family": "pixart_sigma", "model_type": "full", "optimizer": "adamw_bf16"}
_LORA: Options = _BF16 | {
    "model_family": "flux", "model_type": "lora", "lora_type": "lycoris", "optimizer": "torch-adamw",
    "data_backend_config": "pairs.json",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`shape`: the denoiser's configuration, where it is not nano's own. Limits and FLOPs are training.md's, §10.3."""

    name: str
    options: Options
    batch: int = 1
    size: int = 64
    """Side of the picture, and of the reference where the family edits one, in pixels."""
    channels: int = 4
    """Of a latent; the nano autoencoders have four."""
    shape: Options = field(default_factory=dict[str, Any])
    must_ms: float | None = None
    """Of one H100: said of another device too, but not judged there."""
    model_tflop: float | None = None


NANO_JOBS = (
    Job(name="nano PixArt full, B 1", options=_FULL | {"model_flavour": "nano"}),
    Job(name="nano PixArt full, B 2", options=_FULL | {"model_flavour": "nano"}, batch=2),
    Job(name="nano Flux LoRA, B 1", options=_LORA | {"model_flavour": "nano"}),
)
_PIXART_JOBS = tuple(
    Job(name=f"PixArt 900M full, B {batch}", options=_FULL, batch=batch, size=1024, shape=_PIXART_900M, must_ms=must,
        model_tflop=tflop)
    for batch, must, tflop in ((1, 110.0, 29.8), (2, 200.0, 59.7), (8, 780.0, 238.8))
)  # fmt: skip
FULL_JOBS = (
    *_PIXART_JOBS,
    Job(name="Kontext LoRA r 16, B 1", options=_LORA | {"model_flavour": "kontext"}, size=1024, channels=16,
        shape=_FLUX, must_ms=1000.0, model_tflop=384.0),
)  # fmt: skip


def jobs_for(device: torch.device) -> tuple[Job, ...]:
    return FULL_JOBS if device.type == "cuda" else NANO_JOBS


class Works:
    """Makes the step of any job; its files, configurations of models without weights, are in the scene's folder."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        write_datasets(scene)

    def config(self, job: Job, changes: Options | None = None) -> TrainConfig:
        options = dict(job.options) | dict(changes or {})
        if job.shape:
            options["pretrained_model_name_or_path"] = str(self._folder(job))
        return self._scene.config(train_batch_size=job.batch, **options)

    def build(self, job: Job, device: torch.device, changes: Options | None = None) -> Work:
        """With weights drawn at random on the device. `changes`: options of this one beside the job's."""
        config = self.config(job, changes)
        family = self._family(config)
        torch.manual_seed(0)
        with device:
            # Once more, for what was made of numpy.
            denoiser = family.load_denoiser().to(device)
        prepare_denoiser(denoiser, config, family.spec)
        buffers = build_buffers(denoiser)
        optimizers = build_optimizers(config.optimizer.optimizer, buffers, 0)
        update = Update(buffers, optimizers, config.optimizer, 1_000_000, None)
        return Work(family, denoiser, update, batch_of(job, family, denoiser, device), config)

    def flops(self, job: Job) -> int:
        """Of the model in one step, without recomputing and without optimizer, counted on the meta device.

        Of an adapter's run 2·linear + 3·attention: the base's weights get no gradient, and what the adapter itself
        multiplies is left out. training.md §10.3.
        """
        family, denoiser, batch = self.shapes(job)
        noisy = batch.latents_BCHW.requires_grad_()
        # Other kernels of attention compute a product again in the backward pass.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            predicted = family.predict(denoiser, noisy, torch.zeros(job.batch, device="meta").long(), batch)
            torch.autograd.backward(predicted.float().square().mean())
        return counter.get_total_flops()

    def shapes(self, job: Job) -> tuple[Family, nn.Module, Batch]:
        """On the meta device; every weight wants a gradient where all are trained, none where an adapter would be."""
        config = self.config(job)
        family = self._family(config)
        meta = torch.device("meta")
        with meta:
            denoiser = family.load_denoiser()
        denoiser.requires_grad_(config.model.model_type == "full").train()
        return family, denoiser, batch_of(job, family, denoiser, meta)

    def block_kinds(self, job: Job) -> list[str]:
        """Classes of the blocks that the denoiser repeats."""
        return sorted({type(block).__name__ for block in blocks_of(self.shapes(job)[1])})

    def _family(self, config: TrainConfig) -> Family:
        return build_family(config, load_spec(config.model.model_family), shapes_only=True)

    def _folder(self, job: Job) -> Path:
        """A repository whose denoiser has the job's shape; its other parts are nano's."""
        family = job.options["model_family"]
        folder = self._scene.root / f"{family}-full-size"
        if not folder.exists():
            nano = Path(load_spec(family).flavours["nano"].repository)
            shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("*.safetensors", "preview"))
            file = folder / "transformer/config.json"
            file.write_text(json.dumps({"_class_name": json.loads(file.read_text())["_class_name"], **job.shape}))
        return folder


def batch_of(
    job: Job, family: Family, denoiser: nn.Module, device: torch.device, size: tuple[int, int] | None = None
) -> Batch:
    """Random latents of pictures of `size`, (width, height) in pixels, with captions of full length."""
    width, height = size = size or (job.size, job.size)
    stride, count = family.spec.latent.stride, job.batch
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    latents = torch.randn(count, job.channels, height // stride, width // stride, generator=generator, device=device)
    text = family.collate_text([family.longest_caption(denoiser)] * count)
    edits = any(flavour.edits_references for flavour in family.spec.flavours.values())
    # Not zeros: a GPU multiplies those faster.
    filled = {
        name: torch.randn(some.shape, generator=generator, device=device).to(some.dtype) for name, some in text.items()
    }
    return Batch.of_nobody(latents, filled, size, (latents.clone(),) if edits else ())


class Work:
    """One step after another, on the same batch."""

    def __init__(self, family: Family, denoiser: nn.Module, update: Update, batch: Batch, config: TrainConfig) -> None:
        self.family = family
        self.denoiser = denoiser
        self.batch = batch
        self.config = config
        self.is_compiled = config.compute.dynamo_backend != "no"
        self._update = update
        self._autocast = autocast_dtype(config)
        self._step = 0

    def compile_optimizer(self, backend: Backend) -> None:
        self.is_compiled = True
        self._use_rounding(backend)

    def plain_optimizer(self) -> None:
        """`adamw_bf16` as plain operations, which is what it is on a CPU anyway."""
        if self.config.optimizer.optimizer == "adamw_bf16":
            self._use_rounding(None)

    def _use_rounding(self, backend: Backend | None) -> None:
        chunk, rule = CHUNKS[self.device.type], rounded_adamw(ADAMW_BF16)
        for index, buffer in enumerate(self._update.buffers):
            optimizer = ElementwiseOptimizer(buffer, rule, seed=0, chunk=chunk, backend=backend)
            self._update.optimizers[index] = optimizer

    def held_tensors(self) -> list[Tensor]:
        """What lies beside the weights from step to step: gradients, state of the optimizer."""
        return [*self._update.gradients, *self._update.state_tensors().values()]

    @property
    def device(self) -> torch.device:
        return self.batch.latents_BCHW.device

    @property
    def tokens(self) -> int:
        """That the blocks see of target and references, per sample."""
        patch = self.family.spec.latent.patch
        latents = (self.batch.latents_BCHW, *self.batch.references)
        return sum(some.shape[-2] * some.shape[-1] // patch**2 for some in latents)

    def step(self) -> None:
        """Forward, backward, clipping, optimizer; nothing is waited for."""
        self.loss(self.batch).backward()
        self._update.apply(self._step)
        self._step += 1

    def loss(self, batch: Batch) -> Tensor:
        noisy = batch.latents_BCHW
        t_B = torch.full((len(noisy),), 500, device=noisy.device)
        with torch.autocast(noisy.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            predicted = self.family.predict(self.denoiser, noisy, t_B, batch)
        return predicted.float().square().mean()
