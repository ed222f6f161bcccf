"""What other programs make of an adapter file: their key rules, and the gate that a saved file passes.

The rules are written down from the programs' documented behaviour, so that a file is checked without starting them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor

from simpletuner.adapters.file import (
    DOWN,
    LYCORIS_WEIGHTS,
    UP,
    AdapterFile,
    AdapterModule,
    read_adapter,
    split_key,
)
from simpletuner.adapters.names import FAMILIES, FamilyNames, Layer, Part, names_of, underscored
from simpletuner.adapters.product import Delta, Product, fused, relative_error
from simpletuner.errors import Problem, UserError

LORA = frozenset({"lora_A.weight", "lora_B.weight"})
DOWN_UP = frozenset({"lora_down.weight", "lora_up.weight"})
IA3 = frozenset({"weight", "on_input"})
TLORA = frozenset({"q_layer.weight", "p_layer.weight", "lambda_layer"})


@dataclass(frozen=True, slots=True)
class Matched:
    """`layers`: what names a module in the file → the denoiser's modules it changes. `unmatched`: keys left over."""

    layers: Mapping[str, Layer]
    unmatched: tuple[str, ...]


class Match(Protocol):
    def __call__(self, keys: Iterable[str], denoiser_modules: Collection[str], names: FamilyNames) -> Matched:
        """`denoiser_modules`: dotted names (the keys of a mapping to shapes will do)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    name: str
    match: Match
    reads_header: bool
    """It takes alpha from peft's configuration in the header, where there is no `.alpha` key."""


def match_diffusers(keys: Iterable[str], denoiser_modules: Collection[str], names: FamilyNames) -> Matched:
    """`transformer.<module>.lora_A.weight` and `lora_B.weight`; alpha in the header, for pipelines also as a key."""
    weights = LORA | {"alpha"} if names.has_pipeline_loader else LORA
    return _match(keys, lambda outer, module: _dotted(outer, module, denoiser_modules), weights)


def match_lycoris(keys: Iterable[str], denoiser_modules: Collection[str], names: FamilyNames) -> Matched:
    """`lycoris_<module with _>.<weight>`. Raises UserError `adapter_ambiguous_name`."""
    known = underscored(denoiser_modules)
    return _match(keys, lambda outer, module: _underscored(outer, module, known), LYCORIS_WEIGHTS)


def match_comfyui(keys: Iterable[str], denoiser_modules: Collection[str], names: FamilyNames) -> Matched:
    """`transformer.<module>`; for Flux also `lycoris_<module with _>` and kohya's names. Alphas are keys, no header."""
    known = underscored(denoiser_modules) if names.comfyui_underscored else {}
    fused = _fused(denoiser_modules, names)

    def find(outer: str, module: str) -> Layer | None:
        return (
            _dotted(outer, module, denoiser_modules)
            or _underscored(outer, module, known)
            or (fused.get(module) if outer == "lora_unet_" else None)
        )

    return _match(keys, find, (LYCORIS_WEIGHTS | LORA) - IA3 - TLORA)


def match_kohya(keys: Iterable[str], denoiser_modules: Collection[str], names: FamilyNames) -> Matched:
    """`lora_unet_<layer of the original code>.lora_down.weight`, `lora_up.weight`, `alpha`."""
    fused = _fused(denoiser_modules, names)
    return _match(keys, lambda outer, module: fused.get(module) if outer == "lora_unet_" else None, DOWN_UP | {"alpha"})


READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(name="diffusers", match=match_diffusers, reads_header=True),
        Reader(name="lycoris", match=match_lycoris, reads_header=False),
        Reader(name="comfyui", match=match_comfyui, reads_header=False),
        Reader(name="kohya", match=match_kohya, reads_header=False),
    )
}


def _match(keys: Iterable[str], find: Callable[[str, str], Layer | None], weights: frozenset[str]) -> Matched:
    layers: dict[str, Layer] = {}
    unmatched: list[str] = []
    for key in keys:
        split = split_key(key)
        if split is None:
            unmatched.append(key)
            continue
        outer, module, weight = split
        layer = find(outer, module) if weight in weights else None
        if layer is None:
            unmatched.append(key)
        else:
            layers[outer + module] = layer
    return Matched(layers, tuple(unmatched))


def _dotted(outer: str, module: str, known: Collection[str]) -> Layer | None:
    return Layer(module, (Part(module),)) if outer == "transformer." and module in known else None


def _underscored(outer: str, module: str, known: Mapping[str, tuple[str, ...]]) -> Layer | None:
    meant = known.get(module)
    if outer != "lycoris_" or meant is None:
        return None
    name, *others = meant
    if others:
        raise UserError("adapter_ambiguous_name", f"{outer}{module} may stand for {' or '.join(meant)}.")
    return Layer(name, (Part(name),))


