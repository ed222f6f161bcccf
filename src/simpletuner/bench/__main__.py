"""`python -m simpletuner.bench [NAME] [--steps N] [--pictures N] [--device D] [--against FILE] [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from simpletuner.bench.figure import Measured
    from simpletuner.bench.scene import Scene

NAMES = ("overhead", "loader", "cache", "server", "scale", "memory", "checkpoint", "numerics")
"""Of the CPU, also where there is a GPU."""
ON_DEVICE = ("ceiling", "step", "ablate", "compile")
"""Of a GPU, if there is one; on a CPU the same code runs with nano models."""


def main(words: Sequence[str] | None = None) -> int:
    """Prints what was measured; the exit code says nothing about the figures: wall time alone never gates."""
    parser = _parser()
    asked = parser.parse_args(words)
    # Models ship in the package, or are made from configurations.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.name not in ON_DEVICE:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import diffusers
    import torch
    import transformers

    from simpletuner.bench.device import choose
    from simpletuner.bench.figure import as_markdown, check_device, circumstances, compare
    from simpletuner.bench.scene import Scene
    from simpletuner.train.half_on_cpu import fast_half_products

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        device = choose(asked.device if asked.name in ON_DEVICE else "cpu")
        where = circumstances(device)
        before = json.loads(asked.against.read_text()) if asked.against else None
        if before is not None:
            check_device(where, before)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    benchmarks = _benchmarks(asked.steps, device)
    measured: list[Measured] = []
    for name in [asked.name] if asked.name else NAMES:
        with tempfile.TemporaryDirectory(prefix="simpletuner-bench-") as folder, fast_half_products():
            measured.append(benchmarks[name](Scene(Path(folder), asked.pictures)))
    if before is not None:
        compare(measured, where, before)
    if asked.json:
        print(json.dumps({**where, "measured": [found.as_dict() for found in measured]}, indent=1, ensure_ascii=False))
    else:
        print(as_markdown(measured, where))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simpletuner bench")
    parser.add_argument("name", nargs="?", choices=[*NAMES, *ON_DEVICE])
    parser.add_argument("--steps", type=_at_least(2), default=200)
    parser.add_argument("--pictures", type=_at_least(8), default=64)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def _benchmarks(steps: int, device: torch.device) -> dict[str, Callable[[Scene], Measured]]:
    from simpletuner.bench import (
        ablate,
        cache,
        ceiling,
        checkpoint,
        compiling,
        loader,
        memory,
        numerics,
        overhead,
        scale,
        server,
        step,
    )

    return {
        "overhead": lambda scene: overhead.measure(scene, steps),
        "loader": lambda scene: loader.measure(scene, steps),
        "cache": cache.measure,
        "server": server.measure,
        "scale": scale.measure,
        "memory": memory.measure,
        "checkpoint": checkpoint.measure,
        "numerics": lambda scene: numerics.measure(scene, steps),
        "ceiling": lambda scene: ceiling.measure(scene, steps, device),
        "step": lambda scene: step.measure(scene, steps, device),
        "ablate": lambda scene: ablate.measure(scene, steps, device),
        "compile": lambda scene: compiling.measure(scene, device),
    }


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return number

    return read


if __name__ == "__main__":
    sys.exit(main())
