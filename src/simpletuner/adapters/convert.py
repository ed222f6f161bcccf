"""Adapter files from one program's spelling into another's, exactly: ΔW stays what it was, alpha included."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.adapters.file import DOWN, PEFT_HEADER, UP, AdapterFile, AdapterModule
from simpletuner.adapters.names import FamilyNames, Layer, Part, names_of
from simpletuner.adapters.product import Delta, Product, swap_halves
from simpletuner.adapters.readers import READERS, check_file, keys_of, layers_of
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import fsync_folder

Tensors = dict[str, Tensor]
Header = dict[str, str]

STALE = (
    *(PEFT_HEADER, "lycoris_config", "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args"),
    *("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"),
)
"""Header keys that describe the weights as the source spelled them, and hashes of its bytes."""


@dataclass(frozen=True, slots=True)
class LoraPart:
    """ΔW of one denoiser module = scale · up @ down; down (r, in), up (out, r)."""

    module: str
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def product(self) -> Product:
        return Product(self.up, self.down, self.scale)


def convert(source: AdapterFile, to: str, target: Path, family: str) -> None:
    """Write `source` as `to` (`diffusers`, `comfyui`, `kohya`) reads it; the gate is passed before the file appears.

    Raises UserError `adapter_other_family`, `adapter_unknown_keys`, `export_not_expressible`, `export_mismatch`,
    `storage`.
    """
    names = names_of(family)
    if source.family not in (None, family):
        raise UserError(
            "adapter_other_family", f"{source.path.name} is an adapter for {source.family}, not for {family}."
        )
    layers = _layers(source, names)
    others = [module for module in source.modules if not module.is_linear_lora]
    if others and to != "comfyui":
        raise UserError(
            "export_not_expressible",
            f"{to} cannot express {others[0].algorithm} exactly ({others[0].unit}).",
            hint="Only lora and locon can be written as a plain LoRA; ComfyUI and lycoris read the others.",
        )
    parts = [part for module in source.modules if module.is_linear_lora for part in split(module, layers[module.unit])]
    tensors, header = WRITERS[to](parts, names)
    for module in others:
        tensors |= _as_comfyui(module, layers[module.unit], names)
    kept = {key: value for key, value in source.metadata.items() if key not in STALE}
    header = {"format": "pt", "modelspec.architecture": names.architecture, **kept, **header}
    header["simpletuner_family"] = family
    live: dict[str, Callable[[], Delta]] = {part.module: part.product for part in parts}
    live |= {layers[module.unit].parts[0].module: module.delta for module in others}
    is_known = not any(module.needs_base for module in others)
    _write(target, tensors, header, lambda staged: _gate(staged, to, live if is_known else None, names))


def split(module: AdapterModule, layer: Layer) -> list[LoraPart]:
    """The parts of a fused layer, in diffusers' order of rows.

    Where `up` is block-diagonal each part gets its own block; a block that is zero with its rows of `down` was only
    padding. Otherwise every part shares `down`.
    """
    down, up, scale = module.weights[DOWN], module.weights[UP], module.scale()
    if len(layer.parts) == 1:
        return [LoraPart(layer.parts[0].module, down, swap_halves(up) if layer.swapped else up, scale)]
    width, rank, count = down.shape[1], down.shape[0], len(layer.parts)
    rows = [part.rows * width for part in layer.parts]
    if sum(rows) != up.shape[0]:
        raise UserError("export_not_expressible", f"{module.unit} has {up.shape[0]} rows, and its parts {sum(rows)}.")
    uppers = list(up.split(rows))
    each = rank // count
    own = [slice(k * each, (k + 1) * each) for k in range(count)]
    is_blocked = rank % count == 0 and all(
        torch.count_nonzero(upper) == torch.count_nonzero(upper[:, own[k]]) for k, upper in enumerate(uppers)
    )
    if not is_blocked:
        return [LoraPart(p.module, down.clone(), upper, scale) for p, upper in zip(layer.parts, uppers, strict=True)]
    blocks = [LoraPart(part.module, down[own[k]], uppers[k][:, own[k]], scale) for k, part in enumerate(layer.parts)]
    return [block for block in blocks if block.down.count_nonzero() or block.up.count_nonzero()]


def fuse(layer: Layer, parts: Mapping[str, LoraPart]) -> tuple[Tensor, Tensor, float]:
    """(down, up, alpha) of a fused layer: `down` stacked, `up` block-diagonal, missing parts and ranks zero.

    Different scales are folded into `up` in fp32, so that one alpha holds for all of them.
    """
    if len(layer.parts) == 1:
        only = parts[layer.parts[0].module]
        return only.down, swap_halves(only.up) if layer.swapped else only.up, only.alpha
    some = next(iter(parts.values()))
    rank, width = max(part.rank for part in parts.values()), some.down.shape[1]
    scale = max((part.scale for part in parts.values()), key=abs)
    is_uniform = all(part.scale == scale for part in parts.values())
    dtype = some.up.dtype if is_uniform else torch.float32
    down = torch.zeros(rank * len(layer.parts), width, dtype=some.down.dtype)
    up = torch.zeros(sum(part.rows for part in layer.parts) * width, down.shape[0], dtype=dtype)
    row = 0
    for k, place in enumerate(layer.parts):
        part = parts.get(place.module)
        if part is not None:
            _check_shape(part, place, width)
            down[k * rank : k * rank + part.rank] = part.down
            block = part.up if is_uniform else part.up.float() * (part.scale / scale)
            up[row : row + part.up.shape[0], k * rank : k * rank + part.rank] = block
        row += place.rows * width
    return down, up, scale * down.shape[0]


def _check_shape(part: LoraPart, place: Part, width: int) -> None:
    if part.down.shape[1] != width or part.up.shape[0] != place.rows * width:
        raise UserError(
            "export_not_expressible",
            f"{part.module} is {part.up.shape[0]} × {part.down.shape[1]}; in the fused layer it must be"
            f" {place.rows * width} × {width}.",
        )


def _layers(source: AdapterFile, names: FamilyNames) -> Mapping[str, Layer]:
    matched = layers_of(source, names)
    unknown = (*source.unknown, *matched.unmatched)
    if unknown:
        raise UserError(
            "adapter_unknown_keys",
            f"{names.family} has no modules of these names: {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more." if len(unknown) > 3 else "."),
            hint="Is it an adapter for another family?",
            exit_code=ExitCode.DATA,
        )
    return matched.layers


def _diffusers(parts: Sequence[LoraPart], names: FamilyNames) -> tuple[Tensors, Header]:
    """lora_A, lora_B; alphas in the header, as diffusers' own `save_lora_weights` writes them."""
    tensors = _lora_keys(parts)
    if not parts:
        return tensors, {}
    rank = Counter(part.rank for part in parts).most_common(1)[0][0]
    alpha = Counter(part.alpha for part in parts).most_common(1)[0][0]
    configuration = LoraConfig(
        r=rank,
        # peft annotates int and takes any number.
        lora_alpha=_whole(alpha),  # pyright: ignore[reportArgumentType]
        target_modules=[part.module for part in parts],
        # ^: the whole name, where peft would also take the end of one.
        rank_pattern={f"^{part.module}": part.rank for part in parts if part.rank != rank},
        alpha_pattern={f"^{part.module}": _whole(part.alpha) for part in parts if part.alpha != alpha},
    ).to_dict()
    packed = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in configuration.items()
    }
    return tensors, {PEFT_HEADER: json.dumps(packed, indent=2, sort_keys=True)}


