"""Drawing validation images with the weights of the moment. A pass that fails is an event, not the end of the run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from simpletuner.config.prompt import Picture
from simpletuner.config.validation_options import ValidationOptions
from simpletuner.errors import UserError
from simpletuner.events import ValidationData, ValidationImageData
from simpletuner.families.base import Draw, ImageRequest
from simpletuner.train.preview import Previews
from simpletuner.train.references import Reference
from simpletuner.train.report import Reporter, StageReport
from simpletuner.train.update import Update

EmaMode = Literal["comparison", "ema_only", "none"]
ValidationStatus = Literal["started", "completed", "skipped", "failed"]
_MIME = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


@dataclass(frozen=True, slots=True)
class Weights:
    """A set of weights to draw with: file suffix, and a block inside which the denoiser holds them."""

    suffix: str
    hold: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Why and when a pass is drawn; `fingerprint` names the weights, `request_ids` those who asked."""

    step: int
    cause: str
    fingerprint: str
    kind: Literal["final", "benchmark"] = "final"
    request_ids: tuple[str, ...] = ()


class Validation:
    """Draws every planned picture; `prompts` maps a text to its embeddings."""

    def __init__(
        self,
        options: ValidationOptions,
        pictures: list[Picture],
        prompts: Mapping[str, dict[str, Tensor]],
        output_dir: Path,
        reporter: Reporter,
        references: Sequence[Reference] = (),
        previews: Previews | None = None,
    ) -> None:
        self._options = options
        self._pictures = pictures
        self._prompts = prompts
        self._references = references
        self._previews = previews
        self._output_dir = output_dir
        self._reporter = reporter

    def close(self) -> None:
        if self._previews is not None:
            self._previews.close()

    @property
    def is_off(self) -> bool:
        return self._options.validation_disable or not self._pictures

    def run(self, draw: Draw, denoiser: nn.Module, drawing: Drawing, weights: list[Weights]) -> bool:
        """All pictures with each of `weights`; whether all were drawn.

        Training's randomness and the module's mode are as before.
        """
        self._say(drawing, "started")
        started_at = time.monotonic()
        training, device = denoiser.training, next(denoiser.parameters()).device
        drawn: list[Path] = []
        try:
            denoiser.eval()
            with (
                self._reporter.stage("validation", "Drawing validation images") as stage,
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.inference_mode(),
            ):
                for kept in weights:
                    with kept.hold():
                        self._draw_pictures(draw, drawing, kept.suffix, drawn, stage, len(weights))
        except (RuntimeError, ValueError, OSError, UserError) as error:
            self._reporter.fail_stages("validation")
            self._say(drawing, "failed", num_images=len(drawn), reason=f"Validation failed: {error}")
            return False
        finally:
            denoiser.train(training)
        self._say(drawing, "completed", num_images=len(drawn), seconds=round(time.monotonic() - started_at, 3))
        return True

    def _draw_pictures(
        self, draw: Draw, drawing: Drawing, suffix: str, drawn: list[Path], stage: StageReport, rounds: int
    ) -> None:
        for picture in self._pictures:
            drawn.append(self._draw(draw, picture, drawing, suffix))
            stage.advance(len(drawn), len(self._pictures) * rounds)

    def skip(self, drawing: Drawing, reason: str) -> None:
        self._say(drawing, "skipped", reason=reason)

    def _draw(self, draw: Draw, picture: Picture, drawing: Drawing, suffix: str) -> Path:
        options = self._options
        steps = options.validation_num_inference_steps
        request = ImageRequest(
            prompt=self._prompts[picture.prompt.text],
            negative=self._prompts[options.validation_negative_prompt],
            width=picture.width,
            height=picture.height,
            steps=steps,
            guidance=options.validation_guidance,
            seed=picture.seed,
        )
        reference = None if picture.reference is None else self._references[picture.reference]
        if reference is not None:
            request = replace(request, references=reference.latents)
        data = ValidationImageData(
            step=steps,
            timestep=0.0,
            resolution=(picture.width, picture.height),
            validation_type=drawing.kind,
            prompt=picture.prompt.text,
            step_label=f"{steps}/{steps}",
            global_step=drawing.step,
            shortname=picture.prompt.shortname + suffix,
            index=picture.index,
        )
        if self._previews is not None:
            request = replace(request, watch=self._previews.watch(data))
        image = draw(request)
        if self._previews is not None:
            self._previews.finish()
        file = self._file(picture, drawing, suffix)
        write_image(image, file, self._facts(picture, drawing, reference), options.validation_image_quality)
        self._reporter.image(data, file.name, file.read_bytes(), _MIME[options.validation_image_format])
        return file

    def _facts(self, picture: Picture, drawing: Drawing, reference: Reference | None) -> dict[str, Any]:
        """What the image's file says of how it was made."""
        options = self._options
        facts = {
            "prompt": picture.prompt.text,
            "negative_prompt": options.validation_negative_prompt,
            "seed": picture.seed,
            "steps": options.validation_num_inference_steps,
            "guidance": options.validation_guidance,
            "global_step": drawing.step,
            "weights": drawing.fingerprint,
        }
        return facts if reference is None else {**facts, "reference": reference.sample}

    def _file(self, picture: Picture, drawing: Drawing, suffix: str) -> Path:
        size = f"{picture.width}x{picture.height}"
        name = f"{picture.prompt.shortname}_{picture.index}_{size}{suffix}.{self._options.validation_image_format}"
        if drawing.kind == "benchmark":
            return self._output_dir / "benchmarks" / "base_model" / name
        return self._output_dir / "validation_images" / f"step_{drawing.step}_{name}"

    def _say(self, drawing: Drawing, status: ValidationStatus, **facts: Any) -> None:
        data = ValidationData(status=status, step=drawing.step, cause=drawing.cause, **facts)
        for request_id in drawing.request_ids or (None,):
            self._reporter.validation(data, request_id)

    def benchmark_fingerprint(self, base: str) -> str:
        """Names the base images: as long as it holds, they need not be drawn again."""
        rows = [(p.prompt.text, p.width, p.height, p.seed, p.reference) for p in self._pictures]
        options = self._options
        samples = [reference.sample for reference in self._references]
        facts = [base, rows, samples, options.validation_num_inference_steps, options.validation_guidance]
        facts += [
            options.validation_negative_prompt,
            options.validation_noise_scheduler,
            options.validation_image_format,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def benchmark_record(self) -> Path:
        return self._output_dir / "benchmarks" / "base_model" / "benchmark.json"


def weights_to_draw(update: Update, mode: EmaMode) -> list[Weights]:
    """Trained weights, their moving average, or both."""
    trained = Weights("", update.averaged)
    if update.ema is None or mode == "none":
        return [trained]
    average = Weights("_ema", update.ema.in_place)
    return [average] if mode == "ema_only" else [trained, average]


def hash_weights(update: Update) -> str:
    """SHA-256 of the trained weights."""
    digest = hashlib.sha256()
    with update.averaged():
        for buffer in update.buffers:
            digest.update(buffer.weights.detach().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_image(image: Image.Image, file: Path, facts: Mapping[str, object], quality: int) -> None:
    """PNG and WebP/JPEG carry `facts` as text (PNG chunk, EXIF comment)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, ensure_ascii=False)
    if file.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("simpletuner", text)
        image.save(file, pnginfo=info)
        return
    exif = Image.Exif()
    exif[0x9286] = text
    image.save(file, quality=quality, exif=exif)
