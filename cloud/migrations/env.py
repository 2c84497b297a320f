"""Alembic's entry: runs the revisions on the URL that `cloud.store.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from cloud.store import load_tables, open_engine

engine = open_engine(context.config.attributes["url"])
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=load_tables(), transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
