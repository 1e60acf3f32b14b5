"""A standalone cluster with two workers on loopback for each process that runs tests; skipped where Java is absent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clusters import cluster, stop


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two workers, with one slot and 2 GB each."""
    folder = tmp_path_factory.mktemp("cluster")
    yield cluster(folder)
    stop(folder)
