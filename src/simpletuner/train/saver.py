"""Writes the checkpoints of a run: copied first, so that the run goes on while they are written. docs/adr/0034."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.checkpoints import (
    STATE,
    CheckpointFolder,
    complete_checkpoint,
    prune_checkpoints,
    temporary_folder,
)
from simpletuner.errors import ExitCode, UserError
from simpletuner.events import Checkpoint
from simpletuner.train.checkpoint import OPTIMIZER, ResumePoint, rng_file, versions
from simpletuner.train.host_copies import HostCopies
from simpletuner.train.report import Reporter, StageReport
from simpletuner.train.state import TrainState
from simpletuner.train.trained import Trained
from simpletuner.train.update import Update

Generators = dict[str, Tensor]
"""The state of one rank's, by name."""
_ON_A_CPU = 64_000_000
"""Bytes that copies may take where device and host are one: what a save is predicted to need counts no more."""
_SHARE_OF_FREE = 4
"""Copies of what lies on a GPU take at most this part of the free host memory."""
_ERRORS = (OSError, SafetensorError)
"""safetensors has an error of its own for a full disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """All of a checkpoint but its tensors, as it was at its step; and what follows."""

    step: int
    is_final: bool
    record: str
    readme: str
    generators: Sequence[Generators]
    """Of each rank."""
    request_ids: tuple[str, ...]
    in_use: Callable[[], frozenset[str]]
    """Names of checkpoints that are not removed for it."""
    saved: Callable[[Path], None]
    failed: Callable[[], None]
    started_at: float
    stage: StageReport


class CheckpointSaver:
    """Of one run, one at a time. A full disk costs one save, not the run; the second time in a row it ends it."""

    def __init__(
        self, output_dir: Path, limit: int, facts: Mapping[str, Any], reporter: Reporter, point: ResumePoint | None
    ) -> None:
        self._latest = None if point is None else point.folder.path
        self._output_dir = output_dir
        self._limit = limit
        self._facts = dict(facts)
        self._reporter = reporter
        self._failures = 0
        self._last_bytes = 0
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def latest(self) -> Path | None:
        """The newest complete one of this run, that being written included: it is waited for."""
        self.wait()
        return self._latest

    def save(
        self,
        trained: Trained,
        update: Update,
        state: TrainState,
        generators: Sequence[Generators],
        *,
        saved: Callable[[Path], None],
        failed: Callable[[], None],
        in_use: Callable[[], frozenset[str]],
        request_ids: tuple[str, ...] = (),
        is_final: bool = False,
        beside_training: bool = False,
    ) -> None:
        """`saved` or `failed` is called once, from another thread where it is written `beside_training`.

        Raises UserError `disk_full` (73) when the disk was full the last time too.
        """
        self.wait()
        record = {**state.as_dict(), **self._facts, "layout": update.layout, "versions": versions()}
        save = Save(
            step=state.step, is_final=is_final, record=json.dumps(record, indent=1),
            readme=_readme(state, self._facts), generators=generators, request_ids=request_ids, in_use=in_use,
            saved=saved, failed=failed, started_at=time.monotonic(),
            stage=self._reporter.stage_beside("checkpoint_save", "Saving a checkpoint"),
        )  # fmt: skip
        may_copy = beside_training and not self._failures and self._has_room(update)
        if may_copy and (write := self._copy(trained, update)):
            self._writing = self._thread.submit(self._see_through, save, write)
        else:
            self._see_through(save, lambda folder: _write_now(folder, trained, update))

    def wait(self) -> None:
        """For what is being written. Raises what went wrong that is no trouble with the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _has_room(self, update: Update) -> bool:
        tensors = [*(buffer.weights for buffer in update.buffers), *update.state_tensors().values()]
        needed = sum(tensor.nbytes for tensor in tensors)
        if tensors[0].device.type == "cpu":
            return needed <= _ON_A_CPU
        return needed <= self._copies.num_bytes or needed <= psutil.virtual_memory().available // _SHARE_OF_FREE

    def _copy(self, trained: Trained, update: Update) -> Callable[[Path], None] | None:
        """What writes the copies into a folder."""
        with self._copies.making():
            write_weights = trained.stage(update, self._copies)
            if write_weights is None:
                return None
            state = {name: self._copies.keep(name, tensor) for name, tensor in update.state_tensors().items()}

        def write(folder: Path) -> None:
            write_weights(folder)
            save_file(state, folder / OPTIMIZER)

        return write

    def _see_through(self, save: Save, write: Callable[[Path], None]) -> None:
        folder = None
        try:
            folder = self._write(save, write)
        except _ERRORS as error:
            self._on_failure(save, error)
        finally:
            save.stage.finish() if folder else save.stage.fail()
        if folder:
            self._on_success(save, folder)

    def _write(self, save: Save, write: Callable[[Path], None]) -> CheckpointFolder:
        self._check_space()
        folder = temporary_folder(self._output_dir, save.step)
        try:
            write(folder)
            for rank, tensors in enumerate(save.generators):
                save_file(tensors, folder / rng_file(rank))
            (folder / STATE).write_text(save.record)
            (folder / "README.md").write_text(save.readme)
            return complete_checkpoint(folder, self._output_dir, save.step)
        except _ERRORS:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _check_space(self) -> None:
        free = shutil.disk_usage(self._output_dir).free
        if free < self._last_bytes * 1.1:
            raise OSError(28, f"{free} bytes are free, the last checkpoint took {self._last_bytes}")

    def _on_success(self, save: Save, folder: CheckpointFolder) -> None:
        self._failures, self._last_bytes = 0, folder.size_bytes
        self._latest = folder.path
        event = Checkpoint(
            path=str(folder.path),
            label=folder.name,
            step=save.step,
            is_final=save.is_final,
            bytes=folder.size_bytes,
            seconds=round(time.monotonic() - save.started_at, 3),
        )
        for request_id in save.request_ids or (None,):
            self._reporter.checkpoint(event, request_id)
        # A run that went back to an older step has newer ones beside it: the one just saved stays in any case.
        prune_checkpoints(self._output_dir, self._limit, keep=save.in_use() | {folder.name})
        save.saved(folder.path)

    def _on_failure(self, save: Save, error: OSError | SafetensorError) -> None:
        self._failures += 1
        save.failed()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        message = f"The checkpoint of step {save.step} could not be saved: {reason}."
        hint = f"Make room in {self._output_dir}; earlier checkpoints are whole."
        if self._failures > 1:
            raise UserError("disk_full", message, hint=hint, exit_code=ExitCode.STORAGE) from error
        self._reporter.warn("checkpoint_failed", message, hint=hint)


def _write_now(folder: Path, trained: Trained, update: Update) -> None:
    """From where the tensors are."""
    trained.save(folder, update)
    save_file(update.state_tensors(), folder / OPTIMIZER)


def _readme(state: TrainState, facts: Mapping[str, Any]) -> str:
    return (
        f"# Checkpoint at step {state.step}\n\n"
        f"A {facts['model_type']} fine-tune of {facts['family']} ({facts['base'][0]}, {facts['base'][2]}).\n"
        "The weights open with diffusers, an adapter with peft or lycoris; the other files\n"
        "let the same run go on. `checkpoint_manifest.json` binds all of them by SHA-256.\n"
    )
