"""What a recipe's `backend` table says about an API that trains elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What OpenAI's and Azure's have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tokenizer: str | None = None
    """What the base counts tokens by: an encoding of tiktoken (`o200k_base`), a hub name, a folder, or `starter`.
    Default: tiktoken's encoding for the base's name."""
    max_example_tokens: int = Field(default=65536, ge=16)
    """Longest row that the API takes, in tokens; `train.max_length` may ask for less."""
    learning_rate_multiplier: float | None = Field(default=None, gt=0)
    """Default: the API's own choice."""
    suffix: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,18}$")
    """Part of the tuned model's name. Default: made from the recipe's name."""
    concurrency: int = Field(default=4, ge=1, le=64)
    """Questions that are asked at once in evaluation."""
    poll_s: float = Field(default=10, gt=0)
    """Seconds between two looks at a job."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds that one call may take."""
    retries: int = Field(default=6, ge=0)
    """How often a call is asked again that was refused for its rate, or met a fault of the service; the pauses are
    those that the service asks for (`retry-after`), else they double."""


class OpenAISettings(Settings):
    """The rest of the table, for `kind: openai`."""

    base_url: str | None = None
    """`https://host/v1`. Default: OPENAI_BASE_URL, else OpenAI's own."""
    key_variable: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z][A-Z0-9_]*$")
    """The environment variable that holds the key. The key itself is never part of a recipe."""
    organization: str | None = None
    project: str | None = None


class AzureSettings(Settings):
    """The rest of the table, for `kind: azure`."""

    resource_group: str = Field(min_length=1)
    account: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{1,63}$")
    """The Azure OpenAI (or AI Services) resource."""
    subscription: str | None = None
    """Its id. Default: AZURE_SUBSCRIPTION_ID."""
    create_account: bool = False
    """Make the account where it is not there; `destroy` removes and purges it again."""
    account_kind: Literal["OpenAI", "AIServices"] = "OpenAI"
    region: str = "any"
    """Where to make the account. any: the first of `regions` that has quota left for what will be deployed."""
    regions: list[str] = ["northcentralus", "swedencentral", "eastus2"]
    """Regions to choose from, in order of preference."""
    sku: Literal["Standard", "GlobalStandard", "DataZoneStandard", "DeveloperTier"] = "Standard"
    """Of the tuned model's deployment. DeveloperTier has no fee by the hour and ends after 24 hours."""
    base_sku: Literal["Standard", "GlobalStandard", "DataZoneStandard"] = "GlobalStandard"
    """Of the base's deployment, which the comparison needs."""
    capacity: int = Field(default=10, ge=1)
    """Thousand tokens a minute, of each deployment."""
    content_filter: str | None = Field(default=None, min_length=1)
    """A content filter of the account, by its name, for both deployments. Default: Azure's own."""
    dynamic_quota: bool = False
    """Let the tuned model's deployment have more than its capacity when there is spare."""
    training_type: Literal["Standard", "GlobalStandard", "Developer"] | None = None
    """Where the job trains. Default: the API's own choice."""
    model_version: str | None = None
    """Of the base. Default: the date at the end of its name, else its newest."""
    auth: Literal["identity", "key"] = "identity"
    """identity: Azure's default credential, renewed as it runs out. key: the account's key, from `key_variable`, or
    asked of the control plane."""
    key_variable: str = Field(default="AZURE_OPENAI_API_KEY", pattern=r"^[A-Z][A-Z0-9_]*$")
    management: str = "https://management.azure.com"
    """The control plane."""
    management_token_variable: str | None = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]*$")
    """An environment variable with a bearer token for the control plane, instead of a sign-in."""
    endpoint: str | None = None
    """`https://NAME.openai.azure.com`. Default: what the control plane says of the account."""
