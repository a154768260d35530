"""What can go wrong in a user's hands. Every message is one sentence that says what was wrong and where."""

from __future__ import annotations


class TrichordError(Exception):
    """Base of every error that a user, a file or a machine can cause."""


class GGUFError(TrichordError):
    """The file is missing, damaged, hostile or not a GGUF file."""


class ModelError(TrichordError):
    """The file is a valid GGUF, but not a model this engine can run."""


class TokenizerError(TrichordError):
    """The file's vocabulary cannot be used, or a token id lies outside it."""


class TemplateError(TrichordError):
    """The chat template is missing, fails or takes too long."""


class RequestError(TrichordError, ValueError):
    """A prompt, a sampling parameter or an argument cannot be honoured."""


class DeviceError(TrichordError):
    """The device asked for is absent, unusable or out of memory."""
