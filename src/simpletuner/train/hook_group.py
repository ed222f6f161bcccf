"""`python -m simpletuner.train.hook_group PARENT ARGV…`: runs a program in this process group, and ends it with PARENT.

The trainer may be killed at any moment. The kernel then signals this process, and it takes the whole group with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

from simpletuner.process import die_with_parent

CANNOT_START = 127


def main(parent: int, argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, _end_group)
    die_with_parent(parent, signal.SIGTERM)
    try:
        program = subprocess.Popen(argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        return CANNOT_START
    code = program.wait()
    return code if code >= 0 else 128 - code


def _end_group(_number: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
