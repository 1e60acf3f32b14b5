"""Alembic's entry: migrations run on the connection that `store.Store` hands over."""

from alembic import context

from tunewright.server.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
