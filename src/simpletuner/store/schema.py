"""The tables of both databases. Migrations build them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

state_metadata = MetaData()
events_metadata = MetaData()

jobs = Table(
    "jobs",
    state_metadata,
    Column("position", Integer, primary_key=True),  # creation order
    Column("job_id", String(64), nullable=False, unique=True),
    Column("status", String(16), nullable=False),
    Column("status_reason", Text),
    Column("mode", String(8)),  # stop, cancel or yield while stopping and after
    Column("forced", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("target", String(16), nullable=False),
    Column("any_gpu", Boolean, nullable=False),
    Column("num_devices", Integer, nullable=False),
    Column("preferred_devices", JSON, nullable=False),
    Column("devices", JSON),  # allocated now, or at the end
    Column("config_name", String(128)),
    Column("user_id", String(64)),
    Column("output_dir", Text, nullable=False),
    Column("retry_of", String(64)),
    Column("created_at", String(32), nullable=False),
    Column("queued_at", String(32)),
    Column("started_at", String(32)),
    Column("completed_at", String(32)),
    Column("exit", JSON),
    Column("wait", JSON),  # last announced {position, reason, reason_code}
    Column("paused", Boolean, nullable=False, server_default=false()),  # held back while queued
    Column("priority_override", Integer),  # in place of `priority`, which follows the user's level
    Column("requires_approval", Boolean, nullable=False, server_default=false()),  # it began as blocked
    Column("worker_labels", JSON),  # {label: glob} of the workers that may have it
    Column("peak_bytes", BigInteger),  # predicted need of each device, where it is known
    Column("worker_id", String(64)),  # where it runs or ran last; null for this machine
    Column("gave_way_to", String(64)),  # the urgent job that had it yield, until it starts again
    Index("ix_jobs_status", "status"),
    sqlite_autoincrement=True,
)

device_leases = Table(
    "device_leases",
    state_metadata,
    Column("machine", String(64), nullable=False),
    Column("device", Integer, nullable=False),
    Column("job_id", String(64), nullable=False, index=True),
    UniqueConstraint("machine", "device", name="uq_device_leases_device"),
)

workers = Table(
    "workers",
    state_metadata,
    Column("worker_id", String(64), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("worker_type", String(16), nullable=False),  # persistent or ephemeral
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("labels", JSON, nullable=False),  # set at the server; they win over `told_labels`
    Column("told_labels", JSON, nullable=False),  # by the worker, of itself
    Column("gpu_info", JSON),  # {name, count, vram_gb, driver, accelerator}; null until it registers
    Column("version", String(32)),
    Column("draining", Boolean, nullable=False),
    Column("quarantined", Boolean, nullable=False),  # it lost a lease and has not yet proved itself
    Column("created_at", String(32), nullable=False),
    Column("connected_at", String(32)),
    Column("last_heartbeat", String(32)),
)

assignments = Table(
    "assignments",
    state_metadata,
    Column("job_id", String(64), primary_key=True),  # the newest of each job that a worker ever had
    Column("worker_id", String(64), nullable=False, index=True),
    Column("epoch", Integer, nullable=False),  # counts the assignments of the job: the fencing token
    Column("state", String(12), nullable=False),  # offered, taken, ended
    Column("offered_at", String(32), nullable=False),
    Column("journal_start", BigInteger),  # bytes that the server's journal had when the lease was taken
    Column("log_start", BigInteger),
)

settings = Table(
    "settings",
    state_metadata,
    Column("name", String(64), primary_key=True),
    Column("value", JSON),
)

idempotency = Table(
    "idempotency",
    state_metadata,
    Column("user_id", String(64), nullable=False),
    Column("key", String(128), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("job_id", String(64), nullable=False),
    Column("answer", JSON),
    Column("created_at", String(32), nullable=False),
    UniqueConstraint("user_id", "key", name="uq_idempotency_key"),
)

outbox = Table(
    "outbox",
    state_metadata,
    Column("number", Integer, primary_key=True),  # never used twice: it names the event
    Column("job_id", String(64)),
    Column("event", JSON, nullable=False),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    events_metadata,
    Column("index", Integer, primary_key=True),
    Column("id", String(96), nullable=False, unique=True),
    Column("job_id", String(64)),
    Column("type", String(48), nullable=False),
    Column("body", Text, nullable=False),  # JSON as its author wrote it, without index and id
    Index("ix_events_job", "job_id", "index"),
    Index("ix_events_job_type", "job_id", "type", "index"),
    sqlite_autoincrement=True,
)

journals = Table(
    "journals",
    events_metadata,
    Column("job_id", String(64), primary_key=True),
    Column("offset", Integer, nullable=False),  # bytes of the journal that are in `events`
    Column("seq", Integer, nullable=False),  # events read so far
)

webhooks = Table(
    "webhooks",
    events_metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", String(64), nullable=False, index=True),
    Column("endpoint", JSON, nullable=False),  # whole, with its secrets: the state directory is its owner's alone
    Column("interval_s", Float, nullable=False),  # least time between two `training.progress`
    Column("progress_at", String(32)),  # timestamp of the last one that was queued
    Column("held_index", Integer),  # the last one that was held back since
)

deliveries = Table(
    "deliveries",
    events_metadata,
    Column("number", Integer, primary_key=True),  # order of delivery to an endpoint
    Column("id", String(16), nullable=False, unique=True),
    Column("webhook_id", Integer, nullable=False),
    Column("job_id", String(64), nullable=False),
    Column("event_index", Integer, nullable=False),
    Column("status", String(12), nullable=False),  # pending, delivered, dead
    Column("attempts", Integer, nullable=False),
    Column("created_s", Float, nullable=False),  # Unix time, as the next one
    Column("next_s", Float, nullable=False),
    Column("last_status", Integer),
    Column("last_error", Text),
    Index("ix_deliveries_queue", "status", "webhook_id", "number"),
    Index("ix_deliveries_job", "job_id", "number"),
    sqlite_autoincrement=True,
)
