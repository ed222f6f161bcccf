"""Machines that dial in to run jobs, what was assigned to them, and which job made another yield."""

import sqlalchemy as sa
from alembic import op

revision = "state_0005"
down_revision = "state_0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("worker_type", sa.String(16), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("told_labels", sa.JSON, nullable=False),
        sa.Column("gpu_info", sa.JSON),
        sa.Column("version", sa.String(32)),
        sa.Column("draining", sa.Boolean, nullable=False),
        sa.Column("quarantined", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("connected_at", sa.String(32)),
        sa.Column("last_heartbeat", sa.String(32)),
    )
    op.create_table(
        "assignments",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("worker_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("offered_at", sa.String(32), nullable=False),
        sa.Column("journal_start", sa.BigInteger),
        sa.Column("log_start", sa.BigInteger),
    )
    op.create_index("ix_assignments_worker_id", "assignments", ["worker_id"])
    op.add_column("jobs", sa.Column("worker_id", sa.String(64)))
    op.add_column("jobs", sa.Column("gave_way_to", sa.String(64)))
