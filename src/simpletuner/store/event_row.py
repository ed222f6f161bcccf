"""An event as the table holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """`body` is the author's JSON; `index` and `id` were given here."""

    index: int
    id: str
    job_id: str | None
    type: str
    body: str

    def as_dict(self) -> dict[str, Any]:
        """The event as api.md §3 shows it; media are still references."""
        return {"index": self.index, "schema": 1, "id": self.id, **json.loads(self.body)}

    def as_text(self) -> str:
        """The same as JSON, without reading the body: its own keys never include these, and there is always a type."""
        return f'{{"index":{self.index},"schema":1,"id":{json.dumps(self.id)},{self.body[1:]}'
