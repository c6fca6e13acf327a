"""The errors of pullback: what was given, what was expected, what to type next. One page each in docs/errors/."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CoverageError",
    "FormatError",
    "InputError",
    "MethodError",
    "ModelError",
    "SiteError",
    "TargetError",
    "TaskError",
    "nearest",
]


class InputError(ValueError):
    """The inputs cannot be explained as given: empty, not finite, wrong type, or nothing to differentiate."""


class ModelError(ValueError):
    """The model cannot be explained in its present state: dropout in train mode, FSDP, a script under rules."""


class SiteError(ValueError):
    """The site does not exist, is not reached by the forward pass, or is reached more than once."""


class TargetError(ValueError):
    """The target does not name one real number per example of this output."""


class MethodError(ValueError):
    """The method is unknown, misspelled, or has parameters outside their range."""


class CoverageError(ValueError):
    """A nonlinear operation ran that no rule covers, so relevance would be silently wrong."""


class TaskError(ValueError):
    """Tasks of a sweep failed; what the others found is kept, and running again does only what is missing."""


class FormatError(ValueError):
    """A file is not what its name says: wrong format, wrong schema version, or damaged."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to ``name``, quoted, for the "Nearest: ..." part of an error.

    >>> nearest("layer4.2", ["layer4.1", "conv1", "layer4.0"])
    '"layer4.1", "layer4.0"'
    """
    known = list(known)
    found = get_close_matches(name, known, count, cutoff=0.5) or known[:count]
    return ", ".join(f'"{candidate}"' for candidate in found)
