"""Errors that a user can fix, a class per kind; messages say what was wanted and found, where, and what to do.

The command line prints them without a traceback and exits with 2; any other exception is a bug.
"""


class UserError(Exception):
    """Base of all errors that the user can fix."""

    zh = "有误"

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message in a box, without the stack."""
        return [_box(f"{self.zh} {type(self).__name__}", str(self))]


class ConfigError(UserError, ValueError):
    """Knobs that are unknown, out of range or contradict each other; lists all of them."""

    zh = "参数有误"


class DataError(UserError, ValueError):
    """A data file lacks something that the stage needs; names the file and, if known, the line."""

    zh = "数据有误"


class ModelError(UserError, ValueError):
    """A model cannot be loaded, or is not the expected one."""

    zh = "模型有误"


class NotFiniteError(ModelError):
    """A model gives NaN or infinite values for some texts; names them."""

    zh = "数值异常"


class NotInstalledError(UserError, ImportError):
    """An optional package is missing; names the extra that installs it."""

    zh = "缺少安装包"


class MissingError(UserError, FileNotFoundError):
    """A file or folder is not where the config says."""

    zh = "找不到文件"

    def __str__(self) -> str:  # FileNotFoundError would show an errno tuple
        return str(self.args[0]) if self.args else ""


class Interrupted(KeyboardInterrupt):
    """A stage was stopped by the user, and has saved what it had; the message says how to go on."""

    def _render_traceback_(self) -> list[str]:
        return [_box("已中断 interrupted", str(self))]


def _box(title: str, text: str) -> str:
    red, bold, plain = "\x1b[31m", "\x1b[1m", "\x1b[0m"
    body = "\n".join(f"{red}┃{plain} {line}" for line in text.splitlines())
    return f"{red}┏━ {bold}{title}{plain}\n{body}\n{red}┗━{plain}"
