"""Uploads of a run's checkpoints and of its result: beside training, one at a time, each in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from simpletuner.checkpoints import MANIFEST, write_manifest
from simpletuner.config.lycoris import FILE
from simpletuner.config.publish_target import Target, frozen_targets
from simpletuner.config.script import LOCAL_CHECKPOINT
from simpletuner.config.train_config import TrainConfig
from simpletuner.events import HookData, UploadData
from simpletuner.job import JobDir
from simpletuner.train.hooks import AFTER_UPLOAD, Hooks
from simpletuner.train.model_card import ModelCard
from simpletuner.train.program import Program, Programs
from simpletuner.train.report import Reporter
from simpletuner.train.requests import EndMode

RESULT_MANIFEST = "publish_manifest.json"
_LIMIT_S = 86400.0
_WORDS = [sys.executable, "-P", "-m", "simpletuner.train.upload", "{job}", "{target}", f"{{{LOCAL_CHECKPOINT}}}"]


class Publisher:
    """Starts an upload to every target; what becomes of it is an event, and never ends the run."""

    def __init__(
        self,
        job: JobDir,
        config: TrainConfig,
        card: ModelCard,
        hooks: Hooks,
        reporter: Reporter,
        asked_to_end: Callable[[], EndMode | None],
    ) -> None:
        self._job = job
        self._targets = frozen_targets(config.to_flat())
        self._card = card
        self._hooks = hooks
        self._reporter = reporter
        # One at a time: they share the line, and commits to a repository must not overtake each other.
        self._programs = Programs("upload", 1, asked_to_end)
        reporter.followers.append(card)

    def checkpoint(self, step: int, folder: Path) -> None:
        for number, target in enumerate(self._targets):
            if target.checkpoints:
                self._start(number, folder, folder.name, MANIFEST, step, is_final=False)

    def publish(self, step: int, exported: Path) -> None:
        """The export with its card; then every upload is waited for, unless the run is asked to end."""
        if not self._targets:
            self._reporter.skip_stage("publish", "Publishing")
            return
        with self._reporter.stage("publish", "Publishing") as stage:
            folder = self._prepare(step, exported)
            for number in range(len(self._targets) if folder else 0):
                self._start(number, folder or exported, "", RESULT_MANIFEST, step, is_final=True)
            total = self._programs.count
            self._programs.wait_for_all(lambda done: stage.advance(done, total))

    def finish(self) -> None:
        """Wait for all of them; a stop gives them a moment. Afterwards none is left."""
        self._programs.wait_for_all()
        self._programs.close()

    def close(self) -> None:
        """Abandon whatever runs or waits."""
        self._programs.close()

    def checkpoints_in_use(self) -> frozenset[str]:
        return self._programs.checkpoints_in_use()

    def _prepare(self, step: int, exported: Path) -> Path | None:
        """The folder of what is published, with card and manifest in it."""
        folder = exported if exported.is_dir() else exported.parent
        title = Path(self._job.read_spec().output_dir).name
        try:
            written = self._card.write(folder, title, step)
            files = sorted({*_result_files(exported), *written} - {folder / RESULT_MANIFEST})
            write_manifest(folder, files, step, RESULT_MANIFEST)
        except OSError as error:
            message = f"The result cannot be made ready for publishing: {error}."
            self._reporter.warn("publishing_failed", message, hint=f"It lies whole in {exported}.")
            return None
        return folder

    def _start(self, number: int, folder: Path, place: str, manifest: str, step: int, *, is_final: bool) -> None:
        target = self._targets[number]
        values = {LOCAL_CHECKPOINT: str(folder), "job": str(self._job.root), "target": str(number)}
        program = Program("publish", [*_WORDS, place, manifest], values, _LIMIT_S)
        label = "result" if is_final else place
        tell = partial(self._tell, target, folder, label=label, url=target.url(place), step=step, is_final=is_final)
        self._programs.start(program, tell)

    def _tell(self, target: Target, folder: Path, ended: HookData, **facts: Any) -> None:
        """At the end of an upload, in the thread that waited for it."""
        said = _last_line(ended.output_tail)
        if ended.status == "completed":
            facts |= {"num_files": said.get("num_files", 0), "bytes": said.get("bytes", 0)}
        else:
            facts["reason"] = said.get("reason") or f"It said nothing ({ended.status}, exit code {ended.exit_code})."
        status = "failed" if ended.status == "timed_out" else ended.status
        data = UploadData(provider=target.provider, status=status, seconds=ended.seconds, **facts)
        self._reporter.upload(data)
        if status == "completed":
            self._hooks.start(AFTER_UPLOAD, data.step, folder, remote=data.url)


def _result_files(exported: Path) -> list[Path]:
    """Of a pipeline the whole folder; of an adapter its files, not the checkpoints beside them."""
    folders = [exported] if exported.is_dir() else [exported.parent / "ema", exported.parent / "export"]
    files = [] if exported.is_dir() else [exported, exported.parent / FILE]
    files += [path for folder in folders for path in folder.rglob("*")]
    return [path for path in files if path.is_file()]


def _last_line(output: str) -> dict[str, Any]:
    """What `train.upload` said; the words of a program that broke are its reason."""
    last = ([line for line in output.splitlines() if line.strip()] or [""])[-1]
    try:
        said = json.loads(last)
    except ValueError:
        said = None
    return cast(dict[str, Any], said) if isinstance(said, dict) else {"reason": last[-500:]}
