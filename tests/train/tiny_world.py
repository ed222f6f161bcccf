"""Real classes, tiny and random: a PixArt diffusers folder, a dataset, and runs of the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from simpletuner.config.directories import Directories
from simpletuner.config.resolve import Resolution, freeze, resolve
from simpletuner.config.sources import layer_from_mapping
from simpletuner.config.train_config import option_fields
from simpletuner.errors import ExitCode
from simpletuner.events import read_journal
from simpletuner.job import Command, CommandName, JobDir, JobSpec
from simpletuner.train.__main__ import main
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader
from simpletuner.train.run import execute

SIZES = ((64, 64), (96, 64), (64, 96))
COLOURS = ("red", "green", "blue", "grey", "pink", "teal", "gold", "plum")
OPTIONS: dict[str, Any] = {
    "model_family": "pixart_sigma",
    "model_flavour": "nano",
    "data_backend_config": "data.json",
    "output_dir": "out",
    "cache_dir": "cache",
    "cache_dir_text": "cache/text",
    "base_model_default_dtype": "fp32",
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "optimizer": "torch-adamw",
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "max_grad_norm": 1.0,
    "train_batch_size": 2,
    "max_train_steps": 4,
    "checkpoint_step_interval": 0,
    "validation_disable": True,
    "seed": 11,
}


def build_model(folder: Path, *, patch_size: int = 2) -> Path:
    """A larger `patch_size` is for large pictures: the time of attention falls with its fourth power."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        mid_block_add_attention=False,
    )
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    letters += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=patch_size,
        caption_channels=32,
        use_additional_conditions=False,
    )
    # The last layer of a fresh network is nothing: give it weights, so that every parameter has a gradient.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    PixArtSigmaPipeline(tokenizer, T5EncoderModel(config), vae, transformer, scheduler).save_pretrained(folder)
    return folder


def paint_pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    folder.mkdir(parents=True)
    for index, colour in enumerate(COLOURS):
        for width, height in sizes:
            generator = np.random.default_rng(index)
            coarse = Image.fromarray(generator.integers(0, 255, (3, 3, 3), np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{colour}_{width}x{height}.png")
    return folder


Hook = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of the micro-step from 1, its loss → the loss that is propagated."""


@contextmanager
def at_each_backward(hook: Hook) -> Generator[None]:
    """`hook` stands where the arithmetic is: torch's own backward, not our code."""
    plain, count = torch.Tensor.backward, 0

    def backward(self: torch.Tensor, *args: Any, **keys: Any) -> None:
        nonlocal count
        if isinstance(self, FakeTensor):
            # The rehearsal that predicts memory, which computes nothing.
            plain(self, *args, **keys)
            return
        count += 1
        plain(hook(count, self), *args, **keys)

    torch.Tensor.backward = backward
    try:
        yield
    finally:
        torch.Tensor.backward = plain


@dataclass(slots=True)
class Ran:
    code: ExitCode
    events: list[dict[str, Any]]
    output: Path
    job: JobDir

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def notices(self, code: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["data"].get("code") == code]

    def metrics(self) -> list[dict[str, Any]]:
        """Without what a clock says."""
        rows = [json.loads(line) for line in (self.output / "training_metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics()]

    def weights(self, step: int | None = None, part: str = "transformer") -> dict[str, torch.Tensor]:
        step = step if step is not None else self.metrics()[-1]["step"]
        return load_file(self.output / f"checkpoint-{step}" / part / "diffusion_pytorch_model.safetensors")


class TinyWorld:
    def __init__(self, root: Path, model: Path, *, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
        self.root = root
        self.model = model
        self.pictures = paint_pictures(root / "pictures", sizes)
        self.entries: list[dict[str, Any]] = [{"id": "tiny", "instance_data_dir": "pictures", "resolution": 64}]
        self._num_jobs = 0

    def resolve(self, **options: Any) -> Resolution:
        (self.root / "data.json").write_text(json.dumps(self.entries))
        values = OPTIONS | {"pretrained_model_name_or_path": str(self.model)} | options
        layer = layer_from_mapping(values, name="request", known=option_fields())
        return resolve([layer], Directories(self.root, self.root), for_start=True)

    def job(self, **options: Any) -> JobDir:
        self._num_jobs += 1
        config, provenance, datasets = freeze(self.resolve(**options))
        name = f"job{self._num_jobs}"
        spec = JobSpec(
            job_id=name,
            workspace=str(self.root),
            config_dir=str(self.root),
            output_dir=config["output_dir"],
            num_processes=config["num_processes"],
        )
        return JobDir.create(self.root / "jobs" / name, spec, config=config, provenance=provenance, datasets=datasets)

    def run(self, *commands: CommandName, **options: Any) -> Ran:
        """In this process. `commands` are there before the trainer looks for the first time."""
        job = self.job(**options)
        for command in commands:
            job.send(Command(command=command, request_id=command.value))
        journal = job.open_journal()
        try:
            code = execute(job, Reporter(journal, job.artifacts), RequestReader(job))
        finally:
            journal.close()
        return self.ran(job, code)

    def run_until(self, step: int, command: CommandName, **options: Any) -> Ran:
        """In this process; `command` comes while the `step`-th step of this start is computed."""
        job = self.job(**options)
        first_micro = (step - 1) * options.get("gradient_accumulation_steps", 1) + 1

        def ask(count: int, loss: torch.Tensor) -> torch.Tensor:
            if count == first_micro:
                job.send(Command(command=command, request_id=command.value))
            return loss

        journal = job.open_journal()
        try:
            with at_each_backward(ask):
                code = execute(job, Reporter(journal, job.artifacts), RequestReader(job))
        finally:
            journal.close()
        return self.ran(job, code)

    def main(self, job: JobDir, hook: Hook | None = None) -> Ran:
        """`python -m simpletuner.train` with its edge and its signal handlers, but in this process."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with at_each_backward(hook or (lambda _, loss: loss)):
                code = main(str(job.root))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.ran(job, code)

    def spawn(self, job: JobDir, *, before: str = "", threads: int = 1) -> Ran:
        """`python -m simpletuner.train` as a process of its own; `before` is code that runs first in it."""
        code = (
            f"{before}\nimport runpy, sys\nrunpy.run_module('simpletuner.train', run_name='__main__', alter_sys=True)"
        )
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-c", code, str(job.root)]
        ended = subprocess.run(words, check=False, env=environment, capture_output=True, text=True)
        found = self.ran(job, ExitCode.DONE)
        found.code = ended.returncode
        return found

    def ran(self, job: JobDir, code: ExitCode) -> Ran:
        events = [json.loads(line) for _, line in read_journal(job.journal_path)]
        return Ran(code, events, Path(job.read_spec().output_dir), job)
