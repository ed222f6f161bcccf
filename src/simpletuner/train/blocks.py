"""How the repeated blocks of a denoiser run while training: recomputed, compiled, with which kernel of attention.

diffusers' models hand their blocks to a function that may be chosen; this module chooses it. training.md §2.1, §2.11;
docs/adr/0033.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from simpletuner.config.compute_options import ComputeOptions
from simpletuner.errors import ExitCode, UserError
from simpletuner.train.attention import KERNELS, unavailable

RunBlock = Callable[..., Any]
"""Called with a block and its inputs; answers what the block does."""

_ATTENTION = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )
)  # fmt: skip
"""The fused kernels. `math` has none: it keeps nothing, and everything is recomputed."""


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """diffusers names the repeated blocks itself for some models only."""
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def choose_run(
    denoiser: nn.Module, options: ComputeOptions, kernels: Sequence[str] | None = None, *, compiles: bool = True
) -> None:
    """Have the blocks run as the options say; one that is compiled is compiled at its first step.

    `kernels`: names of those that attention may take, the first that can being taken; None leaves it to the options.
    """
    blocks = blocks_of(denoiser)
    forced = options.attention_mechanism
    run = _run if forced == "diffusers" else _forced(forced)
    if kernels is not None:
        run = _with_kernels(kernels)
    recomputed = blocks[:: options.gradient_checkpointing_interval or 1] if options.gradient_checkpointing else []
    compiled = compiles and options.dynamo_backend != "no"
    if run is _run and not recomputed and not compiled:
        return
    keeping: RunBlock = run
    recomputing = _recomputing(run, keeps_attention=options.gradient_checkpointing_keeps == "attention")
    if compiled:
        keeping, recomputing = _compiled(keeping, options), _compiled(recomputing, options)
    run = recomputing if len(recomputed) == len(blocks) else keeping
    if 0 < len(recomputed) < len(blocks):
        run = _mixed({id(block) for block in recomputed}, recomputing, keeping)
    denoiser.enable_gradient_checkpointing(run)  # pyright: ignore[reportCallIssue]


def _run(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def _with_kernels(names: Sequence[str]) -> RunBlock:
    kernels = [KERNELS[name] for name in names]

    def run(block: nn.Module, *inputs: Any) -> Any:
        with sdpa_kernel(kernels, set_priority=True):
            return block(*inputs)

    return run


def _forced(name: str) -> RunBlock:
    kernel = KERNELS[name]

    def run(block: nn.Module, *inputs: Any) -> Any:
        with sdpa_kernel(kernel):
            try:
                return block(*inputs)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise unavailable(name, "it cannot do what a block asks, a mask or this size") from error

    return run


def _recomputing(run: RunBlock, *, keeps_attention: bool) -> RunBlock:
    if not keeps_attention:
        return partial(checkpoint, run, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    return partial(checkpoint, run, use_reentrant=False, context_fn=contexts)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _mixed(recomputed: set[int], recomputing: RunBlock, keeping: RunBlock) -> RunBlock:
    def run(block: nn.Module, *inputs: Any) -> Any:
        return (recomputing if id(block) in recomputed else keeping)(block, *inputs)

    return run


def _compiled(run: RunBlock, options: ComputeOptions) -> RunBlock:
    """What is compiled for one block of a kind serves the others: weights are inputs of the graph."""

    def call(block: nn.Module, *inputs: Any) -> Any:
        return run(block, *inputs)

    compiled = torch.compile(
        call,
        backend=options.dynamo_backend,
        mode=options.dynamo_mode if options.dynamo_backend == "inductor" else None,
        fullgraph=options.dynamo_fullgraph,
        dynamic=options.dynamo_dynamic or None,
    )

    def checked(block: nn.Module, *inputs: Any) -> Any:
        try:
            return compiled(block, *inputs)
        except RuntimeError as error:
            if not _is_of_compiling(error):
                raise
            raise _not_compiled(error, type(block).__name__) from error

    return checked


def _is_of_compiling(error: RuntimeError) -> bool:
    # Not at the top: half a second of a trainer that compiles nothing.
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _not_compiled(error: Exception, kind: str) -> UserError:
    told = " ".join(str(error).strip().partition("\n\n")[0].split())
    return UserError(
        "compile_failed",
        f"Blocks of the kind {kind} cannot be compiled: {told}",
        hint="Set --dynamo_backend no; the result is the same, a step takes longer.",
        pointer="/--dynamo_backend",
        exit_code=ExitCode.OUTSIDE,
    )
