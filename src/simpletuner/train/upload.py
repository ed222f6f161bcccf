"""`python -m simpletuner.train.upload JOB TARGET FOLDER PLACE MANIFEST`: one upload, in a process of its own.

So it can be ended at any moment, and takes no time from the trainer's interpreter. Its last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import find_faults, hash_file, read_manifest
from simpletuner.config.publish_target import frozen_targets
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import JobDir
from simpletuner.retry import Retry
from simpletuner.train.providers import Provider, open_provider


@dataclass(frozen=True, slots=True)
class Uploaded:
    num_files: int
    bytes: int


def upload(provider: Provider, folder: Path, place: str, manifest: str, retry: Retry) -> Uploaded:
    """Every file of `folder` that its manifest names, the manifest itself last.

    Raises UserError `upload_source_changed` when they are no longer what they were, and `upload_failed`.
    """
    if faults := find_faults(folder, manifest):
        message = f"{folder} is not what it was: {'; '.join(faults[:3])}."
        raise UserError("upload_source_changed", message, exit_code=ExitCode.STORAGE)
    files: dict[str, Any] = dict((read_manifest(folder, manifest) or {})["files"])
    own = folder / manifest
    files[manifest] = {"size": own.stat().st_size, "sha256": hash_file(own)}
    provider.send(folder, files, place, retry)
    return Uploaded(len(files), sum(facts["size"] for facts in files.values()))


def main(job: str, target: str, folder: str, place: str, manifest: str) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    config = JobDir(Path(job)).read_config()["config"]
    try:
        provider = open_provider(frozen_targets(config)[int(target)], private=config["model_card_private"])
        done = upload(provider, Path(folder), place, manifest, Retry())
    except UserError as error:
        print(json.dumps({"reason": str(error)}), flush=True)
        return 1
    print(json.dumps(asdict(done)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
