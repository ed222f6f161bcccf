"""What rank 0 does between steps with weights that are spread over the ranks takes all of them.

It says what it is about to do, and the others do it along: a forward pass, gathering weights, writing the parts of a
checkpoint. In training every rank knows by itself what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from simpletuner.errors import ExitCode, UserError
from simpletuner.train.ranks import Ranks
from simpletuner.train.sharding import ShardedParameters, gather
from simpletuner.train.update import Update

PARTS = "parts"
"""Folder of a checkpoint with what each rank has written of optimizer and average: safetensors, by torch's DCP."""

_NO_WORD: tuple[str, Any] = ("", None)


class Company:
    """Of one denoiser that is spread. Every rank makes one; rank 0 asks, the others `attend`.

    Whatever rank 0 asks raises UserError `pass_failed` (69) once it has left the others alone in a forward pass.
    """

    def __init__(self, denoiser: nn.Module, ranks: Ranks) -> None:
        assert isinstance(denoiser, FSDPModule)
        self._denoiser: Any = denoiser
        self._ranks = ranks
        self._update: Update | None = None
        self._has_failed = False
        if ranks.is_main:
            denoiser.register_forward_pre_hook(self._announce, prepend=True, with_kwargs=True)
            denoiser.register_forward_hook(self._reshard, always_call=True)
        # Here, as what is made inside of an inference mode can never be trained with.
        for module in denoiser.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()

    def follow(self, update: Update) -> None:
        """`update` is what it speaks of from now on."""
        self._update = update
        if self._ranks.is_main and update.ema is not None and self._sharded:
            update.ema.elsewhere = self._average_elsewhere

    # Of rank 0.

    @torch.inference_mode(mode=False)
    def weights(self) -> dict[str, Tensor]:
        """All that the denoiser holds now, whole, in host memory."""
        state: dict[str, Tensor] = self._denoiser.state_dict()
        found = {name: value.cpu() for name, value in state.items() if not isinstance(value, DTensor)}
        for index, buffer in self._sharded:
            found |= self._gather(index, buffer, average=False)
        return {name: found[name] for name in state}

    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the trained weights, whole, in host memory."""
        assert self._update is not None
        if self._update.ema is None:
            return None
        found = {name: value.cpu() for name, value in self._update.ema.named_tensors()}
        for index, buffer in self._sharded:
            found |= self._gather(index, buffer, average=True)
        return found

    def write_parts(self, folder: Path) -> None:
        """Each rank writes its own."""
        self._tell("write", folder)
        self._write(folder)

    def release(self) -> None:
        """The others go on by themselves."""
        self._tell("release", None)

    # Of the others.

    def attend(self) -> None:
        """Do along what rank 0 does, until it releases."""
        does: dict[str, Callable[[Any], object]] = {
            "forward": self._forward,
            "gather": lambda asked: self._gather_along(*asked),
            "write": self._write,
        }
        with ExitStack() as average:
            while (word := self._ranks.share(_NO_WORD))[0] != "release":
                name, content = word
                if name == "average":
                    assert self._update is not None and self._update.ema is not None
                    average.enter_context(self._update.ema.in_place())
                elif name == "trained":
                    average.close()
                else:
                    does[name](content)

    # Of all at once.

    def read_parts(self, folder: Path) -> None:
        """What `write_parts` wrote, by however many ranks, into the tensors that are there."""
        assert self._update is not None
        load(self._update.spread_state(), storage_reader=HuggingFaceStorageReader(str(folder / PARTS)))

    @property
    def _sharded(self) -> list[tuple[int, ShardedParameters]]:
        assert self._update is not None
        return [(i, buffer) for i, buffer in enumerate(self._update.buffers) if isinstance(buffer, ShardedParameters)]

    def _tell(self, name: str, content: Any) -> None:
        if self._has_failed:
            raise UserError(
                "pass_failed",
                "A forward pass that takes all ranks failed on the first one; the others are still in it.",
                hint="What went wrong stands before this. The run can go on from its last checkpoint.",
                exit_code=ExitCode.OUTSIDE,
            )
        self._ranks.share((name, content))

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            content = tree_map_only(Tensor, lambda tensor: tensor.cpu(), (args, kwargs))
            self._tell("forward", (module.training, content))

    def _reshard(self, module: nn.Module, args: Any, output: Any) -> None:
        """Also called where the pass failed, without an output."""
        if torch.is_grad_enabled():
            return
        self._has_failed = output is None
        # What stays fetched would be taken for the weights of later, too.
        self._denoiser.reshard()

    @torch.inference_mode()
    def _forward(self, told: tuple[bool, Any]) -> None:
        device = next(self._denoiser.parameters()).device
        training, content = told
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), content)
        was_training = self._denoiser.training
        self._denoiser.train(training)(*args, **kwargs)
        self._denoiser.reshard()
        self._denoiser.train(was_training)

    def _gather(self, index: int, buffer: ShardedParameters, *, average: bool) -> dict[str, Tensor]:
        self._tell("gather", (index, average))
        return self._gather_along(index, average)

    def _gather_along(self, index: int, average: bool) -> dict[str, Tensor]:
        assert self._update is not None
        buffer = self._update.buffers[index]
        assert isinstance(buffer, ShardedParameters)
        flat = buffer.weights
        if average:
            assert self._update.ema is not None
            flat = self._update.ema.shadows[index]
        return gather(buffer, flat, self._ranks)

    def _write(self, folder: Path) -> None:
        assert self._update is not None
        writer = HuggingFaceStorageWriter(str(folder / PARTS), save_distributed=True)
        try:
            save(self._update.spread_state(), storage_writer=writer)
        except CheckpointException as error:
            # Every rank is told when one fails; rank 0 says so, and the run goes on.
            if self._ranks.is_main:
                raise OSError(str(error)) from error

    @contextmanager
    def _average_elsewhere(self) -> Generator[None]:
        self._tell("average", None)
        try:
            yield
        finally:
            self._tell("trained", None)
