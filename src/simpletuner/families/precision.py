"""The quantised precisions: what each name means, what it needs, and a Linear that computes with such weights.

Shapes: O output rows, I input columns, S rows of input.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simpletuner.errors import ExitCode, UserError

ELEMENTS_AT_ONCE = 1 << 20
"""Quantised in one go, so that the fp32 copy that codes are rounded from stays small beside a whole weight."""

WITHOUT_DEQUANTISE = ("Int4TilePackedTo4dTensor",)
"""Weight classes of torchao that the library cannot turn back."""

META = torch.device("meta")

Quantise = Callable[[Tensor, Tensor | None, torch.device], nn.Linear]
"""Weight (O, I) and bias (O) of a Linear → the Linear that stands for it."""


class Library(NamedTuple):
    module: str
    package: str
    """What pip installs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One quantised precision. `lacks` says what is missing on a device, or nothing."""

    library: Library
    quantise: Quantise
    lacks: Callable[[torch.device, torch.dtype], str]
    divisor: tuple[int, int] = (1, 1)
    """What output and input sides of a weight must be multiples of; other weights are kept."""
    bytes_per_weight: float = 1.0
    """Codes and what belongs to blocks of them; scales of whole rows are not counted."""
    packs_on_device: bool = False
    """Whether the weight can only be quantised where it is used."""


class _FrozenProduct(torch.autograd.Function):
    """x·Wᵀ + b through the library's own kernel, gradients to x (and b) alone.

    Only the quantised weight outlives the forward pass. The libraries' weight-only products otherwise leave the
    dequantised weight in the graph (torchao int8, fp8), which would cost all the memory that was saved, or have no
    derivative at all (torchao int4, fp8).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not `save_for_backward`: hooks that move saved tensors off the device must not see the frozen weight.
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad = grads[0]
        to_x = grad.matmul(dequantise(ctx.weight).to(grad.dtype)) if ctx.needs_input_grad[0] else None
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return to_x, None, to_bias


class QuantisedLinear(nn.Linear):
    """A Linear over a frozen weight of optimum-quanto or torchao, that no adapter may rebuild: LyCORIS must be told
    `bypass_mode`, or it would dequantise the weight into the graph (optimum-quanto) or fail (torchao)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device=META)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return _FrozenProduct.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]
        # Autocast cannot cast a quantised weight: the product is in the weight's type, the output in autocast's.
        with torch.autocast(kind, enabled=False):
            output: Any = _FrozenProduct.apply(input.to(self.weight.dtype), self.weight, self.bias)
        return output.to(torch.get_autocast_dtype(kind))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedLinear:
        """The weight is shared, since it never changes; optimum-quanto's could not be copied."""
        memo[id(self.weight)] = self.weight
        memo[id(self)] = copied = QuantisedLinear.__new__(QuantisedLinear)
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied


class _EmptyProduct(torch.autograd.Function):
    """As large as `_FrozenProduct`, whose weight is in full precision for the length of a product, either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, x.new_empty(weight.shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        return grads[0].matmul(grads[0].new_empty(ctx.weight.shape)), None, None


class EmptyLinear(QuantisedLinear):
    """Stands for the quantised form of `linear` where only sizes matter: its weight is so many bytes without values."""

    def __init__(self, linear: nn.Linear, bytes_per_weight: float) -> None:
        size = linear.weight.shape
        content = torch.empty(math.ceil(size.numel() * bytes_per_weight), dtype=torch.uint8)
        super().__init__(content.as_strided(size, (0, 0)), linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            return _EmptyProduct.apply(input.to(dtype), self.weight, self.bias)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def dequantise(weight: Any) -> Tensor:
    """(O, I) in the type that the weight computes in."""
    return multiply_out(weight) if type(weight).__name__ in WITHOUT_DEQUANTISE else weight.dequantize()


@torch.no_grad()
def multiply_out(weight: Tensor) -> Tensor:
    """(O, I), for a layout that can only be multiplied with: the rows of the identity give its columns."""
    columns = weight.shape[1]
    step = max(1, ELEMENTS_AT_ONCE // columns)
    parts: list[Tensor] = []
    for first in range(0, columns, step):
        some = torch.arange(first, min(first + step, columns), device=weight.device)
        identity = torch.zeros(len(some), columns, dtype=weight.dtype, device=weight.device)
        identity[some - first, some] = 1
        parts.append(nn.functional.linear(identity, weight))
    return torch.cat(parts).t()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The memory behind a weight: codes, scales, zero points; or the tensor itself."""
    state = vars(tensor).get("quant_state")
    if state is not None:  # bitsandbytes
        yield tensor.data
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        yield from (part for part in [state.absmax, state.code, *nested] if part is not None)
    elif "__tensor_flatten__" in dir(type(tensor)):
        names = tensor.__tensor_flatten__()[0]  # pyright: ignore[reportAttributeAccessIssue]
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor.data


