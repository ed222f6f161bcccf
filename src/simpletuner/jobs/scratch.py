"""Runs that prove something: of a frozen configuration, in a folder of their own, telling nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from simpletuner.errors import ExitCode, UserError
from simpletuner.job import JobDir, JobSpec
from simpletuner.jobs.executor import PACKAGE_ROOT
from simpletuner.jobs.runner import TRAINER_MODULE, launcher, read_verdict, trainer_defaults
from simpletuner.process import die_with_parent

QUIET: dict[str, Any] = {
    "webhook_config": None,
    "report_to": "none",
    "post_checkpoint_script": None,
    "post_upload_script": None,
    "disk_low_threshold": None,
    "publishing_config": None,
    "push_to_hub": False,
    "push_checkpoints_to_hub": False,
    "validation_method": "simpletuner-local",
    "validation_external_script": None,
    "validation_disable": True,
    "validation_on_startup": False,
    "validation_preview": False,
    "disable_benchmark": True,
    "eval_loss_disable": True,
}
"""What such a run leaves out. Nothing of it takes part in a step."""


class Scratch:
    """Starts trainers without server or runner; each ends with this process. Caches are those of the configuration."""

    def __init__(self, folder: Path, *, config: dict[str, Any], datasets: list[Any], workspace: str) -> None:
        """`config` and `datasets` as they are frozen for a job."""
        self.folder = folder
        self._config = config
        self._datasets = datasets
        self._workspace = workspace
        self._num_processes: int = config.get("num_processes", 1)
        self._num_jobs = 0

    def overrides(self, output: str, **options: Any) -> dict[str, Any]:
        """All that differs from the configuration."""
        return {
            **{name: value for name, value in QUIET.items() if name in self._config},
            "output_dir": str(self.folder / output),
            "resume_from_checkpoint": "latest",
            **options,
        }

    def job(self, output: str, **options: Any) -> JobDir:
        """Writes into `<folder>/<output>`."""
        self._num_jobs += 1
        overrides = self.overrides(output, **options)
        job_id = f"{output}-{self._num_jobs}"
        spec = JobSpec(
            job_id=job_id,
            workspace=self._workspace,
            config_dir=self._workspace,
            output_dir=overrides["output_dir"],
            num_processes=self._num_processes,
        )
        root = self.folder / "jobs" / job_id
        return JobDir.create(root, spec, config=self._config | overrides, provenance={}, datasets=self._datasets)

    def run(self, job: JobDir, cut: tuple[int, Literal["kill", "cancel"]] | None = None) -> None:
        """To its end, or just before the micro-step `cut`. Raises the UserError of a run that failed."""
        module = TRAINER_MODULE if cut is None else f"{TRAINER_MODULE}.cut"
        launch = launcher(self._num_processes)
        words = [sys.executable, *launch, "-m", module, str(job.root), *map(str, cut or ())]
        paths = [str(PACKAGE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        with job.log_path.open("ab") as log:
            trainer = subprocess.Popen(
                words,
                cwd=self._workspace,
                env=trainer_defaults(self._num_processes) | os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                # Safe here: this process has one thread.
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509
            )
        try:
            code = trainer.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGKILL)
        if code != self._expected(cut):
            raise _failure(job, code)

    def _expected(self, cut: tuple[int, str] | None) -> int:
        """torchrun ends with 1 when a rank was killed, with 0 when it was asked to end."""
        is_alone = self._num_processes == 1
        if cut is None:
            return ExitCode.DONE
        if cut[1] == "kill":
            return -signal.SIGKILL if is_alone else 1
        return ExitCode.STOPPED if is_alone else ExitCode.DONE


def _failure(job: JobDir, code: int) -> UserError:
    verdict = read_verdict(job.journal_path, 0, attempt=1)
    if verdict.error_code is None:
        tail = "\n".join(job.log_path.read_text(errors="replace").splitlines()[-20:])
        message = f"The trainer ended with {code} where {job.root.name} was to go on."
        return UserError("trainer_failed", message, hint=tail, exit_code=ExitCode.BUG)
    known = code if code in set(ExitCode) else ExitCode.BUG
    return UserError(verdict.error_code, verdict.message or "", hint=verdict.hint or "", exit_code=ExitCode(known))
