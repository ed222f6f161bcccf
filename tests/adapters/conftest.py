from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lycoris import LycorisNetwork

KEPT = (
    "ENABLE_CONV",
    "TARGET_REPLACE_MODULE",
    "TARGET_REPLACE_NAME",
    "MODULE_ALGO_MAP",
    "NAME_ALGO_MAP",
    "USE_FNMATCH",
    "TARGET_EXCLUDE_NAME",
)


@pytest.fixture(autouse=True)
def library_as_found() -> Iterator[None]:
    """lycoris keeps the last preset in its class, and the threads are one as in CI."""
    before = {name: vars(LycorisNetwork)[name] for name in KEPT}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)
