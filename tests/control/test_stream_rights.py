"""How many streams may be open, and that they end with the right to read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from account_world import AccountWorld
from listener import Listener

from simpletuner.errors import UserError
from simpletuner.server.identity import LOCAL
from simpletuner.server.open_streams import MOST_OF_ONE, MOST_STREAMS, OpenStreams

EVENTS = "/api/training/events/stream"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("streams"))
    built.add_users("admin")
    yield built
    built.close()


def listen(world: AccountWorld, headers: dict[str, str], *, path: str = EVENTS, kind: str = "http") -> Listener:
    return Listener(world, path, headers, kind=kind, peer="10.0.0.1")


def test_twenty_streams_of_one_and_no_more(world: AccountWorld) -> None:
    one, other = ({"X-API-Key": world.make_key("admin")} for _ in range(2))

    async def run() -> None:
        listeners = [listen(world, one) for _ in range(MOST_OF_ONE)]
        assert {await listener.status() for listener in listeners} == {200}
        for kind in ("http", "websocket"):
            refused = listen(world, one, kind=kind)
            assert await refused.status() == 503
            await asyncio.wait_for(refused.task, 5)
            assert json.loads(refused.sent[-1]["body"])["code"] == "too_many_streams"
        listeners.append(listen(world, other))
        assert await listeners[-1].status() == 200
        await listeners.pop(0).leave()
        listeners.append(listen(world, one))
        assert await listeners[-1].status() == 200
        for listener in listeners:
            await listener.leave()

    world.loop.run(run())


def test_a_thousand_in_all_and_any_number_of_this_machine() -> None:
    streams = OpenStreams()
    for _ in range(MOST_OF_ONE * 2):
        streams.open(LOCAL)
    for number in range(MOST_OF_ONE * 2, MOST_STREAMS):
        streams.open(replace(LOCAL, by="key", credential_id=number))
    with pytest.raises(UserError, match=f"{MOST_STREAMS} streams"):
        streams.open(LOCAL)


@pytest.mark.parametrize("kind", ["http", "websocket", "log"])
@pytest.mark.parametrize("by", ["key", "session"])
def test_a_stream_ends_with_its_credential(world: AccountWorld, kind: str, by: str) -> None:
    accounts = world.core.accounts
    if by == "key":
        secret = world.make_key("admin")
        headers, credential = {"X-API-Key": secret}, accounts.identify_key(secret)
    else:
        secret = accounts.open_session(world.users["admin"], long=False)[0]
        headers, credential = {"Cookie": f"simpletuner_session={secret}"}, accounts.identify_session(secret)
    assert credential is not None
    is_log = kind == "log"
    path = f"/api/jobs/{world.insert_job('local').job_id}/logs/stream" if is_log else EVENTS

    async def run() -> None:
        kept = listen(world, {"X-API-Key": world.keys["admin"]})
        listener = listen(world, headers, path=path, kind="http" if is_log else kind)
        assert await listener.status() in {200, 101}
        assert await kept.status() == 200
        if by == "key":
            await asyncio.to_thread(accounts.revoke_key, credential.credential_id)
        else:
            await asyncio.to_thread(accounts.end_session, secret)
        await asyncio.wait_for(listener.task, 5)
        if kind == "websocket":
            assert (listener.sent[-1]["type"], listener.sent[-1]["code"]) == ("websocket.close", 1008)
        else:
            assert listener.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert not kept.task.done()
        await kept.leave()

    world.loop.run(run())
