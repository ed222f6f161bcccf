"""What a run trains, as checkpoints and exports see it: the whole denoiser, or an adapter in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.base import Family
from simpletuner.families.spec import FamilySpec
from simpletuner.train.blocks import choose_run
from simpletuner.train.update import Update
from simpletuner.train.validation import weights_to_draw

if TYPE_CHECKING:
    from simpletuner.train.adapters import Adapter

DENOISER = "transformer"
TOLERANCE = 1e-3
"""Relative difference that a re-read export may show."""


class Trained(Protocol):
    """Weights that training changes."""

    denoiser: nn.Module
    adapter_name: str | None
    """Library, algorithm and number of modules, of an adapter."""

    def save(self, folder: Path, update: Update) -> None:
        """Into a checkpoint's folder, the moving average too."""
        ...

    def load(self, folder: Path) -> None:
        """From a checkpoint's folder."""
        ...

    def export(self, output_dir: Path, update: Update) -> Path:
        """Write what others open, re-read it, put it in its place. Raises UserError `export_mismatch`."""
        ...

    def reread(self, exported: Path, device: torch.device) -> nn.Module:
        """A denoiser with the weights that the exported files hold."""
        ...


class FullWeights:
    """Every weight of the denoiser. `probe`: one forward pass on fixed input."""

    adapter_name: str | None = None

    def __init__(self, family: Family, denoiser: nn.Module, probe: Callable[[nn.Module], Tensor]) -> None:
        self.denoiser = denoiser
        self._family = family
        self._probe = probe

    def save(self, folder: Path, update: Update) -> None:
        assert isinstance(self.denoiser, ModelMixin)
        with update.averaged():
            self.denoiser.save_pretrained(folder / DENOISER)
        if update.ema is None:
            return
        tensors = {name: value.detach().clone() for name, value in self.denoiser.state_dict().items()}
        tensors |= {name: value.contiguous() for name, value in update.ema.named_tensors()}
        average = folder / f"{DENOISER}_ema"
        average.mkdir()
        self.denoiser.save_config(average)
        save_file(tensors, average / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        saved = self._family.load_denoiser(folder / DENOISER).state_dict()
        with torch.no_grad():
            for name, value in self.denoiser.state_dict().items():
                value.copy_(saved[name])

    def export(self, output_dir: Path, update: Update) -> Path:
        """`<output_dir>/pipeline`, averaged weights if there are any; compared with what was trained."""
        place, beside = output_dir / "pipeline", output_dir / ".pipeline-tmp"
        shutil.rmtree(beside, ignore_errors=True)
        weights = weights_to_draw(update, "ema_only")[0]
        self.denoiser.eval()
        with weights.hold(), torch.inference_mode():
            self._family.export_pipeline(beside, self.denoiser)
            wanted = self._probe(self.denoiser).float()
        reread = self._family.load_denoiser(beside / DENOISER).to(wanted.device).eval()
        with torch.inference_mode():
            found = self._probe(reread).float()
        difference = ((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
        if not difference <= TOLERANCE:
            raise mismatch(f"The saved model computes something else than the trained one ({difference:.2e}).")
        old = output_dir / ".pipeline-old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        beside.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        return place

    def reread(self, exported: Path, device: torch.device) -> nn.Module:
        return self._family.load_denoiser(exported / DENOISER).to(device).eval()


def prepare_denoiser(
    denoiser: nn.Module,
    config: TrainConfig,
    spec: FamilySpec,
    kernels: Sequence[str] | None = None,
    *,
    compiles: bool = True,
) -> Adapter | None:
    """Choose what is trained, an adapter or every weight, and how its blocks run; `kernels` as of `choose_run`.

    A full tune imports no library of adapters: they are a tenth of a trainer's start.
    """
    adapter = None
    if config.model.model_type == "lora":
        from simpletuner.train.adapters import attach_adapter

        adapter = attach_adapter(denoiser, config, spec)
    else:
        denoiser.requires_grad_(True)
    denoiser.train()
    choose_run(denoiser, config.compute, kernels, compiles=compiles)
    return adapter


def mismatch(message: str) -> UserError:
    """What was written is not what was trained."""
    hint = "The checkpoint is whole; the previous export was left in its place."
    return UserError("export_mismatch", message, hint=hint, exit_code=ExitCode.STORAGE)
