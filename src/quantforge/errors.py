"""Every error quantforge raises on purpose.

    QuantForgeError
    ├── ConfigError       (ValueError)           a setting that cannot be honoured
    ├── InputError        (ValueError)           data of the wrong shape, dtype or with NaN / inf
    ├── UnsupportedError  (NotImplementedError)  an operation that packed codes do not have
    └── FormatError       (ValueError)           a file that is damaged, foreign or from the future

Messages say what was wrong, what was expected, what was got, and what to do.
"""


class QuantForgeError(Exception):
    """Base of all quantforge errors."""


class ConfigError(QuantForgeError, ValueError):
    """A configuration value that cannot be honoured."""


class InputError(QuantForgeError, ValueError):
    """Input data that cannot be quantized or does not fit: shape, dtype, NaN, infinity."""


class UnsupportedError(QuantForgeError, NotImplementedError):
    """An operation that is not defined on quantized data; the message names the remedy.

    Not a `TypeError`: Python's binary operators swallow those and lose the message.
    """


class FormatError(QuantForgeError, ValueError):
    """A file that cannot be read: damaged, truncated, foreign, or written by a later version."""
