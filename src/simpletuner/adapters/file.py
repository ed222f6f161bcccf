"""One adapter file as it lies on disk: which modules it changes, by which algorithm, and by how much.

Shapes: a module's ΔW is (out, in); of a convolution (out, in·kh·kw).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from lycoris.modules import MODULE_LIST, get_module, make_module
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simpletuner.adapters.product import Product
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.adapter_header import family_of_header

PEFT_HEADER = "lora_adapter_metadata"
"""Where diffusers writes the peft configuration: JSON, keys prefixed with the model's part."""

LYCORIS_WEIGHTS = frozenset(str(weight) for kind in MODULE_LIST for weight in kind.weight_list)
NEEDS_BASE = frozenset({"diag-oft", "boft", "glora", "tlora"})
"""Algorithms whose ΔW is a function of the base weight."""
WITHOUT_ALPHA = frozenset({"full", "norm", "ia3"})
TUCKER = frozenset({"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2", "bm.weight"})
"""Weights of Tucker-decomposed convolutions."""
SPELLED = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
DOWN, UP = "lora_down.weight", "lora_up.weight"
ONE_WEIGHT = "|".join(re.escape(weight) for weight in sorted({*LYCORIS_WEIGHTS, *SPELLED}, key=len, reverse=True))
OUTER = r"(?:base_model\.model\.)?(?:transformer|unet)\.|base_model\.model\."
# The shortest module: `weight` alone is ia3's, and would take the end of `lora_A.weight`.
DOTTED_KEY = re.compile(rf"^(?P<outer>{OUTER})(?P<module>.+?)\.(?P<weight>{ONE_WEIGHT})$")
UNDERSCORED_KEY = re.compile(rf"^(?P<outer>lycoris_|lora_unet_)(?P<module>[^.]+)\.(?P<weight>{ONE_WEIGHT})$")


