"""One picture of how validation images changed: a row for each prompt, a column for each step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from simpletuner.checkpoints import BEST
from simpletuner.events import Event, EventType, Media, NoticeData
from simpletuner.train.report import Reporter

NAME = "comparison.png"
_STEP = re.compile(r"step_(\d+)_(.+)_(\d+)_(\d+x\d+)((?:_ema)?)\.(?:png|webp|jpeg)")
_BASE = re.compile(r"(.+)_(\d+)_(\d+x\d+)\.(?:png|webp|jpeg)")
_CELL, _LINE = 192, 18
_MOST_COLUMNS = 10
_BASE_MODEL = 0


class Row(NamedTuple):
    shortname: str
    number: int
    size: str
    suffix: str = ""


def find_images(output_dir: Path) -> dict[Row, dict[int, Path]]:
    """Each row's image files by step; those of the untouched base model are at step 0."""
    found: dict[Row, dict[int, Path]] = {}
    for path in _files(output_dir / "validation_images"):
        if match := _STEP.fullmatch(path.name):
            row = Row(match[2], int(match[3]), match[4], match[5])
            found.setdefault(row, {})[int(match[1])] = path
    for path in _files(output_dir / "benchmarks" / "base_model"):
        if (match := _BASE.fullmatch(path.name)) and (row := Row(match[1], int(match[2]), match[3])) in found:
            found[row][_BASE_MODEL] = path
    return dict(sorted(found.items()))


def choose_columns(steps: list[int], wanted: int | None) -> list[int]:
    """The first, the last and the `wanted` one, and of the others some that lie evenly between them."""
    if len(steps) <= _MOST_COLUMNS:
        return steps
    last = len(steps) - 1
    chosen = {round(place * last / (_MOST_COLUMNS - 2)) for place in range(_MOST_COLUMNS - 1)}
    return sorted({steps[index] for index in chosen} | ({wanted} & set(steps) if wanted is not None else set()))


def write_sheet(output_dir: Path) -> Path | None:
    """`comparison.png` in the output folder; None where there are no images of two steps to compare."""
    rows = find_images(output_dir)
    steps = sorted({step for files in rows.values() for step in files})
    if len(steps) < 2:
        return None
    best = _best_step(output_dir)
    columns = choose_columns(steps, best)
    sheet = Image.new("RGB", (len(columns) * _CELL, _LINE + len(rows) * (_CELL + _LINE)), "white")
    write = ImageDraw.Draw(sheet)
    for place, step in enumerate(columns):
        label = "base model" if step == _BASE_MODEL else f"step {step}" + (" (best)" if step == best else "")
        write.text((place * _CELL + 4, 3), label, fill="black")
    for line, (row, files) in enumerate(rows.items()):
        top = _LINE + line * (_CELL + _LINE)
        write.text((4, top + 3), f"{row.shortname}{row.suffix} {row.number} {row.size}", fill="grey")
        for place, step in enumerate(columns):
            if step in files:
                _paste(sheet, files[step], place * _CELL, top + _LINE)
    sheet.save(output_dir / NAME)
    return output_dir / NAME


def publish_sheet(output_dir: Path, artifacts: Path, reporter: Reporter) -> None:
    """The sheet in the output folder and among the job's artifacts, with a notice."""
    path = write_sheet(output_dir)
    if path is None:
        return
    (artifacts / NAME).write_bytes(path.read_bytes())
    with Image.open(path) as sheet:
        media = Media(artifact_id=NAME, mime_type="image/png", width=sheet.width, height=sheet.height)
    message = f"Validation images side by side: {path}."
    data = NoticeData(code="comparison_sheet")
    reporter.emit(
        Event(type=EventType.NOTIFICATION, title="Comparison sheet", message=message, data=data, images=[media])
    )


def _paste(sheet: Image.Image, file: Path, left: int, top: int) -> None:
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    # Small pictures are enlarged in whole pixels, so that what is seen is what was drawn.
    grows = max(small.size) * 2 <= _CELL
    factor = (_CELL - 4) // max(small.size) if grows else (_CELL - 4) / max(small.size)
    size = max(1, round(small.width * factor)), max(1, round(small.height * factor))
    kind = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    sheet.paste(small.resize(size, kind), (left + 2, top + 2))


def _best_step(output_dir: Path) -> int | None:
    link = output_dir / BEST
    return int(link.resolve().name.removeprefix("checkpoint-")) if link.exists() else None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
