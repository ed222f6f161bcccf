"""The trainer, forked from a process that has its libraries: `warm_trainer.py JOB_DIR`, for SIMPLETUNER_TRAINER.

WARM_TRAINERS names the socket of that process. This one stands for the trainer: it hands signals on, ends as the
trainer ends, and takes it along when it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

from warm import WarmProcess, WarmStart

import simpletuner

MODULES = (
    "warm_trainer",
    "simpletuner.train.run",
    "simpletuner.train.trained_adapter",
    "diffusers.models.transformers.pixart_transformer_2d",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.t5.modeling_t5",
    "transformers.models.clip.modeling_clip",
    "lycoris",
)


@contextmanager
def warm_trainers(**environ: str) -> Iterator[dict[str, str]]:
    """Inside the block, what the environment of a runner needs. `environ` is read by libraries as they are imported."""
    path = str(Path(simpletuner.__file__).parents[1])
    warm = WarmStart(MODULES, os.environ | {"PYTHONPATH": path} | environ)
    yield {"SIMPLETUNER_TRAINER": __file__, "WARM_TRAINERS": warm.address}
    warm.close()


def main() -> int:
    from simpletuner.train.__main__ import main as train

    return train(sys.argv[1])


def _stand_for_it() -> int:
    trainer = WarmProcess(
        os.environ["WARM_TRAINERS"],
        ["warm_trainer", *sys.argv[1:]],
        env=os.environ,
        cwd=Path.cwd(),
        stdout=sys.stdout.buffer,
        stderr=sys.stderr.buffer,
    )
    signal.signal(signal.SIGTERM, lambda number, _: trainer.send_signal(number))
    return trainer.wait()


if __name__ == "__main__":
    raise SystemExit(_stand_for_it())
