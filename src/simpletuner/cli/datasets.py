"""`simpletuner datasets`: files to a server, and what it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from simpletuner.cli.client import PAGE, Client
from simpletuner.cli.flags import NO_FLAGS, ServerFlags
from simpletuner.cli.refusal import ClientExit
from simpletuner.errors import UserError

FILES_A_REQUEST = 200


def upload(
    target: str,
    files: list[Path],
    /,
    *,
    on_conflict: Literal["error", "skip", "overwrite"] = "error",
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Send files, folders and zip archives into a folder of the server's datasets.

    Parameters
    ----------
    target
        An existing folder under the datasets folder; "" is that folder itself.
    files
        A folder is sent with what is in it, without hidden files; a zip is unpacked by the server.
    on_conflict
        What happens to a file whose name is taken by other bytes.
    """
    archives = [path for path in files if path.suffix.lower() == ".zip" and path.is_file()]
    others = list(_named_files([path for path in files if path not in archives]))
    fields = {"target_path": target, "on_conflict": on_conflict}
    refused = False
    with flags.client() as client:
        for archive in archives:
            with archive.open("rb") as file:
                sent = {"file": (archive.name, file)}
                answer = client.ask("POST", "/api/datasets/upload/zip", data=fields, files=sent)
            refused |= _show(answer, flags)
        for start in range(0, len(others), FILES_A_REQUEST):
            with ExitStack() as stack:
                batch = others[start : start + FILES_A_REQUEST]
                sent = [("files", (name, stack.enter_context(path.open("rb")))) for path, name in batch]
                answer = client.ask("POST", "/api/datasets/upload", data=fields, files=sent)
            refused |= _show(answer, flags)
    return ClientExit.REFUSED if refused else 0


def list_entries(path: str = "", *, flags: ServerFlags = NO_FLAGS) -> int:
    """List a folder of the server's datasets.

    Parameters
    ----------
    path
        Under the datasets folder, absolute or relative.
    """
    with flags.client() as client:
        for page in _pages(client, "/api/datasets/browse", path, "entries"):
            lines = (f"{entry['bytes']:>14}  {entry['kind']:<6}  {entry['path']}" for entry in page["entries"])
            flags.show(page, *lines)
    return 0


def captions(path: str = "", *, set: str | None = None, flags: ServerFlags = NO_FLAGS) -> int:
    """Show the captions of a picture, or of all pictures below a folder; or write one.

    Parameters
    ----------
    path
        Under the datasets folder, absolute or relative.
    set
        New caption of the one picture that `path` names.
    """
    with flags.client() as client:
        if set is not None:
            answer = client.ask("PUT", "/api/datasets/captions", json={path: set})
            return flags.show(answer, f"{answer['changed']} changed")
        for page in _pages(client, "/api/datasets/captions", path, "captions"):
            found = page["captions"].items()
            flags.show(page, *(f"{name}\t{'' if text is None else ' '.join(text.split())}" for name, text in found))
    return 0


def _pages(client: Client, route: str, path: str, field: str) -> Iterator[dict[str, Any]]:
    offset, total = 0, 1
    while offset < total:
        page = client.ask("GET", route, params={"path": path, "limit": PAGE, "offset": offset})
        yield page
        offset, total = offset + PAGE, page["total"]


def _named_files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """With the name that each has below the target. Raises UserError `not_found`."""
    for path in paths:
        if path.is_dir():
            below = sorted(each for each in path.rglob("*") if each.is_file())
            names = ((each, each.relative_to(path).as_posix()) for each in below)
            yield from ((each, name) for each, name in names if not any(part[0] == "." for part in name.split("/")))
        elif path.is_file():
            yield path, path.name
        else:
            raise UserError("not_found", f"There is no {path}.", pointer="/files")


def _show(answer: dict[str, Any], flags: ServerFlags) -> bool:
    """Whether something was refused."""
    counts = f"{answer['files_uploaded']} stored, {answer['files_skipped']} skipped"
    flags.show(answer, f"{counts} in {answer['target_path']}")
    for row in answer["results"]:
        if row["status"] == "error":
            print(f"{row['name']}: {row['reason']}. {row['hint'] or ''}", file=sys.stderr)
    return answer["errors"] > 0
