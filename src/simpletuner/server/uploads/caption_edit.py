"""One change to many captions: words replaced, put in front or behind, or filled in where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from simpletuner.errors import UserError
from simpletuner.server.uploads.contents import MOST_CAPTION_BYTES, read_caption
from simpletuner.server.uploads.places import shown_text

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class CaptionEdit:
    """Each line of a caption is a variant of its own. What a line begins or ends with already is not added again:
    the same edit twice is the edit once, as long as `replace` does not contain `find`."""

    find: str = ""
    replace: str = ""
    prefix: str = ""
    suffix: str = ""
    fill: str = ""
    """The caption of pictures that have none, or an empty one; the rest of the edit changes it too."""

    def apply(self, caption: str | None) -> str | None:
        """None: there is no caption, and none is to be made."""
        text = caption if caption and caption.strip() else self.fill
        if not text:
            return caption
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(map(self._edit, lines)) + ("\n" if text.endswith("\n") else "")

    def _edit(self, line: str) -> str:
        if self.find:
            line = line.replace(self.find, self.replace)
        if not line.startswith(self.prefix):
            line = self.prefix + line
        return line if line.endswith(self.suffix) else line + self.suffix


@dataclass(frozen=True, slots=True)
class CaptionChange:
    picture: Path
    before: str | None
    after: str


def plan_changes(pictures: Iterable[Path], edit: CaptionEdit) -> list[CaptionChange]:
    """The captions that would not stay as they are. Raises UserError `invalid_field` for one that cannot be read
    whole: writing it would lose the rest."""
    changes: list[CaptionChange] = []
    for picture in pictures:
        before = read_caption(picture)
        if before is not None and (_UNDECODABLE in before or len(before.encode()) >= MOST_CAPTION_BYTES):
            message = (
                f"The caption of {shown_text(picture.name)} is not UTF-8, or longer than {MOST_CAPTION_BYTES} bytes."
            )
            raise UserError("invalid_field", message, hint="Mend that file by hand first.", pointer="/path")
        after = edit.apply(before)
        if after is not None and after != before:
            changes.append(CaptionChange(picture, before, after))
    return changes
