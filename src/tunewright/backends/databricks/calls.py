"""Calls of the workspace: what their errors mean to a person, and that absent is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tunewright.errors import StageError, UserError


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """The SDK's errors as ours, in one line and without what could be secret."""
    from databricks.sdk.errors import DatabricksError, PermissionDenied, ResourceExhausted, Unauthenticated
    from requests import RequestException

    try:
        yield
    except Unauthenticated as error:
        raise UserError(f"Databricks: {doing}: not signed in ({line(error)}); run `databricks auth login`") from None
    except PermissionDenied as error:
        raise UserError(f"Databricks: {doing}: not allowed ({line(error)}); ask the workspace's admin") from None
    except ResourceExhausted as error:
        raise UserError(f"Databricks: {doing}: a quota is used up ({line(error)}); wait, or ask for more") from None
    except DatabricksError as error:
        kind = StageError if _is_theirs(error) else UserError
        raise kind(f"Databricks: {doing}: {line(error)}") from None
    except (TimeoutError, RequestException, ConnectionError) as error:
        raise StageError(f"Databricks: {doing}: the workspace does not answer ({line(error)})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Databricks: {doing}: {line(error)}") from None


def gone(call: Callable[[], Any]) -> None:
    """Remove something; absent is gone."""
    from databricks.sdk.errors import NotFound

    with contextlib.suppress(NotFound):
        call()


def _is_theirs(error: Any) -> bool:
    from databricks.sdk.errors import InternalError, TemporarilyUnavailable, TooManyRequests

    return isinstance(error, InternalError | TemporarilyUnavailable | TooManyRequests)


def line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
