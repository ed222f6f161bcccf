"""Jobs, device leases, settings, idempotency keys and the outbox."""

import sqlalchemy as sa
from alembic import op

revision = "state_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False, unique=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.Text),
        sa.Column("mode", sa.String(8)),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("target", sa.String(16), nullable=False),
        sa.Column("any_gpu", sa.Boolean, nullable=False),
        sa.Column("num_devices", sa.Integer, nullable=False),
        sa.Column("preferred_devices", sa.JSON, nullable=False),
        sa.Column("devices", sa.JSON),
        sa.Column("config_name", sa.String(128)),
        sa.Column("user_id", sa.String(64)),
        sa.Column("output_dir", sa.Text, nullable=False),
        sa.Column("retry_of", sa.String(64)),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("queued_at", sa.String(32)),
        sa.Column("started_at", sa.String(32)),
        sa.Column("completed_at", sa.String(32)),
        sa.Column("exit", sa.JSON),
        sa.Column("wait", sa.JSON),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.create_table(
        "device_leases",
        sa.Column("machine", sa.String(64), nullable=False),
        sa.Column("device", sa.Integer, nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.UniqueConstraint("machine", "device", name="uq_device_leases_device"),
    )
    op.create_index("ix_device_leases_job_id", "device_leases", ["job_id"])
    op.create_table(
        "settings",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.JSON),
    )
    op.create_table(
        "idempotency",
        sa.Column("user_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("answer", sa.JSON),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.UniqueConstraint("user_id", "key", name="uq_idempotency_key"),
    )
    op.create_table(
        "outbox",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String(64)),
        sa.Column("event", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
