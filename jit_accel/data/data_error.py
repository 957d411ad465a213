"""The error about what is wrong with the data."""

from jit_accel.base.errors import UserError


def data_error(path: object, rule: str) -> UserError:
    """Return the error of a data set, or of one of its files, at `path`."""
    return UserError(rule, about="data_path", value=str(path))
