"""JSON or an HTML fragment (api.md §1.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from starlette.datastructures import Headers

from simpletuner.errors import Problem

JSON_RANGES = ("application/json", "application/*", "*/*")


def qualities(accept: str) -> dict[str, float]:
    """Media range → q of an `Accept` header; what cannot be read counts as 1."""
    found: dict[str, float] = {}
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media:
            given = next((value for value in parameters if value.startswith("q=")), "q=1")
            found[media] = _quality(given[2:])
    return found


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 1.0


def wants_html_by_default(headers: Headers) -> bool:
    """HTML unless JSON is asked for by name and not outranked."""
    accepted = qualities(headers.get("accept", ""))
    json_quality = accepted.get("application/json", 0.0)
    return json_quality == 0.0 or json_quality < accepted.get("text/html", 0.0)


def wants_html_strictly(headers: Headers) -> bool:
    """JSON unless HTML is preferred, or htmx asks."""
    if headers.get("hx-request") == "true":
        return True
    accepted = qualities(headers.get("accept", ""))
    json_quality = max((accepted[media] for media in JSON_RANGES if media in accepted), default=0.0)
    return accepted.get("text/html", 0.0) > json_quality


def problem_fragment(*, valid: bool, errors: Iterable[Problem], warnings: Iterable[Problem], note: str = "") -> str:
    """Never both phrases: the words of a problem are escaped, its code says which it is. `note` stands below."""
    kind, role, title = (
        ("success", "status", "Configuration Valid") if valid else ("danger", "alert", "Validation Failed")
    )
    rows = [_row(problem, "") for problem in errors] + [_row(problem, "Warning: ") for problem in warnings]
    listing = f"<ul>{''.join(rows)}</ul>" if rows else ""
    below = f"<p>{escape(note)}</p>" if note else ""
    return f'<div class="alert alert-{kind}" role="{role}"><strong>{title}</strong>{listing}{below}</div>'


def message_fragment(message: str, *, ok: bool, attributes: Mapping[str, str] | None = None) -> str:
    extra = "".join(f' data-{name}="{escape(value)}"' for name, value in (attributes or {}).items())
    kind, role = ("success", "status") if ok else ("danger", "alert")
    return f'<div class="alert alert-{kind}" role="{role}"{extra}>{escape(message)}</div>'


def _row(problem: Problem, prefix: str) -> str:
    text = f"{prefix}{problem.message} {problem.hint}".strip()
    return f'<li data-code="{escape(problem.code)}" data-pointer="{escape(problem.pointer)}">{escape(text)}</li>'
