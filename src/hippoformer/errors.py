"""Every error this package raises on purpose.

Each message says what was wrong, what was expected, and what to do about it. All derive from
`HippoFormerError`, and each also from the built-in error a caller would naturally catch.
"""


class HippoFormerError(Exception):
    """Base of all errors raised by this package."""


class InputError(HippoFormerError, ValueError):
    """Token ids, masks or labels that no model could read: empty, mis-shaped, or outside the vocabulary."""


class ConfigurationError(HippoFormerError, ValueError):
    """An option whose value contradicts itself, another option, or the base model."""


class UnsupportedArchitectureError(HippoFormerError, ValueError):
    """A base model whose attention cannot be windowed here; the message names what can."""


class BaseModelNotFoundError(HippoFormerError, OSError):
    """The base model is neither cached nor reachable; the message says which file to put where."""


class MemoryFileError(HippoFormerError, ValueError):
    """A memory file that is truncated, foreign, or written by another model."""


class CheckpointError(HippoFormerError, OSError):
    """A hippocampus or training checkpoint that is missing, incomplete, or could not be written."""


class ResultError(HippoFormerError, ValueError):
    """Result files that are missing, not understood, or without what a figure or report needs."""


class TextError(HippoFormerError, ValueError):
    """Text that cannot be read: missing, empty, or not UTF-8."""


class ChatTemplateError(HippoFormerError, ValueError):
    """A tokenizer without a chat template, or one whose template cannot render the turns of a conversation."""


class NonFiniteError(HippoFormerError, ArithmeticError):
    """NaN or infinity in weights or activations, caught before it reaches the memory."""


class CausalityError(HippoFormerError, ValueError):
    """A model whose prediction of a token depends on that token or on later ones: it has no perplexity."""


class MissingPackageError(HippoFormerError, ImportError):
    """An optional package that a part of this library needs and that is not installed; the message says which."""
