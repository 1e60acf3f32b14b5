"""Tunewright as a wheel, made from the package that is running: for executors and clusters that have none, or another.

A wheel is a zip with the package and its metadata (PyPA, "Binary distribution format"), so no build tool is needed, and
what runs over there is to the byte what runs here, a checkout with changes too.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

NAME = "tunewright"
LEFT_OUT = ("__pycache__", ".pyc")
EPOCH = (1980, 1, 1, 0, 0, 0)


def version() -> str:
    return metadata.version(NAME)


def wheel(folder: Path) -> Path:
    """Write the wheel into a folder; gives its path. The same code gives the same bytes."""
    version = metadata.version(NAME)
    info = f"{NAME}-{version}.dist-info"
    packed = {f"{NAME}/{name}": path.read_bytes() for name, path in _files().items()}
    distribution = metadata.distribution(NAME)
    packed[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    packed[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    packed[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tunewright\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{info}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in packed.items()]
    packed[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    path = folder / f"{NAME}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    os.close(handle)
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in packed.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return path


def unpacked(folder: Path) -> Path:
    """A folder in `folder` that holds the package, for PYTHONPATH; its name says what it holds, so it is made once."""
    digest = hashlib.sha256()
    for name, path in _files().items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    target = folder / f"{metadata.version(NAME)}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".fresh-", dir=folder))
    try:
        with zipfile.ZipFile(wheel(fresh)) as archive:
            archive.extractall(fresh / "site")
        os.chmod(fresh / "site", 0o755)
        try:
            os.replace(fresh / "site", target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _files() -> dict[str, Path]:
    """Every file of the package, by its name inside of it."""
    root = Path(__file__).parent
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): path
        for path in found
        if not any(left in path.parts or path.name.endswith(left) for left in LEFT_OUT)
    }


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
