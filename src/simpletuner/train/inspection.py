"""What happens between steps: checkpoints, images, held-out loss; and the end of a run with its export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from simpletuner.families.base import Draw, Family
from simpletuner.train.best import link_best
from simpletuner.train.disk import DiskWatch
from simpletuner.train.due import Due
from simpletuner.train.external_validation import ExternalValidation
from simpletuner.train.heldout import HeldOut
from simpletuner.train.hooks import AFTER_CHECKPOINT, Hooks
from simpletuner.train.metrics import Metrics
from simpletuner.train.publish import Publisher
from simpletuner.train.ranks import Ranks
from simpletuner.train.report import Reporter
from simpletuner.train.requests import Requests
from simpletuner.train.saver import CheckpointSaver
from simpletuner.train.sentinel import Sentinel
from simpletuner.train.state import TrainState, rng_tensors
from simpletuner.train.trained import Trained
from simpletuner.train.update import Update
from simpletuner.train.validation import Drawing, EmaMode, Validation, Weights, hash_weights, weights_to_draw


@dataclass(slots=True)
class Inspection:
    """Looks at and keeps the weights of the moment. `draw` is built when the first image is asked for."""

    family: Family
    trained: Trained
    update: Update
    validation: Validation
    held_out: list[HeldOut]
    saver: CheckpointSaver
    hooks: Hooks
    publisher: Publisher
    disk: DiskWatch
    external: ExternalValidation
    metrics: Metrics
    sentinel: Sentinel
    reporter: Reporter
    due: Due
    output_dir: Path
    device: torch.device
    ranks: Ranks
    ema_mode: EmaMode = "comparison"
    release: Callable[[], None] = lambda: None
    """Of the other ranks, where what is looked at takes all of them."""
    _draw: Draw | None = field(default=None, init=False)
    _measured: tuple[int, float] | None = field(default=None, init=False)
    """Step and mean of the latest held-out losses."""

    @property
    def denoiser(self) -> nn.Module:
        return self.trained.denoiser

    def checkpoint(self, state: TrainState, requests: Requests) -> None:
        self._save(state, requests)
        self.release()

    def _save(self, state: TrainState, requests: Requests) -> None:
        """Metrics are read first: weights that a non-finite number ended with are never saved.

        Every checkpoint has a held-out loss, so that the best of them is known; only a stop does not wait for one.
        """
        self.metrics.drain()
        generators = self.ranks.gather(rng_tensors())
        if not self.disk.find_room(state.step, self.saver.latest):
            return
        if requests.end is None:
            self.measure(state)
        loss, kept_loss = self._loss_at(state.step), state.best.kept_loss
        is_best = loss is not None and state.best.is_to_keep(loss)
        if is_best:
            state.best.kept_loss = loss
        step, is_final = state.step, self.due.end(state)

        def saved(folder: Path) -> None:
            self.sentinel.saved()
            if loss is not None and is_best:
                link_best(folder, loss, self.reporter)
            self.hooks.start(AFTER_CHECKPOINT, step, folder)
            self.publisher.checkpoint(step, folder)

        def failed() -> None:
            state.best.kept_loss = kept_loss

        self.saver.save(
            self.trained,
            self.update,
            state,
            generators,
            saved=saved,
            failed=failed,
            in_use=lambda: self.hooks.checkpoints_in_use() | self.publisher.checkpoints_in_use(),
            request_ids=requests.checkpoint,
            is_final=is_final,
            beside_training=requests.end is None and not is_final,
        )

    def final_checkpoint(self, state: TrainState) -> None:
        """Of a run that gave up before its last step, where one was due in any case."""
        if self.due.gives_up(state):
            message = f"No lower held-out loss for {state.best.stale} evaluations: the run ends at step {state.step}."
            self.reporter.notify("early_stop", message, hint="checkpoint-best holds the best weights that were saved.")
            is_saved = self.saver.latest is not None and self.saver.latest.name == f"checkpoint-{state.step}"
            if not self.ranks.share(is_saved):
                self.checkpoint(state, Requests())

    def validate(self, state: TrainState, requests: Requests) -> None:
        """The checkpoint of this step is told of first."""
        self.saver.wait()
        self.metrics.drain()
        asked = bool(requests.validate)
        if asked or self.due.images(state):
            self._images(state.step, "request" if asked else "interval", requests.validate)
        if asked or self.due.held_out(state):
            self.measure(state)
        self.release()

    def measure(self, state: TrainState) -> None:
        """The held-out losses, unless this step has them already."""
        if not self.held_out or self._loss_at(state.step) is not None:
            return
        losses: list[float] = []
        for held_out in self.held_out:
            with self.update.averaged():
                found = held_out.measure(self.denoiser)
            self.reporter.metric(f"loss/val/{found.dataset_id}", found.mean, state.step, found.standard_error)
            losses.append(found.mean)
        self._measured = state.step, fmean(losses)
        state.best.see(self._measured[1])

    def forget_losses(self) -> None:
        """The run went back: a step that comes again is another one."""
        self._measured = None

    def _loss_at(self, step: int) -> float | None:
        return self._measured[1] if self._measured is not None and self._measured[0] == step else None

    def on_startup(self, step: int) -> None:
        self._images(step, "startup", ())

    def benchmark(self, base: str) -> None:
        """Images of the untouched base, unless those on disk are of this base and these prompts."""
        record, name = self.validation.benchmark_record, self.validation.benchmark_fingerprint(base)
        if self.validation.is_off or self.external.is_used or (record.exists() and record.read_text() == name):
            self.reporter.skip_stage("benchmark_base_model", "Drawing the base model")
            return
        with self.reporter.stage("benchmark_base_model", "Drawing the base model"):
            fingerprint = hash_weights(self.update)
            drawing = Drawing(step=0, cause="benchmark", fingerprint=fingerprint, kind="benchmark")
            if self.validation.run(self._drawer(), self.denoiser, drawing, [Weights("")]):
                record.write_text(name)

    def export(self) -> Path:
        """Write what was trained for others to open, and re-read it."""
        with self.reporter.stage("model_save", "Saving the model"):
            return self.trained.export(self.output_dir, self.update)

    def final_validation(self, step: int, pipeline: Path) -> None:
        """Drawn from the exported files, so that what is shown is what was saved."""
        if self.external.is_used:
            with self.reporter.stage("final_validation", "Validating elsewhere"):
                self.external.run(step, "end", self.saver.latest)
            return
        if self.validation.is_off:
            self.reporter.skip_stage("final_validation", "Drawing from the saved model")
            return
        with self.reporter.stage("final_validation", "Drawing from the saved model"):
            fingerprint = hash_weights(self.update)
            saved = self.trained.reread(pipeline, self.device)
            draw = self.family.validation_pipeline(saved, self.device)
            drawing = Drawing(step=step, cause="end", fingerprint=fingerprint)
            self.validation.run(draw, saved, drawing, [Weights("")])

    def finish(self) -> None:
        """Uploads first: what follows one is a program of the user's."""
        self.saver.wait()
        self.publisher.finish()
        self.hooks.finish()

    def close(self) -> None:
        """What is being saved is saved: a run that failed later goes on from there."""
        self.saver.close()
        self.validation.close()
        self.publisher.close()
        self.hooks.close()

    def _images(self, step: int, cause: str, request_ids: tuple[str, ...]) -> None:
        if self.external.is_used:
            self.external.run(step, cause, self.saver.latest, request_ids)
            return
        if self.validation.is_off:
            if request_ids:
                drawing = Drawing(step=step, cause=cause, fingerprint="", request_ids=request_ids)
                self.validation.skip(drawing, "Validation is disabled, or there is no prompt.")
            return
        fingerprint = hash_weights(self.update)
        drawing = Drawing(step=step, cause=cause, fingerprint=fingerprint, request_ids=request_ids)
        self.validation.run(self._drawer(), self.denoiser, drawing, weights_to_draw(self.update, self.ema_mode))

    def _drawer(self) -> Draw:
        if self._draw is None:
            self._draw = self.family.validation_pipeline(self.denoiser, self.device)
        return self._draw
