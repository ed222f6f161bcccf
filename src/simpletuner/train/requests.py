"""What the world asks of a running trainer: commands of the job directory, and signals. training.md §6.3."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from simpletuner.errors import ExitCode, UserError
from simpletuner.job import CommandName, CommandReader, JobDir

EndMode = Literal["stop", "cancel", "yield"]
_RANK: dict[EndMode, int] = {"yield": 1, "stop": 2, "cancel": 3}


@dataclass(frozen=True, slots=True)
class Requests:
    """Since the last reading: the ids of checkpoint and validation requests, and how the run is to end, if it is."""

    validate: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    end: EndMode | None = None


class Ended(Exception):
    """Asked to end outside the loop, between two items of work."""

    def __init__(self, mode: EndMode) -> None:
        super().__init__(mode)
        self.mode: EndMode = mode


class RequestReader:
    """Cancel wins over stop, stop over yield, in whichever order they come; SIGTERM and SIGINT mean stop.

    To one of several ranks a signal comes from torchrun, and means that another rank is gone.
    """

    def __init__(self, job: JobDir, *, is_alone: bool = True) -> None:
        self._commands = CommandReader(job)
        self._is_alone = is_alone
        self._is_rank_lost = False
        self._end: EndMode | None = None
        self._validate: list[str] = []
        self._checkpoint: list[str] = []

    def listen_to_signals(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def read(self, settle: Callable[[], None] = lambda: None) -> Requests:
        """Take what has come. Called after an optimizer step only.

        `settle` is called before anything is taken: where it raises, what was asked still waits.
        """
        self._collect()
        if self._validate or self._checkpoint or self._end:
            settle()
        taken = Requests(tuple(self._validate), tuple(self._checkpoint), self._end)
        self._validate.clear()
        self._checkpoint.clear()
        return taken

    def asked_to_end(self) -> EndMode | None:
        """While the loop waits for something; what is asked for stays to be read."""
        self._collect()
        return self._end

    def raise_if_ended(self) -> None:
        """Between items of preparation: stop and cancel act, the other requests wait for the loop.

        Raises Ended, or UserError `rank_lost` (69).
        """
        self._collect()
        if self._end is not None:
            raise Ended(self._end)
        if self._is_rank_lost:
            raise rank_lost("it ended before the first step")

    def _collect(self) -> None:
        for command in self._commands.read():
            match command.command:
                case CommandName.VALIDATE:
                    self._validate.append(command.request_id)
                case CommandName.CHECKPOINT:
                    self._checkpoint.append(command.request_id)
                case CommandName.STOP | CommandName.CANCEL | CommandName.YIELD:
                    self._raise_end(command.command.value)

    def _raise_end(self, mode: EndMode) -> None:
        if self._end is None or _RANK[mode] > _RANK[self._end]:
            self._end = mode

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_alone:
            self._raise_end("stop")
        else:
            self._is_rank_lost = True


def rank_lost(reason: str) -> UserError:
    return UserError(
        "rank_lost",
        f"Another process of this run is gone: {reason}.",
        hint="The log may tell what ended it. The run can go on from its last checkpoint.",
        exit_code=ExitCode.OUTSIDE,
    )
