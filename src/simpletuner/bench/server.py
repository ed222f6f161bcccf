"""The server under load while a run trains, against the barest FastAPI application under the same load."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx2

from simpletuner.bench.figure import Figure, Measured, quantile
from simpletuner.bench.processes import Served, serve, serve_bare
from simpletuner.bench.scene import OPTIONS, Scene

STARTS = 3
REQUESTS_PER_S = 300
FOLLOWERS = 500
MOST_START_S = 1.0
MOST_IDLE_MB = 120.0
MOST_DELIVERY_S = 0.25
"""api.md §2.5: from the trainer to a client, median."""
_PATHS = ("/api/training/status", "/api/training/events?limit=100")
_RUN_STEPS = 100_000
_JOINED_S = 60.0


def measure(scene: Scene, seconds: float = 10.0, followers: int = FOLLOWERS) -> Measured:
    """`seconds` of each load."""
    starts, bare_starts = [_start(scene) for _ in range(STARTS)], [_start(None) for _ in range(STARTS)]
    with serve(scene.root) as ours:
        _start_run(ours)
        latencies = asyncio.run(_load(ours.url, _PATHS, seconds))
        followed = asyncio.run(_follow(ours, followers, seconds))
    with serve_bare() as bare:
        bare_latencies = asyncio.run(_load(bare.url, ("/health",), seconds))
    return Measured(
        benchmark="server",
        figures=[
            *_start_figures(starts, bare_starts),
            *_load_figures(latencies, bare_latencies),
            *_follow_figures(followed, followers),
        ],
    )


@dataclass(frozen=True, slots=True)
class _Start:
    seconds: float
    megabytes: float


def _start(scene: Scene | None) -> _Start:
    """Of our server in the scene's workspace, or of the bare application."""
    with serve(scene.root) if scene else serve_bare() as served:
        return _Start(served.started_in_s, served.memory_bytes() / 1e6)


def _start_run(served: Served) -> None:
    options = OPTIONS | {"max_train_steps": _RUN_STEPS, "output_dir": "output/under-load"}
    answer = httpx2.post(f"{served.url}/api/training/start?environment=-", json=options, timeout=60)
    answer.raise_for_status()


async def _load(url: str, paths: Sequence[str], seconds: float) -> list[float]:
    """Latencies in seconds, from the moment a request was due: a server that falls behind is not spared."""
    async with httpx2.AsyncClient(base_url=url, timeout=30, limits=httpx2.Limits(max_connections=100)) as client:
        begin = asyncio.get_running_loop().time() + 0.1

        async def ask(number: int) -> float:
            due = begin + number / REQUESTS_PER_S
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            answer = await client.get(paths[number % len(paths)])
            answer.raise_for_status()
            return asyncio.get_running_loop().time() - due

        return await asyncio.gather(*(ask(number) for number in range(round(seconds * REQUESTS_PER_S))))


@dataclass(slots=True)
class _Follower:
    """What one stream brought: event → seconds after it was written."""

    delays: dict[int, float]


async def _follow(served: Served, count: int, seconds: float) -> list[_Follower]:
    """Streams that are all open before the first counted event; beside them one that never reads."""
    all_joined = asyncio.Event()
    num_joined = 0

    async def follow() -> _Follower:
        nonlocal num_joined
        reader, writer = await _open_stream(served.port)
        await reader.readuntil(b"event: hello")
        num_joined += 1
        if num_joined == count:
            all_joined.set()
        follower = _Follower({})
        try:
            async with asyncio.timeout(_JOINED_S):
                await all_joined.wait()
            async with asyncio.timeout(seconds):
                await _read_events(reader, follower)
        except TimeoutError:
            pass
        writer.close()
        return follower

    _, slow = await _open_stream(served.port)
    found = await asyncio.gather(*(follow() for _ in range(count)))
    slow.close()
    return found


async def _open_stream(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /api/training/events/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
    await writer.drain()
    return reader, writer


async def _read_events(reader: asyncio.StreamReader, follower: _Follower) -> None:
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"index"' in line:
            arrived, event = datetime.now(UTC), json.loads(line[len(b"data: ") :])
            written = datetime.fromisoformat(event["timestamp"])
            follower.delays[event["index"]] = (arrived - written).total_seconds()


def _start_figures(ours: list[_Start], bare: list[_Start]) -> list[Figure]:
    seconds = statistics.median(start.seconds for start in ours)
    megabytes = statistics.median(start.megabytes for start in ours)
    bare_s = statistics.median(start.seconds for start in bare)
    bare_mb = statistics.median(start.megabytes for start in bare)
    return [
        Figure(
            name="start to first answer",
            value=seconds,
            unit="s",
            least=min(start.seconds for start in ours),
            most=max(start.seconds for start in ours),
            limit=f"≤ {MOST_START_S:g} s",
            is_met=seconds <= MOST_START_S,
            note=f"{seconds / bare_s:.2f} × bare FastAPI ({bare_s:.2f} s)",
        ),
        Figure(
            name="idle memory",
            value=megabytes,
            unit="MB",
            limit=f"≤ {MOST_IDLE_MB:g} MB",
            is_met=megabytes <= MOST_IDLE_MB,
            note=f"{megabytes / bare_mb:.2f} × bare FastAPI ({bare_mb:.0f} MB)",
        ),
    ]


def _load_figures(ours: list[float], bare: list[float]) -> list[Figure]:
    named = ((path.partition("?")[0], ours[place :: len(_PATHS)]) for place, path in enumerate(_PATHS))
    bare_ms = 1e3 * quantile(bare, 0.99)
    return [
        Figure(
            name=f"{path}, p99 at {REQUESTS_PER_S} requests/s while a run trains",
            value=1e3 * quantile(latencies, 0.99),
            unit="ms",
            least=1e3 * min(latencies),
            most=1e3 * max(latencies),
            note=f"p50 {1e3 * statistics.median(latencies):.1f} ms; "
            f"p99 {1e3 * quantile(latencies, 0.99) / bare_ms:.1f} × bare FastAPI without a run ({bare_ms:.1f} ms)",
        )
        for path, latencies in named
    ]


def _follow_figures(found: list[_Follower], count: int) -> list[Figure]:
    most = max((len(follower.delays) for follower in found), default=0)
    whole = sum(len(follower.delays) >= most - 1 and most > 0 for follower in found)
    delays = [delay for follower in found for delay in follower.delays.values()]
    median = statistics.median(delays) if delays else float("nan")
    return [
        Figure(
            name="followers that got every event, one beside them never reads",
            value=whole,
            unit=f"of {count}",
            limit="all",
            is_met=whole == count,
            note=f"{most} events; one may be on its way at the end",
        ),
        Figure(
            name="from trainer to follower, median",
            value=1e3 * median,
            unit="ms",
            limit=f"≤ {1e3 * MOST_DELIVERY_S:g} ms",
            is_met=median <= MOST_DELIVERY_S,
            note=f"p99 {1e3 * quantile(delays, 0.99):.0f} ms" if delays else "no event came",
        ),
    ]
