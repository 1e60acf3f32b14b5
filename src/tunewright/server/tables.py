"""What the server promised, and to whom: the tables, in SQLAlchemy Core.

The run folder says what happened in training; these rows say who asked for it, what they were told, and which keys,
deployments and files there are. Times are Unix seconds. `number` counts up, and lists are in its order, so that two
rows of one second have an order too. Changes here need a migration (`migrations/versions`); a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMES)

BIG = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up only what is declared INTEGER, and keeps 8 bytes in it anyway."""


def _number() -> Column[int]:
    return Column("number", BIG, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", String(128), nullable=False, unique=True)


def _created() -> Column[int]:
    return Column("created_at", BIG, nullable=False)


keys = Table(
    "keys",
    metadata,
    _number(),
    _id(),
    Column("name", String(128), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scope", String(16), nullable=False),
    _created(),
    Column("expires_at", BIG),
    Column("revoked_at", BIG),
    Column("account", String(64)),  # keys of an account (listKeys); null for those of the command line
)

usage = Table(
    "usage",
    metadata,
    Column("key_id", String(128), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", BIG, nullable=False, default=0),
    Column("prompt_tokens", BIG, nullable=False, default=0),
    Column("completion_tokens", BIG, nullable=False, default=0),
)

files = Table(
    "files",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("bytes", BIG, nullable=False),
    Column("filename", String(1024), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("expires_at", BIG),
    Index(None, "purpose", "number"),
)

uploads = Table(
    "uploads",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("bytes", BIG, nullable=False),
    Column("filename", String(1024), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("mime_type", String(255), nullable=False),
    Column("status", String(16), nullable=False),  # pending, completed, cancelled, expired
    Column("expires_at", BIG, nullable=False),
    Column("file_expires_s", BIG),
    Column("file_id", String(128)),
)

parts = Table(
    "parts",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("upload_id", String(128), ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("bytes", BIG, nullable=False),
)

bases = Table(
    "bases",
    metadata,
    _number(),
    Column("name", String(256), nullable=False, unique=True),
    Column("source", String(1024), nullable=False),
    Column("revision", String(64)),
    Column("recipe", JSON, nullable=False),  # key=value, as after --set: how jobs on this base train
    _created(),
    Column("retires_at", BIG),
    Column("fine_tune_until", BIG),
)

jobs = Table(
    "jobs",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("key_id", String(128), nullable=False),
    Column("surface", String(8), nullable=False),  # openai, azure: names and result files have each its form
    Column("model", String(256), nullable=False),
    Column("training_file", String(128), nullable=False),
    Column("validation_file", String(128)),
    Column("suffix", String(64)),
    Column("seed", BIG, nullable=False),
    Column("method", JSON, nullable=False),
    Column("metadata", JSON),
    Column("integrations", JSON),
    Column("hyperparameters", JSON, nullable=False),  # as asked; numbers once they are settled
    Column("status", String(20), nullable=False),
    Column("wanted", String(8), nullable=False),  # run, pause, cancel
    Column("claimed_by", String(128)),
    Column("heartbeat_at", Float),
    Column("begun_at", Float),  # when it was last claimed: keys take turns
    Column("run_id", String(128)),
    Column("error", JSON),
    Column("fine_tuned_model", String(256)),
    Column("finished_at", BIG),
    Column("estimated_finish", BIG),
    Column("trained_tokens", BIG),
    Column("result_files", JSON, nullable=False),
    Index(None, "status", "number"),
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
    Index(None, "key", "value"),
)

events = Table(
    "events",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("what", String(64), nullable=False),  # step 12, started, ...: a worker that begins again says it once
    Column("level", String(8), nullable=False),
    Column("message", String, nullable=False),
    Column("type", String(16), nullable=False),
    Column("data", JSON),
    UniqueConstraint("job_id", "what"),
    Index(None, "job_id", "number"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("model", String(256), nullable=False),
    Column("step", BIG, nullable=False),
    Column("metrics", JSON, nullable=False),
    UniqueConstraint("job_id", "step"),
)

models = Table(
    "models",
    metadata,
    _number(),
    Column("id", String(256), nullable=False, unique=True),
    _created(),
    Column("job_id", String(128), nullable=False, index=True),
    Column("base", String(256), nullable=False),
    Column("source", String(1024), nullable=False),  # of the base, whatever its name means by now
    Column("revision", String(64)),
    Column("folder", String(1024), nullable=False),  # what is loaded, relative to the data folder
    Column("kind", String(8), nullable=False),  # adapter, full
    Column("checkpoint", Boolean, nullable=False, default=False),
)

accounts = Table(
    "accounts",
    metadata,
    _number(),
    Column(
        "name", String(64), nullable=False, unique=True
    ),  # in lower case, as all of Azure's names: body has it as given
    Column("subscription", String(128), nullable=False),
    Column("resource_group", String(128), nullable=False),
    Column("location", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    _created(),
    Column("deleted_at", BIG),
)

deployments = Table(
    "deployments",
    metadata,
    _number(),
    Column("account", String(64), nullable=False),
    Column("name", String(64), nullable=False),  # in lower case
    Column("shown", String(64), nullable=False),  # as it was given
    _created(),
    Column("model", String(256), nullable=False),
    Column("sku", JSON, nullable=False),
    Column("properties", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", String),
    Column("tags", JSON),
    UniqueConstraint("account", "name"),
)

policies = Table(
    "policies",
    metadata,
    _number(),
    Column("account", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    _created(),
    UniqueConstraint("account", "name"),
)

blocklists = Table(
    "blocklists",
    metadata,
    _number(),
    Column("account", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("body", JSON, nullable=False),  # its items too, by their names
    _created(),
    UniqueConstraint("account", "name"),
)

batches = Table(
    "batches",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("key_id", String(128), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(128), nullable=False),
    Column("output_file_id", String(128)),
    Column("error_file_id", String(128)),
    Column("status", String(16), nullable=False),
    Column("metadata", JSON),
    Column("errors", JSON),
    Column("counts", JSON, nullable=False),
    Column("times", JSON, nullable=False),
    Column("claimed_by", String(128)),
    Column("heartbeat_at", Float),
)

responses = Table(
    "responses",
    metadata,
    _number(),
    _id(),
    _created(),
    Column("key_id", String(128), nullable=False),
    Column("body", JSON, nullable=False),
    Column("conversation", JSON, nullable=False),
)
