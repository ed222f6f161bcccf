"""A measured figure, and how it is told: as a Markdown table or as JSON."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

_RESAMPLES = 2000
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`limit`: what training.md §10 demands. `is_met`: None without a limit, or where noise hides the answer."""

    name: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    limit: str = ""
    is_met: bool | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one benchmark found. `details` are counts behind the figures, for JSON only."""

    benchmark: str
    figures: list[Figure]
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def lower_bound(ratios: Sequence[float]) -> float:
    """95 % lower bound of the median of paired ratios, by bootstrap with a fixed seed."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[int(0.05 * _RESAMPLES)]


def ratio_at_most(name: str, ratios: Sequence[float], most: float, note: str, *, value: float | None = None) -> Figure:
    """Paired ratios against a limit; `value`: theirs, where it is not their median. training.md §10.2."""
    ratio, lower = statistics.median(ratios) if value is None else value, lower_bound(ratios)
    return Figure(
        name=name,
        value=ratio,
        unit="",
        least=min(ratios),
        most=max(ratios),
        limit=f"≤ {most:g}",
        is_met=False if lower > most else True if ratio <= most else None,
        note=f"{note}; 95 % lower bound {lower:.4f}",
    )


def quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def circumstances(device: torch.device = _CPU) -> dict[str, str]:
    """Without which a figure says nothing: device, torch, commit."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"CPU, {_cpu()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


class OtherDevice(ValueError):
    """Figures of two devices say nothing beside each other."""


def check_device(where: dict[str, str], before: dict[str, Any]) -> None:
    """Raises OtherDevice where the JSON report `before` is of another device."""
    if (other := before.get("device")) != where["device"]:
        raise OtherDevice(f"The other report is of {other}, this one of {where['device']}: they are not compared.")


def compare(measured: Sequence[Measured], where: dict[str, str], before: dict[str, Any]) -> None:
    """Put the ratio to an earlier JSON report into the note of each figure that is in both. Raises OtherDevice."""
    check_device(where, before)
    values = {(some["benchmark"], one["name"]): one["value"] for some in before["measured"] for one in some["figures"]}
    for found in measured:
        for index, figure in enumerate(found.figures):
            if value := values.get((found.benchmark, figure.name)):
                told = f"{figure.value / value:.4g} × the {value:.4g} of commit {before['commit']}"
                found.figures[index] = replace(figure, note=f"{figure.note}; {told}" if figure.note else told)


def as_markdown(measured: Sequence[Measured], where: dict[str, str]) -> str:
    lines = [" · ".join(f"{name}: {value}" for name, value in where.items()), ""]
    lines += ["| benchmark | figure | value | min – max | must | met | note |", "|---|---|---|---|---|---|---|"]
    for found in measured:
        lines += [_row(found.benchmark, figure) for figure in found.figures]
    return "\n".join(lines)


def _row(benchmark: str, figure: Figure) -> str:
    span = "" if figure.least is None or figure.most is None else f"{figure.least:.4g} – {figure.most:.4g}"
    met = {None: "unclear" if figure.limit else "", True: "yes", False: "**no**"}[figure.is_met]
    value = f"{figure.value:.4g} {figure.unit}".strip()
    return f"| {benchmark} | {figure.name} | {value} | {span} | {figure.limit} | {met} | {figure.note} |"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the checkout that the package is in; `-dirty` where tracked files differ from it."""
    here = Path(__file__).parent
    is_ours = _git(here, "ls-files", "--error-unmatch", "../__init__.py")
    return (is_ours and _git(here, "describe", "--always", "--dirty")) or "none"


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where it fails or is not installed."""
    try:
        ran = subprocess.run(["git", *words], cwd=folder, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if ran.returncode else ran.stdout.strip()
