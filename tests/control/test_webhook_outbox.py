"""The outbox and its courier, under a clock that the test turns; receivers are real."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from control_world import World, free_port
from receiver import Receiver

from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.events import (
    Event,
    EventType,
    Journal,
    Media,
    NoticeData,
    Progress,
    Severity,
    TrainingStatusData,
    ValidationImageData,
)
from simpletuner.jobs.webhook_post import Outcome, Poster
from simpletuner.jobs.webhook_target import TargetRules
from simpletuner.jobs.webhooks import GIVE_UP_S, Courier, retry_after_s
from simpletuner.store.store import Store

PIXELS = bytes.fromhex("89504e470d0a1a0a")


class Post:
    """An outbox with the events of one job."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Ahead of the real time, at which events are queued.
        self.now_s = time.time() + 100
        self.store = Store.open(root)
        self.folder = root / "jobs" / "job"
        (self.folder / "artifacts").mkdir(parents=True)
        self.journal = Journal(self.folder / "events.jsonl", job_id="job")
        self.courier = self.new_courier()

    def new_courier(self, timeout_s: float = 5) -> Courier:
        poster = Poster(TargetRules(), timeout_s=timeout_s, clock=self.clock)
        return Courier(self.store.webhooks, poster, self.root / "jobs", clock=self.clock)

    def clock(self) -> float:
        return self.now_s

    def register(self, url: str, *, interval_s: float = 0, **more: Any) -> None:
        endpoint = WebhookEndpoint.model_validate({"callback_url": url} | more)
        self.store.webhooks.register("job", [endpoint], interval_s)

    def say(self, *events: Event) -> None:
        for event in events:
            self.journal.append(event)
        self.store.events.tail("job", self.folder / "events.jsonl")

    def deliver(self) -> None:
        asyncio.run(self.courier.deliver_due())

    def rows(self, **query: Any) -> list[Any]:
        """In the order of delivery."""
        found = self.store.webhooks.find(**({"job_id": "job", "status": None, "limit": 500, "offset": 0} | query))
        return found.deliveries[::-1]

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    with closing(Post(tmp_path)) as built:
        yield built


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with closing(Receiver()) as built:
        yield built


def notice(text: str, severity: Severity = Severity.INFO) -> Event:
    return Event(type=EventType.NOTIFICATION, severity=severity, message=text, data=NoticeData(code="x"))


def progress(second: int, step: int, total: int = 100) -> Event:
    part = Progress(label="Steps", current=step, total=total, percent=step)
    stamp = f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000Z"
    return Event(type=EventType.TRAINING_PROGRESS, message=f"{step}", progress=part, timestamp=stamp)


def status(name: Any) -> Event:
    return Event(
        type=EventType.TRAINING_STATUS, data=TrainingStatusData(status=name, global_step=1, total_num_steps=100)
    )


def messages(receiver: Receiver) -> list[str]:
    return [each.body["message"] for each in receiver.taken]


def test_a_raw_post_is_the_event_and_is_signed(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url, secret="s3cret", auth_token="t0ken")
    (post.folder / "artifacts" / "a.png").write_bytes(PIXELS)
    data = ValidationImageData(
        step=1, timestep=0, resolution=(8, 8), validation_type="final", prompt="ü", step_label="1/1", global_step=1,
        shortname="n",
    )  # fmt: skip
    media = [Media(artifact_id="a.png", mime_type="image/png")]
    post.say(Event(type=EventType.VALIDATION_IMAGE, title="T", body="ü", data=data, images=media))
    post.deliver()
    [got] = receiver.posts
    stored = post.store.events.of_type("job", EventType.VALIDATION_IMAGE)[0].as_dict()
    shown = got.body
    [image] = shown.pop("images")
    stored.pop("images")
    assert shown == stored
    assert image["src"] == "data:image/png;base64,iVBORw0KGgo="
    assert got.headers["X-SimpleTuner-Event"] == "validation.image"
    assert got.headers["X-SimpleTuner-Delivery"] == post.rows()[0].id
    assert got.headers["X-API-Key"] == "t0ken"
    assert got.headers["Host"] == f"127.0.0.1:{receiver.port}"
    at, signature = (part.partition("=")[2] for part in got.headers["X-SimpleTuner-Signature"].split(","))
    assert at == str(int(post.now_s))
    assert signature == hmac.new(b"s3cret", f"{at}.".encode() + got.content, hashlib.sha256).hexdigest()


def test_nothing_unwanted_is_queued(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url, log_level="warning")
    post.register(receiver.url, events=["training.*"])
    post.say(notice("info"), notice("warning", Severity.WARNING), status("running"))
    post.deliver()
    assert sorted(receiver.types()) == ["notification", "training.status"]