class Kind(StrEnum):
    """Whose spelling the keys follow."""

    PEFT = "peft"
    LYCORIS = "lycoris"
    KOHYA = "kohya"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterModule:
    """The weights of one module, by lycoris' names (`lora_down.weight`, `lokr_w1`, …) whatever the file called them.

    `unit` is the part of its keys that names it, `module` that name without the outer prefix: dotted in peft files,
    with underscores in the others.
    """

    unit: str
    module: str
    weights: Mapping[str, Tensor]
    header_scale: float | None = None
    """alpha ÷ rank as the file's header says; None where it says nothing."""

    @property
    def algorithm(self) -> str:
        kind, _ = get_module({f"m.{name}": value for name, value in self.weights.items()}, "m")
        if kind is None:
            return "incomplete"
        return "lokr" if kind.name == "kron" else str(kind.name)

    @property
    def is_linear_lora(self) -> bool:
        """Nothing but a product of two matrices: what every reader can express."""
        return set(self.weights) <= {DOWN, UP, "alpha"} and {DOWN, UP} <= set(self.weights)

    @property
    def rank(self) -> int | None:
        """Inner dimension; None for full matrices."""
        for name, axis in (
            (DOWN, 0),
            ("hada_w1_b", 0),
            ("lokr_w1_b", 0),
            ("lokr_w2_b", 0),
            ("a2.weight", 0),
            ("q_layer.weight", 0),
        ):
            if name in self.weights:
                return self.weights[name].shape[axis]
        return None

    @property
    def alpha(self) -> float | None:
        """From `.alpha`, else from the header; None where neither says."""
        if "alpha" in self.weights:
            return float(self.weights["alpha"])
        if self.header_scale is None or self.rank is None:
            return None
        return self.header_scale * self.rank

    def scale(self, *, header: bool = True) -> float:
        """What a LoRA's product is multiplied with. `header`: the reader knows peft's configuration in the header."""
        rank = self.weights[DOWN].shape[0]
        if "alpha" in self.weights:
            return float(self.weights["alpha"]) / rank
        if header and self.header_scale is not None:
            return self.header_scale
        return 1.0

    @property
    def needs_base(self) -> bool:
        return "dora_scale" in self.weights or self.algorithm in NEEDS_BASE

    def delta(self, base: Tensor | None = None, *, header: bool = True) -> Tensor:
        """ΔW in fp32, (out, in). `base`: the weight it is put on, for algorithms that depend on it.

        Raises UserError `adapter_needs_base`, or `adapter_unreadable` where lycoris itself cannot load the module.
        """
        if self.is_linear_lora:
            return Product(self.weights[UP], self.weights[DOWN], self.scale(header=header)).dense()
        if self.needs_base and base is None:
            raise UserError(
                "adapter_needs_base", f"{self.unit}: what {self.algorithm} changes depends on the base weight."
            )
        if "w_norm" in self.weights:
            return self.weights["w_norm"].float().reshape(-1, 1)
        return self._library_delta(base)

    @torch.no_grad()
    def _library_delta(self, base: Tensor | None) -> Tensor:
        """Through lycoris' own module, put on a bare Linear of the right shape."""
        flat = {f"m.{name}": value.float() for name, value in self.weights.items()}
        rows, columns = base.flatten(1).shape if base is not None else self._shape()
        bare = nn.Linear(columns, rows, bias="diff_b" in self.weights)
        bare.weight.zero_() if base is None else bare.weight.copy_(base.flatten(1))
        kind, parameters = get_module(_flattened(flat), "m")
        module: Any = None
        # lycoris 4.1 saves ia3 with two weights and takes one back.
        if kind is not None and self.algorithm != "ia3" and not TUCKER & set(self.weights):
            # lycoris annotates an instance and means the class.
            module = make_module(kind, parameters, "m", bare)  # pyright: ignore[reportArgumentType]
        if module is None:
            raise UserError("adapter_unreadable", f"{self.unit}: {self.algorithm} cannot be loaded from a file here.")
        if self.needs_base:
            merged, _ = module.get_merged_weight()
            return (merged - bare.weight).detach()
        difference, _ = module.get_diff_weight(shape=(rows, columns))
        return difference.detach()

    def _shape(self) -> tuple[int, int]:
        """(out, in) as the weights imply it."""
        flat = {name: value.flatten(1) for name, value in self.weights.items() if value.ndim > 1}
        found = {name: (value.shape[0], value.shape[1]) for name, value in flat.items()}
        if "diff" in found:
            return found["diff"]
        if "hada_w1_a" in found:
            return found["hada_w1_a"][0], found["hada_w1_b"][1]
        if UP in found:
            return found[UP][0], found[DOWN][1]
        left = found.get("lokr_w1") or (found["lokr_w1_a"][0], found["lokr_w1_b"][1])
        right = found.get("lokr_w2") or (found["lokr_w2_a"][0], found["lokr_w2_b"][1])
        return left[0] * right[0], left[1] * right[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    path: Path
    kind: Kind
    family: str | None
    """As the header says; None where it is silent."""
    modules: tuple[AdapterModule, ...]
    unknown: tuple[str, ...]
    """Keys that belong to no module, or to one whose other half is missing."""
    metadata: Mapping[str, str]
    num_bytes: int

    @property
    def algorithms(self) -> tuple[str, ...]:
        return tuple(sorted({module.algorithm for module in self.modules}))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({module.rank for module in self.modules if module.rank is not None}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({module.alpha for module in self.modules if module.alpha is not None}))

    @property
    def dtypes(self) -> tuple[str, ...]:
        kinds = {v.dtype for module in self.modules for name, v in module.weights.items() if name != "alpha"}
        return tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def read_adapter(path: Path, *, family: str | None = None, strict: bool = True) -> AdapterFile:
    """Read a safetensors adapter. `family`: what it must be for, if its header says. `strict=False` keeps unknown keys.

    Raises UserError `adapter_unreadable`, `adapter_unknown_keys`, `adapter_other_family`.
    """
    tensors, metadata = _read_tensors(path)
    stated = family_of_header(metadata)
    if family is not None and stated is not None and stated != family:
        raise UserError("adapter_other_family", f"{path.name} is an adapter for {stated}, not for {family}.")
    modules, unknown = _group(tensors, metadata)
    if not modules:
        raise UserError(
            "adapter_unreadable",
            f"{path.name} holds no adapter: none of its {len(tensors)} keys names an adapter's weight.",
            exit_code=ExitCode.DATA,
        )
    if unknown and strict:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            "adapter_unknown_keys",
            f"{path.name} holds keys of no known adapter module: {', '.join(unknown[:3])}{more}.",
            hint="Nothing was left out in silence: the file needs another tool.",
            exit_code=ExitCode.DATA,
        )
    return AdapterFile(
        path=path,
        kind=_kind(modules),
        family=stated,
        modules=tuple(modules),
        unknown=tuple(unknown),
        metadata=metadata,
        num_bytes=path.stat().st_size,
    )


