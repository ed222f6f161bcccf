"""`simpletuner shutdown`."""

from __future__ import annotations

from typing import Literal

from simpletuner.cli.flags import NO_FLAGS, ServerFlags


def shutdown(*, jobs: Literal["keep", "stop", "cancel"] = "keep", flags: ServerFlags = NO_FLAGS) -> int:
    """End a server.

    Parameters
    ----------
    jobs
        What becomes of its jobs: they go on without it, stop with a checkpoint, or are cancelled.
    """
    with flags.client() as client:
        answer = client.ask("POST", "/api/system/shutdown", params={"jobs": jobs})
    return flags.show(answer, answer["message"])
