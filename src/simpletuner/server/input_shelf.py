"""Lists of what jobs on workers need, hashed beside the requests that ask for them."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from simpletuner.errors import UserError
from simpletuner.job import JobDir
from simpletuner.jobs.inputs import InputFile, InputIndex, Place, Told, resume_of, tell
from simpletuner.jobs.leases import Leases

Listing = dict[str, list[InputFile]]


@dataclass(frozen=True, slots=True)
class Asked:
    index: InputIndex
    places: tuple[Place, ...]
    listing: Future[Listing]


class InputShelf:
    """One listing for each job and epoch, as long as its lease lives."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, int], Asked] = {}
        self._hashing = ThreadPoolExecutor(1, "inputs")

    def ask(self, job: JobDir, epoch: int) -> Asked:
        """Begins to list at the first call."""
        key = (job.root.name, epoch)
        with self._lock:
            if key not in self._asked:
                self._asked = {of: asked for of, asked in self._asked.items() if self._leases.is_alive(*of)}
                places = told_of(job).places
                resume = resume_of(job.read_config()["config"], continues=job.read_spec().continues)
                index = InputIndex(job, places, resume)
                self._asked[key] = Asked(index, places, self._hashing.submit(partial(_build, index)))
            return self._asked[key]

    def close(self) -> None:
        self._hashing.shutdown(wait=False, cancel_futures=True)


def told_of(job: JobDir) -> Told:
    return tell(job.read_config()["config"], job.read_datasets())


def _build(index: InputIndex) -> Listing:
    """Raises UserError `input_unreadable`."""
    try:
        return index.build()
    except OSError as error:
        message = f"The server could not read {error.filename}: {error.strerror}."
        raise UserError("input_unreadable", message, hint="Put it back, or submit the job again.") from error
