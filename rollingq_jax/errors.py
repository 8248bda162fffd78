"""Errors that a user can cause and mend.

Each message is one line that names the field, the value that came and what is allowed. The command
lines print it without a traceback and leave with exit code 2.
"""


class UserError(ValueError):
    """A mistake on the user's side: the message says what to change."""


class ConfigError(UserError):
    """A configuration field is unknown, has the wrong type or a value out of range."""


class DataError(UserError):
    """A data set, file or array is missing, damaged or not of the expected form."""


class CheckpointError(UserError):
    """A checkpoint or working directory cannot be used as asked."""


class NonFiniteError(UserError):
    """A loss, a gradient or a state is NaN or infinite."""
