"""JSON from a body that can be written to a file again."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

T = TypeVar("T")


def check_plain(value: T) -> T:
    """Raises ValueError for NaN, infinity and lone surrogates: Python reads them, no file may hold them."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds characters that are not Unicode text") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return value


PlainObject = Annotated[dict[str, Any], AfterValidator(check_plain)]
PlainObjects = Annotated[list[dict[str, Any]], AfterValidator(check_plain)]
