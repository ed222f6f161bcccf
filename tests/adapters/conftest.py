from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lycoris import LycorisNetwork

from simpletuner.train.half_on_cpu import fast_half_products

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
    """lycoris keeps the last preset in its class; one thread, as in CI, and the products of a trainer process."""
    before = {name: vars(LycorisNetwork)[name] for name in KEPT}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fast_half_products():
        yield
    torch.set_num_threads(threads)
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)
