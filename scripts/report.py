"""The demo's pictures: a contact sheet of validation images before and after, and a loss plot."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

_CELL = 160
_MARGIN = 24


def write_contact_sheet(output: Path, names: list[str], target: Path) -> Path:
    """Two rows, base model and latest step, one column per prompt, same seed in both."""
    latest = max(int(path.name.split("_")[1]) for path in (output / "validation_images").iterdir())
    rows = {
        "before": [_find(output / "benchmarks" / "base_model", f"{name}_0_") for name in names],
        f"after {latest} steps": [_find(output / "validation_images", f"step_{latest}_{name}_0_") for name in names],
    }
    sheet = Image.new("RGB", (len(names) * _CELL, len(rows) * (_CELL + _MARGIN)), "white")
    write = ImageDraw.Draw(sheet)
    for row, (label, files) in enumerate(rows.items()):
        top = row * (_CELL + _MARGIN)
        for column, (name, file) in enumerate(zip(names, files, strict=True)):
            picture = Image.open(file).resize((_CELL - 8, _CELL - 8), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * _CELL + 4, top + _MARGIN))
            write.text((column * _CELL + 6, top + 6), f"{label}: {name}", fill="black")
    sheet.save(target)
    return target


def write_loss_plot(metrics: Path, target: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else 0.9 * smooth[-1] + 0.1 * loss)
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(steps, losses, alpha=0.3, label="loss")
    axes.plot(steps, smooth, label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _find(folder: Path, prefix: str) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith(prefix))
