"""Frozen bases in few bits, loaded module by module: never the whole model in full precision. training.md §4.5."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from simpletuner.errors import ExitCode, UserError

Quantise = Callable[[nn.Linear], nn.Linear]
"""A frozen Linear with its weights in memory → one in few bits."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNUSABLE = (ImportError, AssertionError, RuntimeError, ValueError)
"""What the libraries raise where a device or a kernel is missing."""


def _quanto(kind: str) -> Quantise:
    def quantise(linear: nn.Linear) -> nn.Linear:
        import optimum.quanto as quanto

        module: Any = quanto.QLinear.from_module(linear, weights=vars(quanto)[kind])
        module.freeze()
        return module

    return quantise


def _torchao(kind: str) -> Quantise:
    def quantise(linear: nn.Linear) -> nn.Linear:
        import torchao.quantization as torchao

        if linear.in_features % 16 == 0 and linear.out_features % 16 == 0:
            torchao.quantize_(linear, vars(torchao)[kind]())
        return linear

    return quantise


def _nf4(linear: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    bias: Any = linear.bias
    with torch.device("meta"):
        module: Any = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
        )
    parameter: Any = Params4bit
    module.weight = parameter(linear.weight.data, requires_grad=False, quant_type="nf4")
    module.bias = bias
    # On CPUs the library would repack the weights when it first validates, for kernels that have no backward pass.
    module.support_avx512bf16_for_cpu = False
    return module.to(linear.weight.device)


PRECISIONS: Mapping[str, tuple[Quantise, str]] = {
    "int8-quanto": (_quanto("qint8"), "pip install optimum-quanto"),
    "int4-quanto": (_quanto("qint4"), "pip install optimum-quanto"),
    "fp8-quanto": (_quanto("qfloat8"), "pip install optimum-quanto"),
    "int8-torchao": (_torchao("Int8WeightOnlyConfig"), "pip install torchao"),
    "fp8wo-torchao": (_torchao("Float8WeightOnlyConfig"), "pip install torchao"),
    "fp8-torchao": (
        _torchao("Float8DynamicActivationFloat8WeightConfig"),
        "It multiplies in 8 bits: an NVIDIA GPU of compute capability 8.9 or above. On others: fp8wo-torchao.",
    ),
    "int4-torchao": (_torchao("Int4WeightOnlyConfig"), "It needs an NVIDIA GPU and `pip install mslk`."),
    "nf4-bnb": (_nf4, "pip install 'simpletuner[bnb]'"),
}
"""Name → how one Linear is quantised, and what the library needs."""


def load_quantised(
    kind: Any,
    folder: Path,
    precision: str,
    *,
    dtype: torch.dtype,
    unquantised: Sequence[str],
    variant: str | None = None,
) -> nn.Module:
    """A diffusers model of class `kind`: each Linear is read, quantised and let go before the next; frozen.

    Modules that fit a pattern of `unquantised`, and all that is not a Linear, are of `dtype`.
    Raises UserError `precision_unavailable` before anything is read, `model_part_missing` where weights are missing.
    """
    check_precision(precision, dtype)
    with no_init_weights(), accelerate.init_empty_weights():
        model: nn.Module = kind.from_config(kind.load_config(folder))
    quantise = PRECISIONS[precision][0]
    weights = _Weights(folder, variant)
    for name, module in list(model.named_modules()):
        for own, value in weights.of(name, module):
            module.register_parameter(own, nn.Parameter(value.to(dtype), requires_grad=False))
        if name and is_quantised_name(name, module, unquantised):
            assert isinstance(module, nn.Linear)
            found = quantise(module)
            if found is not module:
                model.set_submodule(name, found)
                # The list of modules still holds the one that was replaced.
                module.register_parameter("weight", None)
    model.requires_grad_(False)
    return model


def is_quantised_name(name: str, module: nn.Module, unquantised: Sequence[str]) -> bool:
    """A Linear outside the family's table of those that stay as they are."""
    return isinstance(module, nn.Linear) and not any(fnmatch(name, pattern) for pattern in unquantised)


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """Try it on a small Linear, forward and backward. Raises UserError `precision_unavailable` (69)."""
    quantise, need = PRECISIONS[precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linear = nn.Linear(256, 256, dtype=dtype, device=device).requires_grad_(False)
    try:
        x = torch.ones(32, 256, dtype=dtype, device=device, requires_grad=True)
        quantise(linear)(x).sum().backward()
    except _UNUSABLE as error:
        raise UserError(
            "precision_unavailable",
            f"--base_model_precision {precision} cannot be used on this {device}: {error}",
            hint=need,
            pointer="/--base_model_precision",
            exit_code=ExitCode.OUTSIDE,
        ) from error


class _Weights:
    """The safetensors files of a diffusers model, read tensor by tensor.

    Not mapped: pages of a mapped file count as the process's memory for as long as it is open, all of the model then.
    """

    def __init__(self, folder: Path, variant: str | None) -> None:
        self._folder = folder
        self._stem = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}"
        self._variant = variant
        self._place_of: dict[str, tuple[Path, torch.dtype, list[int], int]] = {}
        for path in self._files():
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        for key, entry in header.items():
            if key != "__metadata__":
                start = 8 + size + entry["data_offsets"][0]
                self._place_of[key] = (path, _DTYPES[entry["dtype"]], entry["shape"], start)

    def _read(self, key: str) -> Tensor:
        path, dtype, shape, start = self._place_of[key]
        value = torch.empty(shape, dtype=dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            target: Any = value.view(-1).view(torch.uint8).numpy()
            file.readinto(target)
        return value

    def of(self, name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The parameters that are the module's own, by their name in it."""
        for own, _ in module.named_parameters(recurse=False):
            key = f"{name}.{own}" if name else own
            if key not in self._place_of:
                raise self._missing(f"the weight {key}")
            yield own, self._read(key)

    def _files(self) -> list[Path]:
        variant = f".{self._variant}" if self._variant else ""
        index = self._folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [self._folder / name for name in names]
        whole = self._folder / f"{self._stem}.safetensors"
        if not whole.exists():
            raise self._missing(whole.name)
        return [whole]

    def _missing(self, what: str) -> UserError:
        return UserError(
            "model_part_missing",
            f"{self._folder} lacks {what}.",
            hint="Quantised bases are loaded from the safetensors files of a diffusers folder.",
            pointer="/--pretrained_model_name_or_path",
            exit_code=ExitCode.OUTSIDE,
        )
