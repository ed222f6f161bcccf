"""`simpletuner options`."""

from __future__ import annotations

import json as json_text
from difflib import get_close_matches
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.config.export import describe_all
from simpletuner.config.reserved import NO_EFFECT, RENAMED, is_later
from simpletuner.errors import UserError


def options(name: str | None = None, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Explain an option, or list them all.

    Parameters
    ----------
    name
        Option, with or without dashes.
    json
        Print JSON.
    """
    rows = describe_all()
    if name is not None:
        rows = [_find(name.removeprefix("--"), rows)]
    if json:
        print(json_text.dumps(rows if name is None else rows[0], indent=2))
    elif name is not None:
        _print_one(rows[0])
    else:
        _print_all(rows)
    return 0


def _find(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    name = RENAMED.get(name, name)
    for row in rows:
        if row["name"] == name:
            return row
    if name in NO_EFFECT:
        raise UserError("option_no_effect", f"--{name} has no effect: {NO_EFFECT[name]}.")
    if is_later(name):
        raise UserError("option_not_supported_yet", f"The option --{name} is not supported yet.")
    near = get_close_matches(name, [row["name"] for row in rows], n=3)
    hint = f"Did you mean {', '.join(f'--{other}' for other in near)}?" if near else "`simpletuner options` lists all."
    raise UserError("unknown_field", f"Unknown option --{name}.", hint=hint)


def _print_one(row: dict[str, Any]) -> None:
    print(f"--{row['name']}   ({row['group']})")
    print(f"  {row['help'].strip()}")
    print(f"  type:    {row['kind']}{' or empty' if row['nullable'] else ''}")
    if row["choices"]:
        print(f"  choices: {', '.join(row['choices'])}")
    print(f"  default: {'required' if row['required'] else row['default']}")
    if row["later"]:
        print("  Not supported yet.")


def _print_all(rows: list[dict[str, Any]]) -> None:
    group = ""
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            print(f"\n{group}")
        later = " (not supported yet)" if row["later"] else ""
        print(f"  --{row['name']:<40} {row['help'].strip().splitlines()[0]}{later}")