def _quanto_8bit(target: str) -> Quantise:
    """Per row s = max|w| / qmax and q = w / s, rounded. In fp32: the library divides in bf16, where one code in 13 is
    the neighbour of the right one."""

    def quantise(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
        from optimum.quanto import qtypes
        from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor

        kind = qtypes[target]
        scale_O1 = weight.new_empty(len(weight), 1)
        codes = torch.empty(weight.shape, dtype=kind.dtype, device=weight.device)
        step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            exact = weight[rows].float()
            scale = exact.abs().amax(1, keepdim=True).div_(kind.qmax).to(weight.dtype)
            scale_O1[rows] = scale.masked_fill_(scale == 0, 1)  # a row of zeros
            exact.div_(scale.float()).clamp_(-kind.qmax, kind.qmax)
            codes[rows] = exact.to(kind.dtype) if kind.is_floating_point else exact.round_().to(kind.dtype)
        values = WeightQBytesTensor.create(kind, 0, weight.size(), weight.stride(), codes, scale_O1)
        return QuantisedLinear(values.to(device), bias)

    return quantise


def _quanto_4bit(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    from optimum.quanto import MaxOptimizer, QLinear, qint4, quantize_weight

    group = QLinear(weight.shape[1], weight.shape[0], bias=False, device=META, weights=qint4).weight_group_size
    scale, shift = MaxOptimizer()(weight, qtype=qint4, axis=0, group_size=group)
    scale[scale == 0] = 1
    values = quantize_weight(weight, qtype=qint4, axis=0, scale=scale, shift=shift, group_size=group)
    return QuantisedLinear(values.to(device), bias)


def _torchao(config: str, **options: Any) -> Quantise:
    """`config`: a class of torchao.quantization."""

    def quantise(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
        import torchao.quantization as ao

        # Looked up by the class's name, so that importing this module does not import the library.
        linear = QuantisedLinear(weight, bias)
        ao.quantize_(linear, vars(ao)[config](set_inductor_config=False, **options))
        values: Any = linear.weight
        if type(values).__name__ == "Float8Tensor":
            _mend_empty_rows(values, weight)
        linear.weight = nn.Parameter(values.to(device), requires_grad=False)
        return linear

    return quantise


def _mend_empty_rows(values: Any, weight: Tensor) -> None:
    """A row of zeros gets the scale 0 from torchao's float8, and is 0 ÷ 0 from then on."""
    values.scale[values.scale == 0] = 1
    values.qdata.view(torch.uint8)[weight.abs().amax(1) == 0] = 0


def _bnb_4bit(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn.modules import LinearNF4, Params4bit

    parameter: Any = Params4bit
    linear = LinearNF4(weight.shape[1], weight.shape[0], bias is not None, compute_dtype=weight.dtype, device=META)
    # On CPUs with AVX-512 bf16 the library would repack the weight in place at the first forward pass without
    # gradients (a validation), for a kernel that has no backward.
    linear.support_avx512bf16_for_cpu = False
    # Quantised by its first move, which is where the weight already lies.
    values = parameter(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    linear.weight = values.to(device)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _on(*kinds: str) -> Callable[[torch.device, torch.dtype], str]:
    def lacks(device: torch.device, dtype: torch.dtype) -> str:
        return "" if device.type in kinds else f"a device of type {' or '.join(kinds)}"

    return lacks


def _on_cuda(major: int, minor: int, dtypes: tuple[torch.dtype, ...]) -> Callable[[torch.device, torch.dtype], str]:
    """`dtypes`: the types that the kernel computes in."""

    def lacks(device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (major, minor):
            return f"a CUDA device of compute capability {major}.{minor} or newer"
        return "" if dtype in dtypes else "--base_model_default_dtype bf16"

    return lacks


_QUANTO = Library("optimum.quanto", "optimum-quanto")
_TORCHAO = Library("torchao", "torchao")
_BNB = Library("bitsandbytes", "simpletuner[bnb]")
_BF16 = (torch.bfloat16,)

PRECISIONS: Mapping[str, Precision] = {
    "int8-quanto": Precision(library=_QUANTO, quantise=_quanto_8bit("qint8"), lacks=_on("cpu", "cuda", "mps")),
    "int4-quanto": Precision(
        library=_QUANTO, quantise=_quanto_4bit, lacks=_on("cpu", "cuda"), bytes_per_weight=0.5 + 4 / 128
    ),
    "fp8-quanto": Precision(library=_QUANTO, quantise=_quanto_8bit("qfloat8"), lacks=_on("cpu", "cuda")),
    "int8-torchao": Precision(
        library=_TORCHAO, quantise=_torchao("Int8WeightOnlyConfig"), lacks=_on("cpu", "cuda"), divisor=(16, 16)
    ),
    "fp8-torchao": Precision(
        library=_TORCHAO,
        quantise=_torchao("Float8DynamicActivationFloat8WeightConfig"),
        lacks=_on_cuda(8, 9, (torch.bfloat16, torch.float32)),
        divisor=(16, 16),
    ),
    "fp8wo-torchao": Precision(
        library=_TORCHAO, quantise=_torchao("Float8WeightOnlyConfig"), lacks=_on("cpu", "cuda"), divisor=(16, 16)
    ),
    # The library's default packing needs a package for H100 only; this one runs from Ampere on, with equal codes.
    "int4-torchao": Precision(
        library=_TORCHAO,
        quantise=_torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d"),
        lacks=_on_cuda(8, 0, _BF16),
        divisor=(16, 128),
        bytes_per_weight=0.5 + 4 / 128,
        packs_on_device=True,
    ),
    "nf4-bnb": Precision(library=_BNB, quantise=_bnb_4bit, lacks=_on("cpu", "cuda"), bytes_per_weight=0.5 + 1 / 64),
}


def check_precision(name: str, device: torch.device, default_dtype: torch.dtype, via: str = "accelerator") -> None:
    """Whether a base can be quantised and trained over here; cheap, nothing is loaded.

    Raises UserError `precision_unavailable`: 69 where the device lacks something, 64 where the settings or the
    installation do.
    """
    precision = PRECISIONS[name]
    pointer = "/--base_model_precision"
    # A package that is absent altogether has no parent to look into either.
    if any(importlib.util.find_spec(part) is None for part in _packages(precision.library.module)):
        raise UserError(
            "precision_unavailable",
            f"The precision {name} needs the library {precision.library.module}, which is not installed.",
            hint=f"pip install '{precision.library.package}'",
            pointer=pointer,
        )
    if missing := precision.lacks(device, default_dtype):
        setting = missing.startswith("--")
        raise UserError(
            "precision_unavailable",
            f"The precision {name} needs {missing}; this run is on {device.type} in {default_dtype}.",
            hint="Choose int8-quanto, which runs everywhere, or another base_model_precision.",
            pointer=pointer,
            exit_code=ExitCode.CONFIG if setting else ExitCode.OUTSIDE,
        )
    if precision.packs_on_device and via == "cpu" and device.type != "cpu":
        raise UserError(
            "precision_unavailable",
            f"The precision {name} is packed for the device and cannot be quantised on the CPU.",
            hint="Use --quantize_via accelerator.",
            pointer="/--quantize_via",
        )


def _packages(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))
