"""Where jobs run. An executor launches and says whether what it launched still lives; it holds no truth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import simpletuner
from simpletuner.job import Command, JobDir
from simpletuner.jobs.devices import Device

LOST_AFTER_S = 0.5
"""A lock must be free for this long: askers share it for an instant, a runner needs one to take it."""
SPAWN_GRACE_S = 10.0
"""For a job whose runner never took the lock: perhaps its server died between the lease and the launch."""
PACKAGE_ROOT = Path(simpletuner.__file__).parents[1]


class Executor(Protocol):
    def start(self, job: JobDir, devices: Sequence[Device]) -> None:
        """Launch the runner of the job. Raises OSError when this machine cannot."""
        ...

    def is_alive(self, job: JobDir) -> bool:
        """Whether a runner lives, or one that was launched may yet take the lock."""
        ...

    def refusal(self, job: JobDir) -> str | None:
        """Why no runner ever had it; None where one had. Without, it goes back into the queue as the same attempt."""
        ...

    def lost_after_s(self, job: JobDir) -> float:
        """How long it must look dead without a record before it counts as lost."""
        ...

    def send(self, job: JobDir, command: Command) -> None: ...

    def forget(self, job: JobDir, *, lost: bool) -> None:
        """The attempt is over, in the store too."""
        ...

    def reap(self) -> None:
        """Take leave of children that ended."""
        ...


class LocalExecutor:
    """Spawns runners that outlive this process; their lock tells the next server of them."""

    def __init__(self, environ: Mapping[str, str], *, num_slots: int = 1) -> None:
        self._environ = environ
        self._num_slots = num_slots
        self._children: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, job: JobDir, devices: Sequence[Device]) -> None:
        spec = job.read_spec()
        with job.log_path.open("ab") as log:
            self._children[job.root] = subprocess.Popen(
                [sys.executable, "-m", "simpletuner.jobs.runner", str(job.root)],
                cwd=spec.workspace,
                env=runner_environment(self._environ, devices, num_slots=self._num_slots),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_alive(self, job: JobDir) -> bool:
        child = self._children.get(job.root)
        return (child is not None and child.poll() is None) or job.is_locked()

    def refusal(self, job: JobDir) -> str | None:
        """Spawning it was the beginning."""
        return None

    def lost_after_s(self, job: JobDir) -> float:
        return LOST_AFTER_S if job.lock_path.exists() else SPAWN_GRACE_S

    def send(self, job: JobDir, command: Command) -> None:
        job.send(command)

    def forget(self, job: JobDir, *, lost: bool) -> None:
        """Nothing of it is left here but a child to reap."""

    def reap(self) -> None:
        self._children = {root: child for root, child in self._children.items() if child.poll() is None}


def with_own_code(environ: Mapping[str, str]) -> dict[str, str]:
    """For a process of ours: this code, wherever it was imported from, and never what lies in its working directory."""
    paths = [str(PACKAGE_ROOT), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    absolute = os.pathsep.join(str(Path(path).resolve()) for path in paths)
    return {**environ, "PYTHONPATH": absolute, "PYTHONSAFEPATH": "1"}


def runner_environment(environ: Mapping[str, str], devices: Sequence[Device], *, num_slots: int) -> dict[str, str]:
    """Of a runner and its trainer on `devices`, of a machine that has `num_slots`."""
    found = with_own_code(environ)
    if num_slots > 1 and all(device.kind == "cpu" for device in devices):
        # Slots of one processor share its cores: more threads than cores make every one of them slower.
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_slots)))
    found["CUDA_VISIBLE_DEVICES"] = ",".join(device.visible_id for device in devices if device.kind == "cuda")
    return found
