"""Events under one durable counter, and how far each journal has been read."""

import sqlalchemy as sa
from alembic import op

revision = "events_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("index", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(96), nullable=False, unique=True),
        sa.Column("job_id", sa.String(64)),
        sa.Column("type", sa.String(48), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job", "events", ["job_id", "index"])
    op.create_index("ix_events_job_type", "events", ["job_id", "type", "index"])
    op.create_table(
        "journals",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("offset", sa.Integer, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
    )
