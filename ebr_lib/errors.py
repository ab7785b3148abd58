"""The mistakes a user can make, one class a kind: what was wanted, what was found, where, what to do.

The command line shows these without a stack and exits with 2; anything else that is raised is a bug of ours.
"""


class UserError(Exception):
    """Base of every error that the user, not the program, can mend."""


class ConfigError(UserError, ValueError):
    """One or more knobs are unknown, out of range or contradict each other; all of them are listed."""


class DataError(UserError, ValueError):
    """A data file does not hold what the stage needs; names the file and, where there is one, the line."""


class ModelError(UserError, ValueError):
    """A model cannot be loaded, or is not the model that it should be."""


class NotFiniteError(ModelError):
    """A model gives vectors with NaN or infinite values for some texts, which it names."""


class MissingError(UserError, FileNotFoundError):
    """A file or folder is not where the config says."""

    def __str__(self) -> str:  # FileNotFoundError would show an errno tuple
        return str(self.args[0]) if self.args else ""