def split_key(key: str) -> tuple[str, str, str] | None:
    """(outer prefix, module, weight) of a key in any of the spellings; None for anything else."""
    match = DOTTED_KEY.match(key) or UNDERSCORED_KEY.match(key)
    return None if match is None else (match["outer"], match["module"], match["weight"])


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            "adapter_unreadable",
            f"{path.name} cannot be read as safetensors: {error}",
            hint="Adapters are read from .safetensors files only.",
            exit_code=ExitCode.DATA,
        ) from error


def _group(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[AdapterModule], list[str]]:
    grouped: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}
    unknown: list[str] = []
    for key in tensors:
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        outer, module, weight = split
        names[outer + module] = module
        grouped.setdefault(outer + module, {})[weight] = key
    configuration = _peft_configuration(metadata)
    modules: list[AdapterModule] = []
    for unit, keys in grouped.items():
        module = AdapterModule(
            unit=unit,
            module=names[unit],
            weights={SPELLED.get(weight, weight): tensors[key] for weight, key in keys.items()},
            header_scale=_header_scale(configuration, unit, tensors, keys),
        )
        # Both spellings of one weight collapse into one: the other would be lost.
        if len(module.weights) == len(keys) and _is_complete(module):
            modules.append(module)
        else:
            unknown.extend(keys.values())
    return modules, unknown


def _is_complete(module: AdapterModule) -> bool:
    weights, algorithm = set(module.weights), module.algorithm
    if algorithm == "locon":
        lycoris_alpha = "alpha" in weights or not module.unit.startswith("lycoris_")
        return {DOWN, UP} <= weights and lycoris_alpha
    if algorithm == "loha":
        return {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"} <= weights
    if algorithm == "lokr":
        halves = all({f"lokr_w{n}"} <= weights or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= weights for n in (1, 2))
        return halves and "alpha" in weights
    return algorithm in WITHOUT_ALPHA or (algorithm != "incomplete" and "alpha" in weights)


def _kind(modules: list[AdapterModule]) -> Kind:
    unit = modules[0].unit
    if unit.startswith("lycoris_"):
        return Kind.LYCORIS
    return Kind.KOHYA if unit.startswith("lora_unet_") else Kind.PEFT


def _peft_configuration(metadata: Mapping[str, str]) -> dict[str, Any]:
    if PEFT_HEADER not in metadata:
        return {}
    try:
        found: dict[str, Any] = json.loads(metadata[PEFT_HEADER])
    except ValueError as error:
        raise UserError(
            "adapter_unreadable", f"The header's {PEFT_HEADER} is not JSON: {error}", exit_code=ExitCode.DATA
        ) from error
    return found


def _header_scale(
    configuration: Mapping[str, Any], unit: str, tensors: Mapping[str, Tensor], keys: Mapping[str, str]
) -> float | None:
    """peft's rule: alpha of the first pattern that fits, else the common one; over r, or its root with rslora."""
    part, _, module = unit.removeprefix("base_model.model.").partition(".")
    own = {k.removeprefix(f"{part}."): v for k, v in configuration.items() if k.startswith(f"{part}.")}
    down = keys.get("lora_A.weight") or keys.get(DOWN)
    if "lora_alpha" not in own or down is None:
        return None
    patterns: dict[str, Any] = own.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), own["lora_alpha"]))
    rank = tensors[down].shape[0]
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _flattened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions' kernels as columns: (out, in, kh, kw) → (out, in·kh·kw). The oft's own blocks stay as they are."""
    return {
        name: value.flatten(1) if value.ndim > 2 and not name.endswith("oft_blocks") else value
        for name, value in weights.items()
    }
