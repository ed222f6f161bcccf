"""What a process asks of its system: to follow its parent into death, to give memory back, the time."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD = -3


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


def boottime() -> float:
    """Seconds that go on while the machine sleeps, and never jump."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def kill_tree(pid: int) -> None:
    """End a child and everything that it started, at once. Linux finds them all; elsewhere the child alone."""
    for each in [pid, *_descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return children + [deeper for child in children for deeper in _descendants(child)]


@contextmanager
def nothing_is_garbage() -> Generator[None]:
    """For imports and what a program builds once: Python would look through all of it again and again, a tenth of a
    server's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def return_freed_memory() -> None:
    """Have blocks of 1 MB and more go back to the system when they are freed. glibc would come to keep those of up to
    32 MB in its heap, where they leave gaps: hundreds of megabytes that no prediction from shapes can know of."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    except (OSError, TypeError, AttributeError):  # not glibc
        return


def peak_resident_bytes() -> int:
    """The most memory that this program has held.

    Linux's `ru_maxrss` is not that: a program inherits the peak of the one that started it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    if peaks:
        return int(peaks[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