def _comfyui(parts: Sequence[LoraPart], names: FamilyNames) -> tuple[Tensors, Header]:
    """The same keys, with every alpha as a key: ComfyUI reads no header."""
    alphas = {f"transformer.{part.module}.alpha": torch.tensor(part.alpha) for part in parts}
    return _lora_keys(parts) | alphas, {}


def _kohya(parts: Sequence[LoraPart], names: FamilyNames) -> tuple[Tensors, Header]:
    if not names.layers:
        raise UserError("export_not_expressible", f"kohya has no names for the modules of {names.family}.")
    by_module = {part.module: part for part in parts}
    tensors: Tensors = {}
    ranks: list[int] = []
    alphas: list[float] = []
    for name, layer in names.all_layers().items():
        present = {part.module: by_module[part.module] for part in layer.parts if part.module in by_module}
        if not present:
            continue
        down, up, alpha = fuse(layer, present)
        tensors |= {
            f"lora_unet_{name}.{DOWN}": down,
            f"lora_unet_{name}.{UP}": up,
            f"lora_unet_{name}.alpha": torch.tensor(alpha),
        }
        ranks.append(down.shape[0])
        alphas.append(alpha)
    header = {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(_whole(max(alphas)))}
    return tensors, {**header, "ss_network_module": "networks.lora_flux"}


WRITERS: Mapping[str, Callable[[Sequence[LoraPart], FamilyNames], tuple[Tensors, Header]]] = {
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "kohya": _kohya,
}


def _lora_keys(parts: Sequence[LoraPart]) -> Tensors:
    tensors: Tensors = {}
    for part in parts:
        tensors[f"transformer.{part.module}.lora_A.weight"] = part.down
        tensors[f"transformer.{part.module}.lora_B.weight"] = part.up
    return tensors


def _as_comfyui(module: AdapterModule, layer: Layer, names: FamilyNames) -> Tensors:
    name = layer.parts[0].module
    prefix = f"lycoris_{name.replace('.', '_')}" if names.comfyui_underscored else f"transformer.{name}"
    return {f"{prefix}.{weight}": value for weight, value in module.weights.items()}


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _gate(staged: Path, to: str, live: Mapping[str, Callable[[], Delta]] | None, names: FamilyNames) -> None:
    """`live` None: ΔW depends on a base weight that is not here; the weights were copied, and the keys are checked."""
    if live is None:
        unmatched = READERS[to].match(keys_of(staged), names.all_modules(), names).unmatched
        if unmatched:
            raise UserError("export_not_expressible", f"{to} has no place for {unmatched[0]}.")
        return
    problems = check_file(staged, to, live, family=names.family)
    if problems:
        first = problems[0]
        raise UserError(first.code, first.message, hint=first.hint, exit_code=ExitCode.STORAGE, problems=problems)


def _write(target: Path, tensors: Tensors, header: Header, check: Callable[[Path], None]) -> None:
    """Beside its place, checked, synced, renamed: a reader sees the old file or the new one."""
    staged = target.with_name(f".{target.name}.tmp")
    try:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, staged, metadata=header)
        check(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(target)
        fsync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError("storage", f"{target} cannot be written: {error}", exit_code=ExitCode.STORAGE) from error
    finally:
        staged.unlink(missing_ok=True)
