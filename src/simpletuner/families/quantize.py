"""Frozen bases in a quantised precision, loaded tensor by tensor. training.md §4.5.

At no moment is more in memory than what is quantised so far and one tensor in full (with `pipeline`, two).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simpletuner.errors import ExitCode, UserError
from simpletuner.families.precision import PRECISIONS, EmptyLinear, QuantisedLinear, check_precision, plain_tensors

Via = Literal["accelerator", "cpu", "pipeline"]


def quantised_names(model: nn.Module, precision: str, exclude: Sequence[str]) -> list[str]:
    """Names of the Linear modules whose weight is quantised. `exclude`: fnmatch patterns on whole module names."""
    rows, columns = PRECISIONS[precision].divisor
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
        and module.out_features % rows == 0
        and module.in_features % columns == 0
    ]


def build_empty(model_class: type[Any], folder: Path) -> nn.Module:
    """The model that `folder/config.json` describes: parameters on the meta device, computed buffers real."""
    from accelerate import init_empty_weights  # an eighth of a second, and few runs need it

    with init_empty_weights(include_buffers=False):
        return model_class.from_config(model_class.load_config(folder))


def shape_quantised(model: nn.Module, precision: str, exclude: Sequence[str]) -> None:
    """Put stand-ins that are as large, and compute as much, in the place of the modules that would be quantised."""
    for name in quantised_names(model, precision, exclude):
        linear = cast("nn.Linear", model.get_submodule(name))
        model.set_submodule(name, EmptyLinear(linear, PRECISIONS[precision].bytes_per_weight))


@torch.no_grad()
def load_quantised(
    model_class: type[Any],
    folder: Path,
    precision: str,
    *,
    default_dtype: torch.dtype,
    exclude: Sequence[str],
    device: torch.device,
    variant: str | None = None,
    via: Via = "accelerator",
) -> nn.Module:
    """A frozen diffusers model on `device`, in evaluation mode.

    Weights of Linear modules that `exclude` does not match are quantised from `default_dtype`, all else is in
    `default_dtype`. `via` says where: each value of it gives equal weights. Raises UserError `precision_unavailable`
    before anything is read, `model_part_missing` (69) and `model_weights_mismatch` (69).
    """
    check_precision(precision, device, default_dtype, via)
    files = WeightFiles.find(folder, variant)
    model = build_empty(model_class, folder)
    _check_names(model, files)
    release = _memory_release()
    quantised = set(quantised_names(model, precision, exclude))
    biases = {f"{name}.bias" for name in quantised}
    names = [name for name in files.names if name not in biases]
    place = torch.device("cpu") if via == "cpu" else device

    def read(name: str) -> list[Tensor]:
        """The tensor; with the weight of a quantised module its bias, if it has one."""
        module, _, kind = name.rpartition(".")
        bias = f"{module}.bias"
        parts = [name, bias] if kind == "weight" and module in quantised and bias in files.places else [name]
        return [files.read(part, place, default_dtype) for part in parts]

    for name, tensors in zip(names, _ahead(read, names) if via == "pipeline" else map(read, names), strict=True):
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in quantised:
            weight = tensors.pop(0)
            _check_shape(model, name, weight)
            bias = tensors.pop().to(device) if tensors else None
            linear = PRECISIONS[precision].quantise(weight, bias, device)
            model.set_submodule(module, linear)
            del weight
            release()
        else:
            _place(model, name, tensors.pop().to(device))
    _place_computed(model, device)
    return model.requires_grad_(False).eval()


def describe_quantised(model: nn.Module) -> dict[str, int]:
    """What is quantised: `quantised_modules`, `quantised_weights` (elements), `kept_modules` (Linear modules in full
    precision), `quantised_bytes` (codes and scales), `bytes` (all parameters and buffers)."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    quantised = [module for module in linears if is_quantised(module)]
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "quantised_modules": len(quantised),
        "quantised_weights": sum(module.in_features * module.out_features for module in quantised),
        "kept_modules": len(linears) - len(quantised),
        "quantised_bytes": sum(part.nbytes for module in quantised for part in plain_tensors(module.weight)),
        "bytes": sum(part.nbytes for tensor in tensors for part in plain_tensors(tensor)),
    }


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, QuantisedLinear) or (
        isinstance(module, nn.Linear) and "quant_state" in vars(module.weight)
    )


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files of a model: the file of each tensor, in the order in which they lie on disk."""

    places: dict[str, Path]

    @property
    def names(self) -> list[str]:
        return list(self.places)

    @classmethod
    def find(cls, folder: Path, variant: str | None) -> WeightFiles:
        """One file, or an index and its shards."""
        infix = f".{variant}" if variant else ""
        single = folder / SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")
        index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{infix}.json")
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [folder / shard for shard in shards]
        else:
            paths = [single]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                "model_part_missing",
                f"{folder} has no {', '.join(missing)}.",
                hint="A quantised base is read from safetensors files in diffusers format. Check --variant.",
                pointer="/--pretrained_model_name_or_path",
                exit_code=ExitCode.OUTSIDE,
            )
        return cls({name: path for path in paths for name in _names_in(path)})

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy in `dtype`, if it is of a floating type. The file is opened for this tensor alone: pages of an open
        mapping stay in memory once they were touched, so one open file would grow to the whole base."""
        path = self.places[name]
        with _opened(path) as file:
            tensor = cast("Tensor", file.get_tensor(name))
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            "model_weights_mismatch",
            f"{path} is no whole safetensors file: {error}",
            hint="Fetch it again.",
            pointer="/--pretrained_model_name_or_path",
            exit_code=ExitCode.OUTSIDE,
        ) from error


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.offset_keys())


def _ahead(read: Callable[[str], list[Tensor]], names: Sequence[str]) -> Iterator[list[Tensor]]:
    """One tensor is read while the one before it is quantised."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, name) for name in names[:1]]
        for following in [*names[1:], None]:
            tensors = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(read, following))
            yield tensors


def _memory_release() -> Callable[[], object]:
    """What gives freed memory back to the system. Blocks of up to 32 MB lie in glibc's heap, where the codes that stay
    keep the gaps between them: without this a process grows to three times the quantised base."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc
        return lambda: None
    return lambda: trim(0)


def _check_names(model: nn.Module, files: WeightFiles) -> None:
    expected = set(model.state_dict())
    found = set(files.places)
    problems = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", expected - found), ("unknown", found - expected))
        if names
    ]
    if problems:
        raise _mismatch(f"The weights do not fit {type(model).__name__}: {'; '.join(problems)}.")


def _check_shape(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, kind = name.rpartition(".")
    wanted = cast("Tensor", getattr(model.get_submodule(module), kind)).shape
    if tensor.shape != wanted:
        raise _mismatch(f"{name} has shape {tuple(tensor.shape)}; the configuration asks for {tuple(wanted)}.")


def _mismatch(message: str) -> UserError:
    return UserError(
        "model_weights_mismatch",
        message,
        hint="config.json and the weights must be of one model, in diffusers format.",
        pointer="/--pretrained_model_name_or_path",
        exit_code=ExitCode.OUTSIDE,
    )


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    _check_shape(model, name, tensor)
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = isinstance(getattr(module, kind), nn.Parameter)
    setattr(module, kind, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _place_computed(model: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds, such as position tables: computed when the model was built."""
    stored = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            owner, _, kind = name.rpartition(".")
            setattr(model.get_submodule(owner), kind, buffer.to(device))
