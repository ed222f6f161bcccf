"""Posts the events of a foreground run to its webhooks, beside the run."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing, contextmanager

from simpletuner.job import JobDir
from simpletuner.server.settings import ServerSettings

FLUSH_S = 10.0


@contextmanager
def post_webhooks(job: JobDir, settings: ServerSettings) -> Generator[None]:
    """At the end waits up to `FLUSH_S` seconds for what is not delivered yet; the rest stays in the outbox."""
    if not job.read_config()["config"].get("webhook_config"):
        yield
        return
    # The database costs a run without webhooks nothing.
    from simpletuner.jobs.foreground import ForegroundOutbox
    from simpletuner.jobs.webhook_post import Poster
    from simpletuner.jobs.webhook_target import TargetRules

    with closing(ForegroundOutbox.open(settings.foreground_root)) as outbox, outbox.hold(job):
        courier = outbox.courier(job, Poster(TargetRules(allow_private=settings.webhook_allow_private)))
        courier.start()
        try:
            yield
        finally:
            courier.close(flush_s=FLUSH_S)
            if waiting := outbox.num_waiting(job.root.name):
                posts = "1 webhook post is" if waiting == 1 else f"{waiting} webhook posts are"
                hint = f"`simpletuner server` with the state directory {settings.state_dir} delivers what waits."
                print(f"warning: {posts} not delivered yet. {hint}", file=sys.stderr)
