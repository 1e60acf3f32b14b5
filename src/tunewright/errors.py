"""Every error that Tunewright raises for a person, in one tree.

    TunewrightError              something that we explain in one line
        UserError                the input is at fault: exit code 2
            RecipeError          the recipe does not say something we can do
            DataError            a row, a file or a data set
            ModelError           the base model
            RunError             a run folder: absent, busy, written by a newer version
            EndpointError        an endpoint: busy port, rendering that differs
            GraderError          a grader that cannot say what an answer is worth
        StageError               a stage failed for a reason of ours or of the machine: exit code 1
        DiskFullError            no space left: exit code 1

Each also inherits the built-in that it resembles, so that `except ValueError` works in a notebook.
What is not covered: outcomes that are no errors, such as "not better than the base" (exit code 3, see `life`).
"""

from __future__ import annotations

import errno

DONE = 0
FAULT = 1
BAD_INPUT = 2
NOT_BETTER = 3
INTERRUPTED = 130
NOT_OURS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS)
"""What the system says of a path that a person gave and that cannot be read or written."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""What torch says where no memory is left: on a CPU, and on a GPU or Apple's."""


class TunewrightError(Exception):
    """An error with a message for a person: what was wrong, where, and what to do next."""

    exit_code = FAULT


class UserError(TunewrightError, ValueError):
    """The input is at fault."""

    exit_code = BAD_INPUT


class RecipeError(UserError):
    """A recipe that cannot be read, or that asks for something that cannot be done."""


class DataError(UserError):
    """A data file, a row or a whole data set that cannot be used."""


class ModelError(UserError):
    """A base model that is not there or does not fit."""


class RunError(UserError):
    """A run folder that is absent, in use, or written by a newer version."""


class RunBusyError(RunError):
    """A run that another process is working on."""


class EndpointError(UserError):
    """An endpoint that cannot go live."""


class GraderError(UserError):
    """A grader that fails on an answer: the row lacks a field, a function raises, a model says no number."""


class StageError(TunewrightError, RuntimeError):
    """A stage ended without its result; the log in the run folder holds the traceback."""


class DiskFullError(TunewrightError, OSError):
    """No space left on the device."""


def from_name(name: str, message: str) -> TunewrightError:
    """The error that a stage reported by class name, raised again on this side of the process boundary."""
    kinds = {kind.__name__: kind for kind in _tree(TunewrightError)}
    return kinds.get(name, StageError)(message)


def explained(error: BaseException) -> TunewrightError | None:
    """The error in our tree that says what happened, None where we have no name for it."""
    if isinstance(error, TunewrightError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return DiskFullError(f"{where}no space left on the disk; free some and run the same command again")
    if isinstance(error, OSError) and error.filename and error.errno in NOT_OURS:
        return UserError(f"{error.filename}: {error.strerror}")
    if isinstance(error, Exception) and "No space left on device" in str(error):  # safetensors, torch
        return DiskFullError("no space left on the disk; free some and run the same command again")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    ):
        return StageError(
            "out of memory; set train.gradient_checkpointing: true, train.method: lora, a smaller train.batch_size, "
            "evaluate.batch_size or train.max_length, and run the same command again"
        )
    return None


def _tree(kind: type[TunewrightError]) -> list[type[TunewrightError]]:
    return [kind, *(below for sub in kind.__subclasses__() for below in _tree(sub))]
