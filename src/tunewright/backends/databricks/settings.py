"""What a recipe's `backend` table says, for `kind: databricks`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """The rest of the recipe's `backend` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    volume: str = Field(pattern=r"^[^./]+\.[^./]+\.[^./]+$")
    """`catalog.schema.volume` of Unity Catalog: the runs lie in it."""
    create_volume: bool = False
    """Make the volume where it is not there; `destroy` removes it again."""
    host: str | None = None
    """`https://...`. Default: what the SDK finds (DATABRICKS_HOST, the profile)."""
    profile: str | None = None
    """Of ~/.databrickscfg. Tokens and secrets are never part of a recipe: the SDK finds them, or signs in."""
    cluster: str | None = None
    """Name or id of a cluster that is there already; it is used and left alone. Default: one for the run."""
    node_type: str | None = None
    """Such as Standard_D4ds_v5. Default: the smallest with 4 cores and 16 GB, or one GPU."""
    workers: int = Field(default=0, ge=0)
    """0: a single node."""
    spark_version: str | None = None
    """Default: the newest ML runtime that is no beta, for GPUs where `gpus` asks for them."""
    gpus: bool = False
    policy: str | None = None
    """Name or id of a cluster policy."""
    access_mode: Literal["SINGLE_USER", "USER_ISOLATION", "NONE"] = "SINGLE_USER"
    autotermination_minutes: int = Field(default=20, ge=10, le=10000)
    """Minutes of idleness after which the cluster ends by itself."""
    libraries: list[str] = []
    """More packages from PyPI, such as `sentencepiece==0.2.1`."""
    tags: dict[str, str] = {}
    """More tags for the cluster and the endpoint."""
    workload_size: Literal["Small", "Medium", "Large"] = "Small"
    """Of the serving endpoint, which scales to zero."""
    processes: int = Field(default=1, ge=1)
    """Processes that train together, as with `kind: spark`."""
    threads: int | None = Field(default=None, ge=1)
    """Threads for arithmetic, on a cluster of the run's own. Default: as many as the libraries take."""
    partitions: int | None = Field(default=None, ge=1)
    """As with `kind: spark`."""
    wait_s: float = Field(default=600, gt=0)
    """Seconds to wait for the slots that training needs."""
    patience_s: float = Field(default=600, gt=0)
    """Seconds without a sign of life from a training process after which training is stopped, and it is named."""
    poll_s: float = Field(default=5, ge=0)
    """Seconds between two looks at a job."""
