"""The bytes of files: in a folder, or in an object store that fsspec knows (`s3://bucket/prefix`, `abfs://...`).

Bytes go through in chunks, so a large file takes no more memory than a small one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tunewright.errors import EndpointError

CHUNK = 1 << 20


class Blobs:
    """Named bytes.

    Args:
        url: a folder, or a URL of fsspec.
        cache: a folder for local copies of what lies in an object store.

    Raises:
        EndpointError: fsspec does not know the kind of store, or its package is not installed.
    """

    def __init__(self, url: str, cache: Path) -> None:
        import fsspec

        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise EndpointError(f"--files {url}: {error}") from None
        self._local = "file" in _protocols(self._system)
        self._cache = cache
        if self._local:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """A blob to write; it is there once the block has ended, and is not where it raises."""
        if self._local:
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self._root)
            try:
                with os.fdopen(handle, "wb") as file:
                    yield Writer(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path(name))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._cache) as file:  # an object is written at once, when it is whole
            yield Writer(file)  # type: ignore[arg-type]
            file.flush()
            self._system.put_file(file.name, self._path(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a blob."""
        with self._system.open(self._path(name), "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def local(self, name: str, suffix: str = "") -> Path:
        """A path of this machine with the blob's bytes, its name ending in `suffix`."""
        source = Path(self._path(name)) if self._local else self._fetched(name)
        if not suffix:
            return source
        named = self._cache / f"{name}{suffix}"
        if not named.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                fresh = Path(folder) / "blob"
                try:
                    os.link(source, fresh)
                except OSError:  # another file system
                    shutil.copyfile(source, fresh)
                os.replace(fresh, named)
        return named

    def delete(self, name: str, *, unfinished: bool = False) -> None:
        """Remove a blob and its local copies; one that is not there is fine.

        Args:
            unfinished: also what a writer that was killed has left of it.
        """
        if unfinished and self._local:
            for left in Path(self._root).glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))
        for copy in self._cache.glob(f"{name}*"):
            copy.unlink(missing_ok=True)

    def _fetched(self, name: str) -> Path:
        copy = self._cache / name
        if not copy.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache) as folder:
                self._system.get_file(self._path(name), str(Path(folder) / "blob"))
                os.replace(Path(folder) / "blob", copy)
        return copy

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class Writer:
    """Takes bytes, counts and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.size = 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()


def _protocols(system: object) -> tuple[str, ...]:
    said = getattr(system, "protocol", ())
    return (said,) if isinstance(said, str) else tuple(said)
