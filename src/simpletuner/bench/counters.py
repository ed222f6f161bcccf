"""Counts what a loop does in one step: torch operations, Python calls, host synchronisations. No clock is involved."""

from __future__ import annotations

import sys
from collections import Counter
from types import CodeType, FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

HOST_SYNCS = ("aten._local_scalar_dense.default", "aten.nonzero.default")
NETWORK = ("predict", "Loss.__call__", "Tensor.backward", "Update.apply")
"""Ends of the names of what a loop calls for forward, backward and optimizer; all else is the trainer's own."""

UNCOUNTED = ("simpletuner.bench", "simpletuner.train.half_on_cpu")
"""Modules: what measures, and the kernels of processors that lack them."""


class OperationCounter(TorchDispatchMode):
    """Every operation that reaches a backend while it is entered, by the function that the loop had called.

    What a kernel does within itself is not seen, nor what other threads do.
    """

    def __init__(self, loop: CodeType) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._loop = loop

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        self.counts[called_by(self._loop, frame), str(func)] += 1
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)


class LaunchCounter(TorchDispatchMode):
    """Operations that compute something while it is entered: each is a kernel or a copy of its own on a GPU, at least.

    Views launch nothing. On tensors of the meta device it counts what would happen, without memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "profiler":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class CallCounter:
    """Every call of a Python function of our packages on this thread, by the function that the loop had called."""

    def __init__(self, loop: CodeType) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._loop = loop

    def start(self) -> None:
        sys.setprofile(self._see)

    def stop(self) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _argument: Any) -> None:
        # By module, not by file: the methods that dataclasses write have no file.
        module = str(frame.f_globals.get("__name__", ""))
        if event == "call" and module.startswith("simpletuner.") and not module.startswith(UNCOUNTED):
            self.counts[called_by(self._loop, frame), frame.f_code.co_qualname] += 1


def called_by(loop: CodeType, frame: FrameType | None) -> str:
    """Name of what the innermost frame of `loop` is calling; `loop` itself when the operation is its own."""
    inner: FrameType | None = None
    while frame is not None and frame.f_globals.get("__name__") == "torch._compile":
        frame = frame.f_back  # torch's own cover around the counter
    while frame is not None and frame.f_code is not loop:
        frame, inner = frame.f_back, frame
    return "loop" if frame is None or inner is None else inner.f_code.co_qualname


def is_network(caller: str) -> bool:
    return caller.endswith(NETWORK)