def _fused(modules: Collection[str], names: FamilyNames) -> dict[str, Layer]:
    return {
        name: layer for name, layer in names.all_layers().items() if any(part.module in modules for part in layer.parts)
    }


def family_fits(adapter: AdapterFile) -> tuple[str, ...]:
    """Families all of whose names the file's modules go by."""
    return tuple(family for family, names in FAMILIES.items() if not layers_of(adapter, names).unmatched)


def layers_of(adapter: AdapterFile, names: FamilyNames) -> Matched:
    """Any spelling → layers, by the names that a denoiser of the family may have; `unmatched` holds whole units."""
    modules = names.all_modules()
    known, fused = underscored(modules), _fused(modules, names)
    layers: dict[str, Layer] = {}
    unmatched: list[str] = []
    for module in adapter.modules:
        outer = module.unit.removesuffix(module.module)
        layer = (
            _dotted(outer.removeprefix("base_model.model.") or "transformer.", module.module, modules)
            or _underscored(outer, module.module, known)
            or (fused.get(module.module) if outer == "lora_unet_" else None)
        )
        if layer is None:
            unmatched.append(module.unit)
        else:
            layers[module.unit] = layer
    return Matched(layers, tuple(unmatched))


def readers_of(adapter: AdapterFile, keys: Iterable[str], family: str) -> tuple[str, ...]:
    """Readers that take every key of the file and give its alphas their meaning."""
    names = names_of(family)
    modules, keys = names.all_modules(), tuple(keys)
    return tuple(
        name
        for name, reader in READERS.items()
        if not reader.match(keys, modules, names).unmatched
        and all(reader.reads_header or _means_the_same(module) for module in adapter.modules)
    )


def _means_the_same(module: AdapterModule) -> bool:
    return not module.is_linear_lora or module.scale(header=True) == module.scale(header=False)


def check_file(
    path: Path,
    reader: str,
    live: Mapping[str, Callable[[], Delta]],
    tolerance: float = 1e-3,
    *,
    family: str | None = None,
    base: Mapping[str, Callable[[], Tensor]] | None = None,
) -> list[Problem]:
    """The export gate: re-read a saved file by one reader's rules and compare it with what was trained.

    `live`: dotted name of each adapted module → its ΔW, a tensor or, far faster, a `Product`. `tolerance`: on the
    relative Frobenius norm ‖file − live‖ ÷ ‖live‖. `family`: where the header is silent. `base`: the base weights, for
    algorithms whose ΔW depends on them. Answers every problem, code `export_mismatch`, naming key or module;
    none: it passed.
    """
    chosen = READERS[reader]
    try:
        adapter = read_adapter(path, strict=False)
        names = names_of(family or adapter.family or "")
        matched = chosen.match(keys_of(path), live.keys(), names)
    except UserError as error:
        return [_mismatch(reader, error.message)]
    problems = [_mismatch(reader, f"{key} names no adapted module.") for key in matched.unmatched]
    problems += [
        _mismatch(reader, f"{key} lacks its other half.") for key in adapter.unknown if key not in matched.unmatched
    ]
    covered: set[str] = set()
    for module in adapter.modules:
        layer = matched.layers.get(module.unit)
        if layer is None:
            continue
        covered |= {part.module for part in layer.parts}
        problems += _compare(module, layer, chosen, live, tolerance, base or {})
    problems += [_mismatch(reader, f"{name} has no key in the file.") for name in live if name not in covered]
    return problems


def keys_of(path: Path) -> tuple[str, ...]:
    with safe_open(path, framework="pt") as file:
        return tuple(file.keys())


def _compare(
    module: AdapterModule,
    layer: Layer,
    reader: Reader,
    live: Mapping[str, Callable[[], Delta]],
    tolerance: float,
    base: Mapping[str, Callable[[], Tensor]],
) -> list[Problem]:
    only = layer.parts[0].module if len(layer.parts) == 1 else ""
    try:
        found: Delta = (
            Product(module.weights[UP], module.weights[DOWN], module.scale(header=reader.reads_header))
            if module.is_linear_lora
            else module.delta(base[only]() if module.needs_base and only in base else None)
        )
    except UserError as error:
        return [_mismatch(reader.name, error.message)]
    wanted = fused(layer, {part.module: live[part.module]() for part in layer.parts if part.module in live})
    if tuple(found.shape) != tuple(wanted.shape):
        shapes = f"{tuple(found.shape)} in the file, {tuple(wanted.shape)} in the model"
        return [_mismatch(reader.name, f"{module.unit} has another shape: {shapes}.")]
    off = relative_error(found, wanted)
    if off <= tolerance:
        return []
    return [_mismatch(reader.name, f"{module.unit} is off by {off:.2e} of its norm, more than {tolerance:g}.")]


def _mismatch(reader: str, message: str) -> Problem:
    return Problem(
        code="export_mismatch",
        message=f"Read as {reader} does: {message}",
        hint="The file was not put in place; the previous one, if any, is as it was.",
    )
