"""Write `requirements.lock` from the environment that is active: exact versions, no build of torch's own, no host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEADER = "# Exact versions that `make` installs (CPU), by scripts/write_lock.py. Why each: docs/dependencies.md\n"


def main() -> None:
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, check=True
    )
    lines = [line.partition("+")[0] for line in frozen.stdout.decode().splitlines()]
    kept = sorted((line for line in lines if "==" in line and not line.startswith("simpletuner")), key=str.lower)
    Path("requirements.lock").write_text(HEADER + "\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
