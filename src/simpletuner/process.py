"""How a process follows its parent into death."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent dies. Call first thing after the fork; Linux only.

    The request is not inherited: under torchrun each rank asks for itself, with torchrun as its parent.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the request was made.
        os.kill(os.getpid(), signal_number)
