"""Alembic's entry: `store.database.upgrade` hands over the connection and holds the transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
