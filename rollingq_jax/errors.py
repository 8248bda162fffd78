"""Errors that a user can cause and mend.

Each message is one line that names the field, the value that came and what is allowed. The command
lines print it without a traceback and leave with exit code 2.
"""


class UserError(ValueError):
    """A mistake on the user's side: the message says what to change.

    Example:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.rolling_query(beta=-1.0)
      ... except rq.UserError as error:
      ...     print(error)
      beta is -1.0; allowed: 0 or more
    """


class ConfigError(UserError):
    """A configuration field is unknown, has the wrong type or a value out of range.

    Example:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.build_model({"num_classes": 3, "dim": "wide"})
      ... except rq.ConfigError as error:
      ...     print(error)
      model.dim is 'wide'; allowed: an integer >= 1
    """


class DataError(UserError):
    """A data set, file or array is missing, damaged or not of the expected form.

    Example:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.models.infer_kind((10, 2), complex)
      ... except rq.DataError as error:
      ...     print(error)
      an array of shape (10, 2) and dtype complex128 is of no known kind; allowed: ...
    """


class CheckpointError(UserError):
    """A checkpoint or working directory cannot be used as asked.

    Example:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.load("nowhere")
      ... except rq.CheckpointError as error:
      ...     print(error)
      workdir is 'nowhere'; allowed: the folder of a run, with config.json and checkpoints
    """


class NonFiniteError(UserError):
    """A loss, a gradient or a state is NaN or infinite."""


def said(error: BaseException) -> str:
    """What the system, or a client of gs://, said: in one line, to be quoted in a message."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
