"""Adapters on a frozen denoiser: LoRA through peft, LyCORIS through lycoris-lora. training.md §4.6."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lycoris.config
import torch
from lycoris.logging import logger as lycoris_logger
from lycoris.modules.locon import LoConModule
from lycoris.wrapper import LycorisNetwork, create_lycoris
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from simpletuner.adapters.product import Delta, Product
from simpletuner.config.lycoris import ATTENTION, FILE, complete_lycoris_config
from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import UserError
from simpletuner.families.spec import FamilySpec

WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX = "transformer."
_FACTORED = ("lora", "locon", "loha", "lokr", "glora")
"""Algorithms that act on activations: the base's weights are never touched, and ΔW is not built where it factors."""
_RANKED = ("lora", "locon", "loha", "glora")
_PRESET = "simpletuner"


class Adapter(Protocol):
    """Trainable modules inside a denoiser whose own weights are frozen."""

    def tensors(self) -> dict[str, Tensor]:
        """As they are written to a file, by the file's keys."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a file's tensors into place. Raises UserError `adapter_unknown_keys` where they do not fit."""
        ...

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        """Its file, of its `tensors` or of copies of them. Returns the file's path."""
        ...

    def deltas(self) -> dict[str, Callable[[], Delta]]:
        """ΔW of each module as it is at work now, by the denoiser's module names."""
        ...

    @property
    def reader(self) -> str:
        """Whose key rules its file follows: a name of `adapters.readers.READERS`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What kind it is and how many modules it has."""
        ...


def attach_adapter(denoiser: nn.Module, config: TrainConfig, spec: FamilySpec) -> Adapter:
    """Freeze the denoiser and put the adapter that the options describe into it; its weights are fp32."""
    denoiser.requires_grad_(False)
    if config.adapter.lora_type == "lycoris":
        return Lycoris(denoiser, config, spec)
    return Lora(denoiser, config, spec)


class Lora:
    """peft's LoRA. File keys: `transformer.<module>.lora_A.weight`; rank and alpha in the header, as in diffusers."""

    def __init__(self, denoiser: nn.Module, config: TrainConfig, spec: FamilySpec) -> None:
        options = config.adapter
        self._denoiser = denoiser
        self._header = _header(spec, config.publishing.modelspec_comment)
        targets = spec.lora_targets[config.flux.flux_lora_target if spec.name == "flux" else "all"]
        names = match_modules(denoiser, targets)
        linear = {name: module for name, module in denoiser.named_modules() if name in names}
        _check_rank(options.lora_rank, linear)
        self._config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha or options.lora_rank,  # pyright: ignore[reportArgumentType]
            lora_dropout=options.lora_dropout,
            target_modules=names,
        )
        inject_adapter_in_model(self._config, denoiser)
        _to_fp32(denoiser)

    def tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = get_peft_model_state_dict(self._denoiser, adapter_name="default")
        return {f"{_PREFIX}{key}": value.detach().contiguous() for key, value in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        _copy_into(self.tensors(), tensors)

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        alpha = self._config.lora_alpha
        names = sorted(str(name) for name in self._config.target_modules or ())
        described = {"r": self._config.r, "lora_alpha": alpha, "target_modules": names, "lora_dropout": 0.0}
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in described.items()})}
        _write_file(tensors or self.tensors(), folder / WEIGHTS, self._header | header)
        return folder / WEIGHTS

    def deltas(self) -> dict[str, Callable[[], Delta]]:
        layers = {name: module for name, module in self._denoiser.named_modules() if isinstance(module, LoraLayer)}
        return {name: partial(lora_delta, layer) for name, layer in layers.items()}

    reader = "diffusers"

    def facts(self) -> dict[str, Any]:
        count = sum(isinstance(module, LoraLayer) for module in self._denoiser.modules())
        return {"library": "peft", "algo": "lora", "modules": count, "rank": self._config.r}


class Lycoris:
    """The lycoris library's network. File keys: `lycoris_<module with _>.<weight>`; the configuration lies beside."""

    def __init__(self, denoiser: nn.Module, config: TrainConfig, spec: FamilySpec) -> None:
        given = config.adapter.lycoris_config
        assert isinstance(given, dict), "freezing a job reads or makes the configuration"
        self._header = _header(spec, config.publishing.modelspec_comment)
        self.config = complete_lycoris_config(given)
        names = {name.replace(".", "_"): name for name, _ in denoiser.named_modules()}
        self.network = _create_network(denoiser, self.config, spec)
        self._modules = [
            (names[lora.lora_name.removeprefix("lycoris_")], lora)
            for lora in self.network.loras  # pyright: ignore[reportAttributeAccessIssue]
        ]
        if self.config["algo"] in _RANKED:
            _check_rank(self.config["linear_dim"], {name: lora.org_module[0] for name, lora in self._modules})
        self.network.apply_to()
        self.network.float()
        self.network.to(next(denoiser.parameters()).device)
        # A child of the denoiser, so that modes, devices and parameters reach it.
        denoiser.add_module("lycoris", self.network)

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.detach().contiguous() for key, value in self.network.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        _check_keys(self.tensors(), tensors)
        with torch.no_grad():
            self.network.load_state_dict(dict(tensors), strict=False)
            for name, parameter in self.network.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2)
        _write_file(tensors or self.tensors(), folder / WEIGHTS, self._header | {"lycoris_config": text})
        (folder / FILE).write_text(text + "\n")
        return folder / WEIGHTS

    def deltas(self) -> dict[str, Callable[[], Delta]]:
        return {name: partial(lycoris_delta, lora) for name, lora in self._modules}

    reader = "lycoris"

    def facts(self) -> dict[str, Any]:
        return {"library": "lycoris", "algo": self.config["algo"], "modules": len(self._modules)}


