"""Files in a Unity Catalog volume, by the Files API."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tunewright.backends.databricks.calls import gone
from tunewright.errors import StageError


class Volume:
    """Files by their paths (`/Volumes/...`); `api` gives the SDK's Files API when it is first wanted."""

    def __init__(self, api: Callable[[], Any]) -> None:
        self.api = api

    def put(self, path: str, content: bytes) -> None:
        self.api().upload(path, io.BytesIO(content), overwrite=True)

    def upload(self, path: str, file: Path) -> None:
        with file.open("rb") as content:
            self.api().upload(path, content, overwrite=True)

    def files(self, folder: str) -> dict[str, int]:
        """Every file below a folder, and its size in bytes."""
        found: dict[str, int] = {}
        folders = [folder]
        while folders:
            for one in self.entries(folders.pop()):
                if one.is_directory:
                    folders.append(one.path)
                else:
                    found[one.path] = one.file_size
        return found

    def entries(self, folder: str) -> list[Any]:
        from databricks.sdk.errors import NotFound

        try:
            return list(self.api().list_directory_contents(folder))
        except NotFound:
            return []

    def is_folder(self, folder: str) -> bool:
        from databricks.sdk.errors import NotFound

        try:
            self.api().get_directory_metadata(folder)
            return True
        except NotFound:
            return False

    def remove_folder(self, folder: str) -> None:
        for one in self.entries(folder):
            if one.is_directory:
                self.remove_folder(one.path)
            else:
                gone(partial(self.api().delete, one.path))
        gone(lambda: self.api().delete_directory(folder))

    def remove_if_empty(self, folder: str) -> None:
        if self.is_folder(folder) and not self.entries(folder):
            gone(lambda: self.api().delete_directory(folder))

    def download(self, name: str, target: Path, size: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                contents = self.api().download(name).contents
                while block := contents.read(2**20):
                    file.write(block)
            if Path(temporary).stat().st_size != size:
                raise StageError(f"{name} came with {Path(temporary).stat().st_size} of {size} bytes; try again")
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """A small file, None where it is not there."""
        from databricks.sdk.errors import NotFound

        try:
            content: bytes = self.api().download(name).contents.read()
        except NotFound:
            return None
        return content
