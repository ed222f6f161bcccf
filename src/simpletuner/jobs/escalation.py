"""When an asked-for end is not obeyed: what to send to the trainer, and when. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Literal

from simpletuner.job import CommandName

Mode = Literal["yield", "stop", "cancel"]

CANCEL_TERM_S = 2.0
CANCEL_KILL_S = 7.0
STRENGTH: dict[Mode, int] = {"yield": 0, "stop": 1, "cancel": 2}


@dataclass
class Escalation:
    """Cancel overrides stop, stop overrides yield, never the reverse; each request runs its own clock."""

    stop_grace_s: float
    mode: Mode | None = None
    forced: bool = False
    _due: list[tuple[float, signal.Signals]] = field(default_factory=list[tuple[float, signal.Signals]])

    def request(self, command: CommandName, now: float) -> None:
        mode = _mode(command)
        if mode is None or (self.mode is not None and STRENGTH[mode] <= STRENGTH[self.mode]):
            return
        self.mode = mode
        if mode == "cancel":
            self._due = [(now + CANCEL_TERM_S, signal.SIGTERM), (now + CANCEL_KILL_S, signal.SIGKILL)]
        elif not self._due:
            self._due = [(now + self.stop_grace_s, signal.SIGKILL)]

    def next_signal(self, now: float) -> signal.Signals | None:
        """What to send now, once."""
        if not self._due or now < self._due[0][0]:
            return None
        due = self._due.pop(0)[1]
        self.forced = self.forced or due is signal.SIGKILL
        return due


def _mode(command: CommandName) -> Mode | None:
    modes: dict[CommandName, Mode] = {
        CommandName.STOP: "stop",
        CommandName.CANCEL: "cancel",
        CommandName.YIELD: "yield",
    }
    return modes.get(command)
