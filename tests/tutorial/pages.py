"""Runs the shell blocks of a page as its reader would: one bash, top to bottom, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"

_PREAMBLE = r"""
curl() {
    command curl -w '%{stderr}\n'$'\x1e:''%{http_code} %{method} %{url_effective}\n' "$@"
}
"""
"""Nothing of a command is changed but that each request tells its status on stderr."""


@dataclass(frozen=True, slots=True)
class Block:
    """A shell block under the heading it stands below."""

    heading: str
    commands: str


@dataclass(frozen=True, slots=True)
class Request:
    status: int
    method: str
    path: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a block printed, how its last command ended, and what was answered to its requests."""

    block: Block
    output: str
    status: int
    requests: tuple[Request, ...]


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    headings = [(match.start(), match[1]) for match in re.finditer(r"^#{2,3} (.+)$", text, re.MULTILINE)]
    return [
        Block([title for start, title in headings if start < match.start()][-1], dedent(match[1]))
        for match in _BLOCK.finditer(text)
    ]


def run_blocks(blocks: Sequence[Block], workspace: Path, within_s: float, **variables: str) -> list[Answer]:
    """In `workspace`. Raises AssertionError when bash does not get to the end in time."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HOME": str(workspace)} | variables
    (workspace / "page.sh").write_text(_PREAMBLE + "".join(_marked(*numbered) for numbered in enumerate(blocks)))
    out, err = workspace / "out.log", workspace / "err.log"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        bash = subprocess.Popen(
            ["bash", "page.sh"],
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            bash.wait(within_s)
        except subprocess.TimeoutExpired:
            bash.kill()
    printed, told = (path.read_text(errors="replace") for path in (out, err))
    assert bash.wait() == 0, f"Ended by {bash.returncode}, at last with {printed[-2000:]}\n{told[-2000:]}"
    return [_answer(*part) for part in zip(blocks, _parts(printed), _parts(told), strict=True)]


def _marked(number: int, block: Block) -> str:
    mark = f"printf '\\036%d\\n' {number}"
    return f"{mark}\n{mark} >&2\n{block.commands}\nprintf '\\036=%d\\n' $?\n"


def _parts(text: str) -> list[str]:
    """What came after the number of each block."""
    return re.split(rf"{_MARK}\d+\n", text)[1:]


def _answer(block: Block, printed: str, told: str) -> Answer:
    output, _, status = printed.rpartition(f"{_MARK}=")
    requests = tuple(_request(line) for line in re.findall(rf"^{_MARK}:(.*)$", told, re.MULTILINE))
    return Answer(block, output, int(status), requests)


def _request(line: str) -> Request:
    status, method, url = line.split()
    return Request(int(status), method, re.sub(r"^https?://[^/]*", "", url))
