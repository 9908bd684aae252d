"""Every error a user can meet.

RlhfError
 +-- UserError (exit 2)      bad input; the message names the place, the value and the remedy
 |    +-- ConfigError        a key, its value or a combination of values (also a ValueError)
 |    +-- DataError          a file or a row (also a ValueError)
 +-- ArtifactError           a node's files are missing, changed or half-written
 +-- LeaseError              another process works on the node
 +-- StageError              a stage stopped itself: divergence, NaN, no usable samples
"""

from __future__ import annotations


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


class LeaseError(RlhfError, RuntimeError):
    """Another live process holds the node."""


class StageError(RlhfError, RuntimeError):
    """A stage stopped itself to protect the last good state."""
