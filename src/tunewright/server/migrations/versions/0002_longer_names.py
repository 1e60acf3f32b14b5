"""Names of tuned models and subscriptions as long as they may be: a base's name, a suffix and a checkpoint's step."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.alter_column("id", existing_type=sa.String(128), type_=sa.String(256), existing_nullable=False)
    with op.batch_alter_table("accounts") as accounts:
        accounts.alter_column(
            "subscription", existing_type=sa.String(64), type_=sa.String(128), existing_nullable=False
        )
