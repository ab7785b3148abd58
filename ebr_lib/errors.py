"""Errors that a user can fix, a class per kind; messages say what was wanted and found, where, and what to do.

The command line prints them without a traceback and exits with 2; any other exception is a bug.
"""


class UserError(Exception):
    """Base of all errors that the user can fix."""


class ConfigError(UserError, ValueError):
    """Knobs that are unknown, out of range or contradict each other; lists all of them."""


class DataError(UserError, ValueError):
    """A data file lacks something that the stage needs; names the file and, if known, the line."""


class ModelError(UserError, ValueError):
    """A model cannot be loaded, or is not the expected one."""


class NotFiniteError(ModelError):
    """A model gives NaN or infinite values for some texts; names them."""


class NotInstalledError(UserError, ImportError):
    """An optional package is missing; names the extra that installs it."""


class MissingError(UserError, FileNotFoundError):
    """A file or folder is not where the config says."""

    def __str__(self) -> str:  # FileNotFoundError would show an errno tuple
        return str(self.args[0]) if self.args else ""
