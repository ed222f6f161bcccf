"""What a run trains, as checkpoints and exports see it: the whole denoiser, or an adapter in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters.convert import convert
from simpletuner.adapters.file import Kind, read_adapter
from simpletuner.adapters.readers import check_file
from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.base import Family
from simpletuner.families.spec import FamilySpec
from simpletuner.train.adapters import WEIGHTS, Adapter, attach_adapter
from simpletuner.train.update import Update
from simpletuner.train.validation import weights_to_draw

DENOISER = "transformer"
_TOLERANCE = 1e-3
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
        if not difference <= _TOLERANCE:
            raise _mismatch(f"The saved model computes something else than the trained one ({difference:.2e}).")
        old = output_dir / ".pipeline-old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        beside.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        return place

    def reread(self, exported: Path, device: torch.device) -> nn.Module:
        return self._family.load_denoiser(exported / DENOISER).to(device).eval()


class AdapterWeights:
    """An adapter; the denoiser's own weights are frozen and never written."""

    def __init__(self, denoiser: nn.Module, adapter: Adapter, family: str) -> None:
        self.denoiser = denoiser
        self._family = family
        self.adapter = adapter
        facts = adapter.facts()
        self.adapter_name: str | None = f"{facts['library']} {facts['algo']} on {facts['modules']} modules"

    def save(self, folder: Path, update: Update) -> None:
        with update.averaged():
            self.adapter.save(folder)
        if update.ema is not None:
            with update.ema.in_place():
                self.adapter.save(folder / "ema")

    def load(self, folder: Path) -> None:
        self.adapter.load(load_file(folder / WEIGHTS))

    def export(self, output_dir: Path, update: Update) -> Path:
        """The adapter file in `<output_dir>`, its average in `ema/`; a file that does not pass its gate stays away."""
        beside = output_dir / ".adapter-tmp"
        shutil.rmtree(beside, ignore_errors=True)
        self.save(beside, update)
        with update.averaged():
            self._check(beside / WEIGHTS)
        write_for_others(beside / WEIGHTS, beside / "export", self._family)
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                target = output_dir / path.relative_to(beside)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        shutil.rmtree(beside)
        return output_dir / WEIGHTS

    def reread(self, exported: Path, device: torch.device) -> nn.Module:
        """The base is too large to be there twice: the file's tensors are put into the adapter that is there."""
        self.adapter.load(load_file(exported))
        return self.denoiser.eval()

    def _check(self, path: Path) -> None:
        """The export gate: every tensor as it was trained, and by its reader's own rules the same ΔW."""
        own, found = self.adapter.tensors(), load_file(path)
        for key in own.keys() | found.keys():
            if key not in found or key not in own or not torch.equal(own[key].cpu(), found[key]):
                raise _mismatch(f"{key} is not in the saved adapter as it was trained.")
        if any(module.needs_base for module in read_adapter(path).modules):
            return  # its ΔW is a function of weights that a quantised base no longer has: equal tensors must do
        problems = check_file(path, self.adapter.reader, self.adapter.deltas(), _TOLERANCE, family=self._family)
        if problems:
            raise _mismatch(problems[0].message)


def prepare_denoiser(denoiser: nn.Module, config: TrainConfig, spec: FamilySpec) -> Adapter | None:
    """Choose what is trained, an adapter or every weight, and how activations are kept."""
    adapter = None
    if config.model.model_type == "lora":
        adapter = attach_adapter(denoiser, config, spec)
    else:
        denoiser.requires_grad_(True)
    denoiser.train()
    if config.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    return adapter


def write_for_others(path: Path, folder: Path, family: str) -> None:
    """`adapter_comfyui.safetensors`, and what plain LoRA can express as `adapter_diffusers.safetensors`."""
    folder.mkdir()
    source = read_adapter(path, family=family)
    is_plain = all(module.is_linear_lora for module in source.modules)
    for reader in ("comfyui", "diffusers"):
        if reader == "comfyui" or (is_plain and source.kind is Kind.LYCORIS):
            convert(source, reader, folder / f"adapter_{reader}.safetensors", family)


def load_adapter_file(adapter: Adapter, path: str) -> None:
    """Start from a file's weights (`init_lora`). Raises UserError where it cannot be read or does not fit."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "adapter_unreadable", f"The adapter file {path} cannot be read: {error}.", pointer="/--init_lora"
        ) from error
    adapter.load(tensors)


def _mismatch(message: str) -> UserError:
    hint = "The checkpoint is whole; the previous export was left in its place."
    return UserError("export_mismatch", message, hint=hint, exit_code=ExitCode.STORAGE)