def match_modules(denoiser: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Linear modules whose name ends with, or fits, one of `targets`. Raises `adapter_matched_nothing`."""
    linear = [name for name, module in denoiser.named_modules() if is_linear(module)]
    found = [name for name in linear if any(_fits(name, target) for target in targets)]
    if not found:
        raise _matched_nothing(denoiser, targets)
    return found


def is_linear(module: nn.Module) -> bool:
    """Also a quantised one, whatever class its library gave it."""
    return isinstance(module, nn.Linear)


def _fits(name: str, target: str) -> bool:
    return fnmatch(name, target) if "*" in target else name == target or name.endswith(f".{target}")


def lora_delta(module: LoraLayer) -> Product:
    """scaling · B · A."""
    down, up = (side["default"].weight.detach().float().cpu() for side in (module.lora_A, module.lora_B))  # pyright: ignore[reportCallIssue]
    return Product(up, down, module.scaling["default"])


def lycoris_delta(module: Any) -> Delta:
    """The library's own ΔW; of a plain LoRA its two factors, which is far less."""
    plain = isinstance(module, LoConModule) and not module.isconv and not module.wd
    lora: Any = module
    if plain:
        up, down = (side.weight.detach().float().cpu() for side in (lora.lora_up, lora.lora_down))
        return Product(up, down, lora.scale * lora.multiplier * float(lora.scalar))
    return lora.get_diff_weight(lora.multiplier)[0].detach().float().cpu()


def _create_network(denoiser: nn.Module, config: Mapping[str, Any], spec: FamilySpec) -> LycorisNetwork:
    passed = {key: value for key, value in config.items() if key != "apply_preset"}
    if config["algo"] in _FACTORED and not config.get("dora_wd"):
        passed.setdefault("bypass_mode", True)
    preset = _named_classes(config["apply_preset"], spec)
    with _library_preset(preset), _quiet():
        network = create_lycoris(denoiser, **passed, preset=_PRESET, warn_on_unmatched=False)
    if not network.loras:  # pyright: ignore[reportAttributeAccessIssue]
        named = (*preset["target_module"], *preset["target_name"], *preset["module_algo_map"], *preset["name_algo_map"])
        raise _matched_nothing(denoiser, named)
    return network


def _named_classes(preset: Mapping[str, Any], spec: FamilySpec) -> dict[str, Any]:
    """Every key of a preset, with the family's classes where it says `Attention`."""
    complete: dict[str, Any] = {
        "target_module": [], "target_name": [], "module_algo_map": {}, "name_algo_map": {}, "exclude_name": [],
        "enable_conv": False, "use_fnmatch": False,
    } | deepcopy(dict(preset))  # fmt: skip
    classes = complete["target_module"]
    complete["target_module"] = [
        name for target in classes for name in (spec.attention_classes if target == ATTENTION else (target,))
    ]
    table = complete["module_algo_map"]
    if ATTENTION in table:
        row = table.pop(ATTENTION)
        table |= dict.fromkeys(spec.attention_classes, row)
    return complete


@contextmanager
def _library_preset(preset: dict[str, Any]) -> Generator[None]:
    """The library keeps its preset in a class and its list of them in a module: both are as before afterwards."""
    names = [name for name in vars(LycorisNetwork) if name.isupper()]
    before = {name: vars(LycorisNetwork)[name] for name in names}
    presets = lycoris.config.PRESET
    presets[_PRESET] = preset
    try:
        yield
    finally:
        del presets[_PRESET]
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)


@contextmanager
def _quiet() -> Generator[None]:
    level = lycoris_logger.level
    lycoris_logger.setLevel("WARNING")
    try:
        yield
    finally:
        lycoris_logger.setLevel(level)


def _to_fp32(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _header(spec: FamilySpec, comment: str | None) -> dict[str, str]:
    stated = {"modelspec.comment": comment} if comment else {}
    return {"format": "pt", "modelspec.architecture": f"{spec.name}/lora", "simpletuner_family": spec.name, **stated}


def _write_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Equal adapters make equal files: the library writes the metadata in an order that changes from run to run."""
    content = save(dict(tensors), metadata)
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + size :])


def _check_rank(rank: int, linear: Mapping[str, Any]) -> None:
    for name, module in linear.items():
        if rank > (most := min(module.in_features, module.out_features)):
            raise UserError(
                "adapter_rank_too_large",
                f"Rank {rank} is above the size of {name} ({module.in_features} → {module.out_features}).",
                hint=f"Choose at most {most}.",
                pointer="/--lora_rank",
            )


def _matched_nothing(denoiser: nn.Module, targets: tuple[str, ...]) -> UserError:
    classes = sorted({type(module).__name__ for module in denoiser.modules()})
    return UserError(
        "adapter_matched_nothing",
        f"No module of the denoiser is named by {', '.join(targets) or 'an empty preset'}: nothing would be trained.",
        hint=f"Classes in it: {', '.join(classes)}.",
        pointer="/--lycoris_config/apply_preset",
    )


def _check_keys(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    foreign = [key for key in found if key not in own or found[key].shape != own[key].shape]
    missing = [key for key in own if key not in found]
    if foreign or missing:
        raise UserError(
            "adapter_unknown_keys",
            f"The adapter file does not fit this run's adapter: {len(foreign)} keys are unknown or of another shape, "
            f"{len(missing)} are missing; the first: {(foreign or missing)[0]}.",
            hint="Family, modules, algorithm and rank must be those that it was trained with.",
            pointer="/--init_lora",
        )


def _copy_into(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    _check_keys(own, found)
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(found[key])