def test_failures_are_retried_in_order_with_growing_pauses(post: Post) -> None:
    with closing(Receiver(*[500] * 4)) as receiver:
        post.register(receiver.url)
        post.say(notice("first"), notice("second"))
        for pause_s in (1, 2, 4, 8):
            post.deliver()
            head = post.rows()[0]
            assert (head.status, head.last_status, head.next_s) == ("pending", 500, post.now_s + pause_s)
            assert post.rows()[1].attempts == 0
            post.now_s += pause_s - 0.1
            post.deliver()
            assert post.rows()[0].attempts == head.attempts
            post.now_s += 0.1
        post.deliver()
        assert messages(receiver) == ["first", "second"]
        assert [(row.status, row.attempts) for row in post.rows()] == [("delivered", 5), ("delivered", 1)]


def test_a_day_of_failures_is_a_dead_letter_that_can_be_sent_again(post: Post) -> None:
    port = free_port()
    post.register(f"http://127.0.0.1:{port}/hook")
    post.say(notice("first"))
    begin_s = post.now_s
    pauses: list[float] = []
    while post.rows()[0].status == "pending":
        post.deliver()
        pauses.append(post.rows()[0].next_s - post.now_s)
        post.now_s = max(post.now_s, post.rows()[0].next_s)
        assert post.now_s - begin_s < GIVE_UP_S + 1000
    assert pauses[:11] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600]
    assert set(pauses[11:-1]) == {600}
    assert GIVE_UP_S <= post.now_s - begin_s < GIVE_UP_S + 700
    [dead] = post.rows(status="dead")
    assert (dead.last_status, "Connect" in dead.last_error) == (None, True)
    with closing(Receiver(port=port)) as receiver:
        post.say(notice("second"))
        post.deliver()
        assert messages(receiver) == ["second"]
        assert post.store.webhooks.redeliver(dead.id, now_s=post.now_s).status == "pending"
        post.deliver()
        assert messages(receiver) == ["second", "first"]
        assert receiver.taken[-1].headers["X-SimpleTuner-Delivery"] == dead.id


def test_time_in_which_nobody_tried_does_not_count(post: Post) -> None:
    with closing(Receiver(500)) as receiver:
        post.register(receiver.url)
        post.say(notice("first"))
        post.now_s += 3 * GIVE_UP_S
        post.courier = post.new_courier()
        post.deliver()
        assert post.rows()[0].status == "pending"
        post.now_s += 1
        post.deliver()
        assert messages(receiver) == ["first"]


def test_an_endpoint_may_ask_for_patience(post: Post) -> None:
    with closing(Receiver(429, headers={"Retry-After": "77"})) as receiver:
        post.register(receiver.url, webhook_type="discord")
        post.say(notice("first"))
        post.deliver()
        assert post.rows()[0].next_s == post.now_s + 77
    assert retry_after_s(1, Outcome(status=429, retry_after_s=1e9)) == 3600
    assert retry_after_s(5, Outcome(status=429, retry_after_s=2)) == 16


def test_an_endpoint_that_hangs_delays_no_other(post: Post, receiver: Receiver) -> None:
    with closing(Receiver(hangs=True)) as hanging:
        post.register(hanging.url)
        post.register(receiver.url)
        post.say(*(notice(str(number)) for number in range(20)))
        post.courier = post.new_courier(timeout_s=200)

        async def deliver() -> None:
            delivering = asyncio.create_task(post.courier.deliver_due())
            while len(post.rows(status="delivered")) < 20:
                assert not delivering.done()
                await asyncio.sleep(0.005)

        asyncio.run(deliver())
        assert messages(receiver) == [str(number) for number in range(20)]
        assert {row.attempts for row in post.rows(status="pending")} == {0}


def test_an_answer_that_never_comes_is_a_failure(post: Post) -> None:
    with closing(Receiver(hangs=True)) as hanging:
        post.register(hanging.url)
        post.say(notice("first"))
        post.courier = post.new_courier(timeout_s=0.2)
        post.deliver()
        assert (post.rows()[0].status, post.rows()[0].last_error) == ("pending", "No answer within 0.2 s.")


def test_redirects_are_not_followed(post: Post, receiver: Receiver) -> None:
    with closing(Receiver(302, headers={"Location": receiver.url})) as first:
        post.register(first.url)
        post.say(notice("first"))
        post.deliver()
        assert (post.rows()[0].status, post.rows()[0].last_status, receiver.posts) == ("pending", 302, [])


