"""`simpletuner schema`."""

from __future__ import annotations

import json

from simpletuner.cli.flags import NO_FLAGS, ServerFlags
from simpletuner.config.export import json_schema


def schema(*, flags: ServerFlags = NO_FLAGS) -> int:
    """Print the JSON schema of all options: of the server that SIMPLETUNER_URL or --url names, else of this version."""
    if flags.names_server:
        with flags.client() as client:
            answer = client.ask("GET", "/api/configs/schema")
    else:
        answer = json_schema()
    return flags.show(answer, json.dumps(answer, indent=2, ensure_ascii=False))
