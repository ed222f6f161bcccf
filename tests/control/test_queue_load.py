"""200 submits at once over HTTP on four slots: never more than four leases, the order of api.md §4, each job once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import uvicorn
from control_world import free_port, until
from test_placement import FakeExecutor

from simpletuner.job import JobStatus
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.server.app import create_app
from simpletuner.server.core import Core
from simpletuner.server.settings import ServerSettings

NUM_JOBS, NUM_SLOTS = 200, 4
PRIORITIES = (10, 30, 0, 20, 10)


class LoadedServer:
    """The whole server on a port of its own, but its executor runs nothing: the test says when a job ends."""

    def __init__(self, workspace: Path) -> None:
        environ = {"SIMPLETUNER_DEVICES": f"cpu:{NUM_SLOTS}"}
        settings = ServerSettings.read({"workspace": str(workspace), "port": free_port()}, environ, workspace)
        built = Core.build(settings, environ)
        self.executor = FakeExecutor()
        placement = Placement(built.store, self.executor, built.placement.devices, settings.jobs_root)
        supervisor = Supervisor(built.store, self.executor, placement, built.feed)
        self.core = replace(built, placement=placement, supervisor=supervisor)
        app = create_app(settings, core=self.core)
        config = uvicorn.Config(app, port=settings.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self.http = httpx2.Client(base_url=f"http://localhost:{settings.port}", timeout=60)
        until(lambda: self._server.started)

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self.core.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoadedServer]:
    running = LoadedServer(tmp_path)
    yield running
    running.close()


def test_200_submits_at_once(server: LoadedServer, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    entry = {"id": "p", "type": "local", "dataset_type": "image", "instance_data_dir": str(tmp_path / "pictures")}
    (tmp_path / "datasets.json").write_text(json.dumps([entry | {"resolution": 64, "cache_dir_vae": "cache/vae"}]))
    config = {"--model_family": "pixart_sigma", "--model_type": "full", "--max_train_steps": 9}
    config |= {"--output_dir": "output/x", "--data_backend_config": str(tmp_path / "datasets.json")}
    server.core.environments.create("demo", config, {}, None)
    limits = {"local_job_max_concurrent": None}
    assert server.http.post("/api/queue/concurrency", json=limits).status_code == 200

    def submit(number: int) -> str:
        asked = {"config_name": "demo", "priority": PRIORITIES[number % len(PRIORITIES)]}
        asked |= {"overrides": {"--output_dir": f"output/{number}"}}
        answer = server.http.post("/api/queue/submit", json=asked)
        assert answer.status_code == 202, answer.text
        return answer.json()["job_id"]

    with ThreadPoolExecutor(32) as threads:
        submitted = list(threads.map(submit, range(NUM_JOBS)))
    assert len(set(submitted)) == NUM_JOBS
    jobs = server.core.store.jobs.with_status(list(JobStatus))
    stats = server.http.get("/api/queue/stats").json()
    assert (stats["running"], stats["queue_depth"], stats["local"]["available_gpus"]) == (4, NUM_JOBS - 4, [])
    # Those that came while slots were free started at once; all others by priority, then by age.
    expected = [job.job_id for job in jobs[:NUM_SLOTS]]
    expected += [job.job_id for job in sorted(jobs[NUM_SLOTS:], key=lambda job: (-job.given_priority, job.position))]
    shown = server.http.get("/api/queue", params={"limit": 500, "status": "queued"}).json()["entries"]
    assert [entry["job_id"] for entry in shown] == expected[NUM_SLOTS:]
    assert [entry["position"] for entry in shown] == list(range(1, NUM_JOBS - NUM_SLOTS + 1))
    while server.executor.alive:
        leases = server.core.store.jobs.leases()
        assert len(leases) <= NUM_SLOTS and len(set(leases.values())) == len(leases)
        ended = [name for name in server.executor.alive if name in leases.values()]
        num_started = len(server.executor.started)
        for name in ended:
            server.executor.end(name)
        server.core.supervisor.wake()
        more = min(NUM_JOBS, num_started + len(ended))
        until(lambda more=more: len(server.executor.started) >= more, every_s=0.002)
    assert [name for name, _ in server.executor.started] == expected
    until(lambda: server.core.store.jobs.count_by_status() == {JobStatus.COMPLETED: NUM_JOBS})
    assert server.core.store.jobs.leases() == {}
