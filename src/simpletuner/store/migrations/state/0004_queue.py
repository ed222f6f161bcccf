"""What the queue knows of a job."""

import sqlalchemy as sa
from alembic import op

revision = "state_0004"
down_revision = "state_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority_override", sa.Integer))
    op.add_column("jobs", sa.Column("requires_approval", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("worker_labels", sa.JSON))
    op.add_column("jobs", sa.Column("peak_bytes", sa.BigInteger))
