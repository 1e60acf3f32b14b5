"""What a recipe's `backend` table says about Spark."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunewright.recipe import backend_settings


class Settings(BaseModel):
    """The rest of the recipe's `backend` table, for `kind: spark`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    master: str | None = None
    """`spark://host:7077`, `yarn`, `k8s://...`. Default: what spark-defaults.conf or spark-submit say."""
    processes: int = Field(default=1, ge=1)
    """Processes that train together, one for each of as many slots. They share out the rows of a step
    (`train.batch_size`), so their number changes how long training takes, not what is learnt."""
    threads: int | None = Field(default=None, ge=1)
    """Threads for arithmetic of each task. Default: `spark.task.cpus`."""
    gpus: bool = False
    """Train on the GPUs that Spark gives its tasks (`spark.task.resource.gpu.amount`), by NCCL."""
    partitions: int | None = Field(default=None, ge=1)
    """Parts that the data is prepared and scored in. Default: three for each slot, of 2,000 rows at least to
    prepare and 64 to score."""
    python: str | None = None
    """The executors' Python. Default: the path of this one, or the one in `archive`."""
    archive: str | None = None
    """A packed environment (venv-pack, conda-pack: .tar.gz) that Spark unpacks on each executor."""
    conf: dict[str, str | int | float | bool] = {}
    """Spark's own settings, such as `spark.executor.memory: 8g`."""
    wait_s: float = Field(default=120, gt=0)
    """Seconds to wait for the slots that training needs."""
    patience_s: float = Field(default=600, gt=0)
    """Seconds without a sign of life from a training process after which training is stopped, and it is named."""


def settings(table: dict[str, Any]) -> Settings:
    """The table, checked.

    Raises:
        RecipeError: it holds something unknown or wrong.
    """
    return backend_settings(Settings, "spark", table)
