"""An adapter as what a run trains: its checkpoints, its files for other programs, and their gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from simpletuner.adapters.convert import convert
from simpletuner.adapters.file import Kind, read_adapter
from simpletuner.adapters.readers import check_file
from simpletuner.errors import UserError
from simpletuner.train.adapters import WEIGHTS, Adapter
from simpletuner.train.host_copies import HostCopies
from simpletuner.train.trained import TOLERANCE, mismatch
from simpletuner.train.update import Update


class AdapterWeights:
    """An adapter; the denoiser's own weights are frozen and never written."""

    def __init__(self, denoiser: nn.Module, adapter: Adapter, family: str) -> None:
        self.denoiser = denoiser
        self._family = family
        self.adapter = adapter
        facts = adapter.facts()
        self.adapter_name: str | None = f"{facts['library']} {facts['algo']} on {facts['modules']} modules"

    def save(self, folder: Path, update: Update) -> None:
        self.stage(update, HostCopies())(folder)

    def stage(self, update: Update, copies: HostCopies) -> Callable[[Path], None]:
        with update.averaged():
            own = {key: copies.keep(f"adapter.{key}", value) for key, value in self.adapter.tensors().items()}
        average = None
        if update.ema is not None:
            with update.ema.in_place():
                average = {key: copies.keep(f"average.{key}", value) for key, value in self.adapter.tensors().items()}

        def write(folder: Path) -> None:
            self.adapter.save(folder, own)
            if average is not None:
                self.adapter.save(folder / "ema", average)

        return write

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
                raise mismatch(f"{key} is not in the saved adapter as it was trained.")
        if any(module.needs_base for module in read_adapter(path).modules):
            return  # its ΔW is a function of weights that a quantised base no longer has: equal tensors must do
        problems = check_file(path, self.adapter.reader, self.adapter.deltas(), TOLERANCE, family=self._family)
        if problems:
            raise mismatch(problems[0].message)


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
