"""A workspace with a configs directory, a dataset file and a folder of pictures, and short ways to resolve in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.config.directories import Directories
from simpletuner.config.resolve import Resolution, resolve
from simpletuner.config.sources import Layer, layer_from_argv, layer_from_mapping, layer_from_pairs
from simpletuner.config.train_config import option_fields
from simpletuner.errors import Problem

BASE: dict[str, Any] = {
    "model_family": "pixart_sigma",
    "data_backend_config": "data.json",
    "max_train_steps": 10,
    "output_dir": "out",
}


class Place:
    def __init__(self, root: Path) -> None:
        self.workspace = root / "workspace"
        self.config = root / "config"
        self.pictures = self.workspace / "pictures"
        self.pictures.mkdir(parents=True)
        self.config.mkdir()
        Image.new("RGB", (64, 64)).save(self.pictures / "a.png")
        (self.pictures / "a.txt").write_text("a picture")
        self.directories = Directories(self.workspace, self.config)
        self.write_datasets([self.entry()])

    def entry(self, **keys: Any) -> dict[str, Any]:
        return {"id": "pictures", "instance_data_dir": "pictures"} | keys

    def write_datasets(self, entries: Any, name: str = "data.json") -> None:
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (self.workspace / name).write_text(text)

    def object(self, values: dict[str, Any], name: str = "request") -> Layer:
        return layer_from_mapping(values, name=name, known=option_fields())

    def resolve(self, *layers: Layer, for_start: bool = False, **options: Any) -> Resolution:
        """Of BASE as the lowest layer, `layers`, and `options` as the request."""
        base = self.object(BASE, "environment:base")
        return resolve([base, *layers, self.object(options)], self.directories, for_start=for_start)

    def argv(self, words: Sequence[str]) -> Resolution:
        return self.resolve(layer_from_argv(words, name="request", known=option_fields()))

    def form(self, *pairs: tuple[str, str]) -> Resolution:
        return self.resolve(layer_from_pairs(pairs, name="request", known=option_fields()))

    def with_datasets(self, entries: Any, **options: Any) -> Resolution:
        self.write_datasets(entries)
        return self.resolve(**options)


def errors(found: Resolution) -> dict[str, str]:
    """Pointer → code of the errors."""
    return {problem.pointer: problem.code for problem in found.errors}


def warnings(found: Resolution, *, beside: Sequence[str] = ()) -> dict[str, str]:
    return {problem.pointer: problem.code for problem in found.warnings if problem.code not in beside}


def only(problems: Sequence[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]
