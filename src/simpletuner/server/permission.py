"""Permissions and the levels that confer them (api.md §2.2). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_VIEWER = "api.access config.view dataset.view job.view.own queue.view system.view"
_RESEARCHER = (
    "job.submit job.cancel.own job.delete.own queue.cancel.own config.create config.edit.own config.delete.own "
    "config.activate dataset.upload api.keys.own"
)
_LEAD = (
    "job.view.all job.cancel.all job.priority.high queue.view.all queue.cancel.all queue.approve config.edit.all "
    "metrics.read audit.view"
)
_ADMIN = (
    "job.hooks queue.manage job.delete.all config.delete.all dataset.delete webhook.manage admin.users admin.levels "
    "admin.settings admin.workers admin.system api.keys.all cloud.manage"
)
ACCESS = "api.access"
ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class UserLevel:
    """`permissions` includes those of the levels below it; `job_priority` is the base of api.md §4."""

    id: int
    name: str
    priority: int
    permissions: frozenset[str]
    job_priority: int


def _build_levels() -> dict[str, UserLevel]:
    held: frozenset[str] = frozenset()
    levels: dict[str, UserLevel] = {}
    rows = (
        ("viewer", 0, _VIEWER, 0),
        ("researcher", 10, _RESEARCHER, 10),
        ("lead", 50, _LEAD, 20),
        (ADMIN, 100, _ADMIN, 30),
    )
    for number, (name, priority, more, job_priority) in enumerate(rows, 1):
        held |= frozenset(more.split())
        levels[name] = UserLevel(number, name, priority, held, job_priority)
    return levels


LEVELS = _build_levels()
PERMISSIONS = LEVELS[ADMIN].permissions


def rights_of(levels: Iterable[str], granted: Iterable[str], denied: Iterable[str]) -> frozenset[str]:
    """(levels + grants − denials); levels that are no longer known confer nothing."""
    held = frozenset(granted).union(*(LEVELS[name].permissions for name in levels if name in LEVELS))
    return held - frozenset(denied)


def base_priority_of(levels: Iterable[str]) -> int:
    """Of the jobs of a user with `levels`, the highest of them."""
    return max((LEVELS[name].job_priority for name in levels if name in LEVELS), default=0)


def within(permissions: Iterable[str], scope: Iterable[str]) -> frozenset[str]:
    """Those that match one of the globs of `scope`."""
    globs = tuple(scope)
    return frozenset(name for name in permissions if any(fnmatchcase(name, glob) for glob in globs))


def holds(permissions: frozenset[str], wanted: str) -> bool:
    """`job.view.*` is held by who holds `job.view.own` or `job.view.all`."""
    if wanted.endswith(".*"):
        stem = wanted.removesuffix("*")
        return f"{stem}own" in permissions or f"{stem}all" in permissions
    return wanted in permissions
