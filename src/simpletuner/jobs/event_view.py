"""Events as clients see them: with URLs for their media, or with the media themselves."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from simpletuner.store.event_row import StoredEvent

Images = Literal["inline", "url"]

INLINE_BYTES = 16 * 2**20
MEDIA = ("images", "videos", "audios")
_MEDIUM = '"artifact_id"'
"""In the body of each event that has media."""


class EventView:
    """`images` "inline" puts the bytes of each medium into its `src` as a data URI."""

    def __init__(self, jobs_root: Path, images: Images) -> None:
        self._jobs_root = jobs_root
        self._inline = images == "inline"

    def show(self, event: StoredEvent) -> dict[str, Any]:
        body = event.as_dict()
        for _, medium in media_of(body):
            self._complete(event, medium)
        return body

    def show_text(self, event: StoredEvent) -> str:
        """The same as JSON; as it is stored where there are no media, which is nearly always."""
        if _MEDIUM not in event.body:
            return event.as_text()
        return json.dumps(self.show(event), ensure_ascii=False, separators=(",", ":"))

    def show_page(self, events: Iterable[StoredEvent]) -> tuple[list[str], int | None]:
        """JSON of the events that fit into one answer, and the index of the first that did not."""
        shown: list[str] = []
        room = INLINE_BYTES
        for event in events:
            room -= self._inline_bytes(event)
            if room < 0 and shown:
                return shown, event.index
            shown.append(self.show_text(event))
        return shown, None

    def _inline_bytes(self, event: StoredEvent) -> int:
        if not self._inline or _MEDIUM not in event.body:
            return 0
        files = (self._file(event, medium) for _, medium in media_of(event.as_dict()))
        # Base64 makes four characters of three bytes.
        return sum(file.stat().st_size * 4 // 3 for file in files if file is not None)

    def _complete(self, event: StoredEvent, medium: dict[str, Any]) -> None:
        medium["url"] = artifact_url(event.job_id or "", medium["artifact_id"])
        file = self._file(event, medium)
        if file is None:
            medium["missing"] = True
        elif self._inline:
            content = base64.b64encode(file.read_bytes()).decode()
            medium["src"] = f"data:{medium['mime_type']};base64,{content}"

    def _file(self, event: StoredEvent, medium: dict[str, Any]) -> Path | None:
        return find_artifact(self._jobs_root / (event.job_id or ""), medium["artifact_id"])


def media_of(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kind and the reference of each medium of an event."""
    for kind in MEDIA:
        for medium in body.get(kind) or ():
            yield kind, medium


def artifact_url(job_id: str, artifact_id: str) -> str:
    return f"/api/jobs/{job_id}/artifacts/{artifact_id}"


def find_artifact(job_root: Path, artifact_id: str) -> Path | None:
    """An artifact's id is its file name; anything that would leave the folder is not found."""
    file = job_root / "artifacts" / artifact_id
    return file if Path(artifact_id).name == artifact_id and file.is_file() and not file.is_symlink() else None
