"""For test_warm.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main() -> int:
    print(Path.cwd(), os.environ["A"], flush=True)
    if sys.argv[1] == "sleep":
        time.sleep(600)
    return int(sys.argv[2])
