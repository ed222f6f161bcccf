"""The README.md that is published with a result: what it is, how it was made, what it draws."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from simpletuner import __version__
from simpletuner.config.train_config import TrainConfig
from simpletuner.events import ValidationImageData
from simpletuner.families.spec import FamilySpec, Flavour

CARD = "README.md"
IMAGES = "model_card_images"
_LICENCES = {"Apache-2.0": "apache-2.0", "CreativeML Open RAIL++-M": "openrail++", "MIT": "mit"}
"""Their names at the hub; any other is `other` there."""


class ModelCard:
    """Follows a run for its newest validation images with a prompt. `adapter`: which one is trained, if one is."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, adapter: str | None) -> None:
        self._config = config
        self._spec = spec
        self._adapter = adapter
        self._images: dict[str, tuple[ValidationImageData, bytes]] = {}

    def metric(self, step: int, name: str, value: float) -> None:
        """Of no interest here."""

    def image(self, data: ValidationImageData, name: str, content: bytes) -> None:
        if data.validation_type == "final" and data.prompt:
            newest = {key: row for key, row in self._images.items() if row[0].global_step == data.global_step}
            self._images = newest | {name: (data, content)}

    def write(self, folder: Path, title: str, step: int) -> list[Path]:
        """The card, and its images beside it."""
        place = folder / IMAGES
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, (_, content) in self._images.items():
            (place / name).write_bytes(content)
        pictures = [(data.prompt, f"{IMAGES}/{name}") for name, (data, _) in self._images.items()]
        (folder / CARD).write_text(self.text(title, step, pictures), encoding="utf-8")
        return [folder / CARD, *(place / name for name in self._images)]

    def text(self, title: str, step: int, pictures: list[tuple[str, str]]) -> str:
        """`pictures`: prompt and path of each."""
        front = yaml.safe_dump(self._front_matter(pictures), sort_keys=False, allow_unicode=True)
        return f"---\n{front}---\n" + "\n".join(self._body(title, step, pictures)) + "\n"

    def _front_matter(self, pictures: list[tuple[str, str]]) -> dict[str, Any]:
        options = self._config.publishing
        task = "image-to-image" if self._flavour.edits_references else "text-to-image"
        licence = _LICENCES.get(self._flavour.licence, "other")
        front: dict[str, Any] = {"license": licence}
        if licence == "other":
            front["license_name"] = self._flavour.licence.lower().replace(" ", "-")
        if base := self._public_base():
            relation = "adapter" if self._adapter else "finetune"
            front |= {"base_model": base, "base_model_relation": relation}
        tags = [task, "diffusers", "simpletuner", self._spec.name, *(["lora"] if self._adapter else [])]
        if not options.model_card_safe_for_work:
            tags.append("not-for-all-audiences")
        front |= {"library_name": "diffusers", "pipeline_tag": task, "tags": tags}
        if pictures:
            front["widget"] = [{"text": prompt, "output": {"url": path}} for prompt, path in pictures]
        return front

    def _body(self, title: str, step: int, pictures: list[tuple[str, str]]) -> Iterator[str]:
        base = self._public_base()
        kind = "An adapter for" if self._adapter else "A fine-tune of"
        yield f"\n# {title}\n"
        yield f"{kind} {self._spec.title}" + (f" ([{base}](https://huggingface.co/{base}))" if base else "") + ","
        yield f"made by {step} steps of SimpleTuner {__version__}.\n"
        if self._config.publishing.model_card_note:
            yield f"{self._config.publishing.model_card_note}\n"
        if pictures:
            yield "## Validation images\n"
        for prompt, path in pictures:
            # Indented, so that nothing in a prompt is read as Markdown.
            yield f"![validation image]({path})\n\n    {' '.join(prompt.split())}\n"
        yield "## Settings\n\n| | |\n|---|---|"
        yield from (f"| {name} | `{value}` |" for name, value in self._settings(step).items() if value is not None)
        yield f"\n## Licence\n\n{self._flavour.licence}, as the base model."

    def _settings(self, step: int) -> dict[str, Any]:
        config = self._config
        run, validation = config.run, config.validation
        found: dict[str, Any] = {
            "flavour": config.model.model_flavour,
            "trained": self._adapter or "all weights",
            "rank": config.adapter.lora_rank if config.adapter.lora_type == "standard" and self._adapter else None,
            "alpha": config.adapter.lora_alpha if config.adapter.lora_type == "standard" and self._adapter else None,
            "steps": step,
            "batch": f"{run.train_batch_size} × {run.gradient_accumulation_steps}",
            "seed": run.seed,
            "optimizer": config.optimizer.optimizer,
            "learning rate": f"{config.optimizer.learning_rate:g}",
            "schedule": f"{config.optimizer.lr_scheduler}, warm-up {config.optimizer.lr_warmup_steps}",
            "precision": f"{config.precision.base_model_precision}, {config.precision.mixed_precision}",
            "moving average": "yes" if config.precision.use_ema else None,
            "datasets": ", ".join(entry.id for entry in config.image_datasets),
            "validation": f"{validation.validation_num_inference_steps} steps, guidance "
            f"{validation.validation_guidance:g}, seed {validation.validation_seed or run.seed}",
        }
        return found

    @property
    def _flavour(self) -> Flavour:
        return self._spec.flavours[self._config.model.model_flavour]

    def _public_base(self) -> str | None:
        """A repository's name; of a folder on this machine nobody is told."""
        base = self._config.model.pretrained_model_name_or_path
        return None if self._flavour.embedded or Path(base).is_absolute() else base