@pytest.mark.parametrize("late", [False, True])
def test_progress_keeps_its_distance_by_the_events_times(post: Post, receiver: Receiver, late: bool) -> None:
    """Whether they are stored one by one or all at once after an hour."""
    post.register(receiver.url, interval_s=10)
    said = [progress(second, second + 1, total=36) for second in range(36)]
    said[3:3] = [notice("between")]
    for event in [said] if late else [[event] for event in said]:
        post.say(*event)
    post.deliver()
    assert messages(receiver) == ["1", "between", "11", "21", "31", "36"]


def test_the_last_progress_of_a_run_that_ends_early_goes_too(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url, interval_s=10)
    post.say(progress(0, 1), progress(1, 2))
    post.say(progress(2, 3), status("stopping"), status("stopped"))
    post.deliver()
    assert messages(receiver) == ["1", "", "3", ""]
    assert [each.body.get("data", {}).get("status") for each in receiver.taken] == [None, "stopping", None, "stopped"]


def test_an_end_that_is_not_wanted_lets_the_last_progress_through(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url, interval_s=10, events=["training.progress"])
    post.say(progress(0, 1), progress(1, 2), status("cancelled"))
    post.deliver()
    assert messages(receiver) == ["1", "2"]


def test_a_job_that_was_never_accepted_leaves_no_endpoint(world: World) -> None:
    folder = world.folder("stray").root
    folder.mkdir()
    world.store.webhooks.register("stray", [WebhookEndpoint(callback_url="http://localhost/")], 0)
    assert world.placement.remove_strays() == ["stray"]
    assert world.store.webhooks.jobs() == set()


def test_discord_gets_text_and_files(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url, webhook_type="discord", message_prefix="[run 7]")
    names = [f"{number}.png" for number in range(12)]
    for name in names:
        (post.folder / "artifacts" / name).write_bytes(PIXELS + name.encode())
    data = ValidationImageData(
        step=1, timestep=0, resolution=(8, 8), validation_type="final", prompt="p", step_label="1/1", global_step=1,
        shortname="n",
    )  # fmt: skip
    media = [Media(artifact_id=name, mime_type="image/png") for name in names]
    post.say(
        notice("@everyone " + "long " * 1000),
        Event(type=EventType.VALIDATION_IMAGE, title="Validation", body="a prompt", data=data, images=media),
    )
    post.deliver()
    text, pictures = receiver.posts
    assert len(text.body["content"]) == 2000
    assert text.body["content"].startswith("[run 7]\n@everyone long")
    assert text.body["allowed_mentions"] == {"parse": []}
    parts = pictures.parts()
    assert json.loads(parts.pop("payload_json").get_payload())["content"] == "[run 7] Validation\na prompt"
    assert {name: part.get_filename() for name, part in parts.items()} == {f"files[{n}]": f"{n}.png" for n in range(10)}
    assert parts["files[3]"].get_payload(decode=True) == PIXELS + b"3.png"
    assert parts["files[3]"].get_content_type() == "image/png"


def test_an_event_and_its_deliveries_are_stored_together(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death between the two loses neither: the journal is read again from where it was."""
    post.register(receiver.url)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("simpletuner.store.events.fan_out", die)
        with pytest.raises(KeyboardInterrupt):
            post.say(notice("first"))
    assert post.store.events.newest_index() == 0
    post.say()
    post.deliver()
    assert messages(receiver) == ["first"]


def test_an_event_that_breaks_our_code_stops_one_endpoint_only(post: Post, receiver: Receiver) -> None:
    post.register(f"{receiver.url}/all")
    post.register(f"{receiver.url}/some", events=["training.status"])
    with (post.folder / "events.jsonl").open("a") as journal:
        journal.write('{"type": "notification", "images": [{}]}\n')
    post.say(status("running"))
    post.deliver()
    assert [each.path for each in receiver.taken] == ["/hook/some"]
    broken = next(row for row in post.rows() if row.attempts and row.status == "pending")
    assert ("KeyError" in broken.last_error, broken.next_s) == (True, post.now_s + 1)
    post.now_s += GIVE_UP_S + 1
    post.deliver()
    assert [row.event_index for row in post.rows(status="dead")] == [1]
    post.deliver()
    assert [each.path for each in receiver.taken] == ["/hook/some", "/hook/all"]


def test_the_threads_flush_ends_when_the_outbox_is_empty(post: Post, receiver: Receiver) -> None:
    post.register(receiver.url)
    post.say(*(notice(str(number)) for number in range(5)))
    post.courier.start()
    post.courier.close(flush_s=30)
    assert messages(receiver) == ["0", "1", "2", "3", "4"]
