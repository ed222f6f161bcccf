"""What a run trains, as checkpoints and exports see it: the whole denoiser, or an adapter in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.base import Family
from simpletuner.families.spec import FamilySpec
from simpletuner.train.blocks import choose_run
from simpletuner.train.host_copies import HostCopies
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

    def stage(self, update: Update, copies: HostCopies) -> Callable[[Path], None] | None:
        """Copy what `save` would write; what is returned writes that, whatever has become of the weights by then.

        None where only `save` can.
        """
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
        self._kind: Any = type(denoiser)

    def save(self, folder: Path, update: Update) -> None:
        average = None if update.ema is None else dict(update.ema.named_tensors())
        with update.averaged():
            self._write(self.denoiser.state_dict(), average, folder)

    def stage(self, update: Update, copies: HostCopies) -> Callable[[Path], None] | None:
        with update.averaged():
            flat = [copies.keep(f"saved.{index}", buffer.weights) for index, buffer in enumerate(update.buffers)]
        weights = {name: view for buffer, copy in zip(update.buffers, flat, strict=True)
                   for name, view in buffer.named_views(copy)}  # fmt: skip
        untrained = {name: value for name, value in self.denoiser.state_dict().items() if name not in weights}
        weights |= {name: copies.keep(name, value) for name, value in untrained.items()}
        average = None
        if update.ema is not None:
            shadows = [copies.keep(f"ema.{index}", shadow) for index, shadow in enumerate(update.ema.shadows)]
            average = dict(update.ema.named_tensors(shadows))
        return partial(self._write, weights, average)

    def _write(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor] | None, folder: Path) -> None:
        twin = self._twin(weights)
        twin.save_pretrained(folder / DENOISER)
        if average is not None:
            place = folder / f"{DENOISER}_ema"
            place.mkdir()
            twin.save_config(place)
            tensors = {name: value.contiguous() for name, value in {**weights, **average}.items()}
            save_file(tensors, place / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def _twin(self, weights: Mapping[str, Tensor]) -> Any:
        """A denoiser that has these tensors."""
        assert isinstance(self.denoiser, ModelMixin)
        with torch.device("meta"):
            twin = self._kind.from_config(self.denoiser.config)
        twin.load_state_dict(weights, assign=True)
        return twin

    def _whole(self) -> nn.Module:
        """With the weights of the moment."""
        return self.denoiser

    def _saved_weights(self, folder: Path) -> Mapping[str, Tensor]:
        return self._family.load_denoiser(folder / DENOISER).state_dict()

    def load(self, folder: Path) -> None:
        saved = self._saved_weights(folder)
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
            self._family.export_pipeline(beside, self._whole())
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
