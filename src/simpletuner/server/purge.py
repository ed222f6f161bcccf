"""Which output folder may be removed together with its job."""

from __future__ import annotations

from pathlib import Path

from simpletuner.errors import UserError
from simpletuner.job import JobStatus
from simpletuner.run_lock import LOCK, read_lock
from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.rights import denied
from simpletuner.server.sight import DELETE
from simpletuner.store.job_row import JobRow


def find_purgeable(core: Core, identity: Identity, job: JobRow) -> Path | None:
    """The job's output folder; None where there is none.

    Raises UserError `path_outside_root` where it holds more than the runs of this job, `permission_denied` where
    others write there too.
    """
    output = Path(job.output_dir).resolve()
    if not output.exists():
        return None
    workspace = core.settings.workspace.resolve()
    kept = {workspace, core.settings.config_dir, core.settings.state_dir, core.settings.datasets_dir}
    if workspace not in output.parents or any(_holds(output, place) for place in kept):
        raise _kept(f"{output} is not an output folder inside {workspace}")
    entries = core.placement.job_dir(job.job_id).read_datasets()
    if any(_holds(output, Path(entry["instance_data_dir"])) for entry in entries if entry.get("instance_data_dir")):
        raise _kept(f"There are pictures of a dataset in {output}")
    others = [
        Path(other.output_dir).resolve()
        for other in core.store.jobs.with_status(JobStatus)
        if not identity.may_to(DELETE, other.user_id)
    ]
    if any(_holds(output, place) or place in output.parents for place in others):
        raise denied(f"{DELETE}.all")
    if not _is_of(job, output):
        raise _kept(f"{output} was not made by this job, or another one runs there now")
    return output


def _holds(folder: Path, place: Path) -> bool:
    place = place.resolve()
    return folder == place or folder in place.parents


def _is_of(job: JobRow, output: Path) -> bool:
    """The latest run in it is the job's."""
    try:
        lock = read_lock(output / LOCK)
    except UserError:
        return False
    return lock.latest_job_id == job.job_id


def _kept(reason: str) -> UserError:
    hint = "Delete the job without purge_output, and the folder by hand."
    return UserError("path_outside_root", f"{reason}: it is kept.", hint=hint)
