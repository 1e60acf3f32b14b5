"""A Databricks workspace: a cluster of the run's own, its stages as one-time jobs with our wheel, files in a Unity
Catalog volume, MLflow over there, a serving endpoint; all of it by databricks-sdk.

Whatever is made carries the run's name and, where the API has tags, `tunewright-run`; it is in the ledger before it is
made. So what a crash left unrecorded is found, and what carries neither is never touched.

What is not covered: workspaces themselves, and what only a real one can show (docs/backends/databricks.md lists it).

    settings    what the recipe's `backend` table says
    workspace   who is asked, and what there is to choose from
    volume      files in the volume
    inputs      what stages read there: data, a base, an adapter, our wheel
    calls       what the SDK's errors mean to a person
    backend     stages as jobs: read this first
"""

from tunewright.backends.databricks.backend import DatabricksBackend

__all__ = ["DatabricksBackend"]
