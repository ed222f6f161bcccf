"""The peak of a program is its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from simpletuner.process import peak_resident_bytes

_MB = 1 << 20
_PROGRAM = "from simpletuner.process import peak_resident_bytes; print(peak_resident_bytes())"


def test_what_was_held_and_let_go_counts() -> None:
    bytearray(b"x") * (200 * _MB)
    assert peak_resident_bytes() >= 200 * _MB


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a program does not inherit it")
def test_the_peak_of_the_parent_does_not_count() -> None:
    held = bytearray(b"x") * (200 * _MB)
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    del held
    assert _MB < int(ran.stdout) < 100 * _MB
