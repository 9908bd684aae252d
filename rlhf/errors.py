"""Every error a user can meet.

RlhfError
 +-- UserError (exit 2)      bad input; the message names the place, the value and the remedy
 |    +-- ConfigError        a key, its value or a combination of values (also a ValueError)
 |    +-- DataError          a file or a row (also a ValueError)
 +-- ArtifactError           a node's files are missing, changed or half-written
 +-- LauncherError           a scheduler is absent, refuses, or does not answer
 +-- LeaseError              another process works on the node
 +-- StageError              a stage stopped itself: divergence, NaN, no usable samples
 +-- Stopped (exit 75)       a signal asked for the end; the state is saved
"""

from __future__ import annotations

import errno


class RlhfError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(RlhfError):
    """Bad input; reported as one message with exit code 2."""


class ConfigError(UserError, ValueError):
    """A configuration key, value or combination that cannot work."""


class DataError(UserError, ValueError):
    """A file or row that cannot be used."""


class ArtifactError(RlhfError, RuntimeError):
    """A node's artifacts are missing, changed or incomplete."""


class LauncherError(RlhfError, RuntimeError):
    """A scheduler is absent, refuses, or does not answer."""


class LeaseError(RlhfError, RuntimeError):
    """Another live process holds the node."""


class StageError(RlhfError, RuntimeError):
    """A stage stopped itself to protect the last good state."""


class Stopped(RlhfError, RuntimeError):
    """A signal asked the node to stop; everything is saved and the next start goes on from here."""


STOPPED_EXIT = 75
"""Exit code of a node that saved its state and stopped (EX_TEMPFAIL: try again)."""

DISK_FULL = "the disk is full: free some space and run the same command again; what is done stays"


FULL_TEXTS = ("No space left on device", "database or disk is full")
"""What the system says, and SQLite."""


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, is a full disk or an exceeded quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and torch report the system's text in exceptions of their own.
        if any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
