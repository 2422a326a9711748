"""The few typed errors that users see. Each message is one sentence a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice


class TranseptError(Exception):
    """Base of every error that this library raises on purpose; the command line prints its sentence and exits 1."""


class CheckpointError(TranseptError):
    """A weight file is damaged, lies about itself, or holds other tensors than its family declares."""


class ConfigError(TranseptError):
    """A configuration names something unknown, lacks a field, or asks for arithmetic that the family does not have."""


class MappingError(TranseptError):
    """A name map breaks one of its laws, or a checkpoint does not fit it."""


class TokenizerError(TranseptError):
    """A tokenizer file is damaged or asks for something that cannot be done."""


class TemplateError(TranseptError):
    """A chat template is damaged, leaves its sandbox, or exceeds its budget of steps, time or output."""


class InputError(TranseptError):
    """A request does not fit the model: too long, empty, out of range, of the wrong kind."""


class NumericsError(TranseptError):
    """A weight or a result is not a finite number."""


class SourceError(TranseptError):
    """A model, file or download could not be found, fetched or verified."""


def nearest(word: str, options: Iterable[str]) -> str:
    """' (nearest: ...)' for the option most like `word`, or '' where none is alike."""
    # A hostile file may hold millions of names, and each costs a comparison.
    found = difflib.get_close_matches(str(word)[:200], list(islice(options, 5000)), n=1, cutoff=0.5)
    return f" (nearest: {found[0]!r})" if found else ""
