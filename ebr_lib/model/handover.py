"""What the stages of one workflow hand over to each other, so that all of them can be checked before any runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebr_lib.data.embeddings.files import iter_embeddings
from ebr_lib.errors import MissingError, UserError
from ebr_lib.model.contract import CONTRACT_FILE
from ebr_lib.model.packaged import find_model
from ebr_lib.names import did_you_mean

MODEL_FILES = ("modules.json", "config.json", "adapter_config.json", CONTRACT_FILE)
"""A folder with one of these may be a model."""


@dataclass
class Handover:
    """What the stages that run before a stage will have written.

    :ivar models: folder of each model, and whether it will hold held-out queries.
    :ivar columns: kept columns of each embedding file, and `encoded` the column of its texts.
    :ivar pairs: the training pairs that are made out of a log, as the user writes their path.
    :ivar files: these, and the folder of held-out queries with its files.
    """

    models: dict[Path, bool] = field(default_factory=dict)
    columns: dict[Path, Sequence[str]] = field(default_factory=dict)
    encoded: dict[Path, str] = field(default_factory=dict)
    pairs: Path | None = None
    files: set[Path] = field(default_factory=set)

    def check_model(self, knob: str, name: str) -> Iterator[str]:
        """Yield an error if a model is neither here nor trained before; a hub's name is not looked up."""
        if Path(name).expanduser().resolve() in self.models:
            return
        try:
            folder = Path(find_model(name))
        except UserError as error:
            yield f"{knob}: {error}{_nearest(name, self.models)}"
            return
        if not folder.is_absolute() and (near := _nearest(name, self.models, there=False)):
            yield f"{knob}: model {name} is not there{near}"
        if folder.is_absolute() and not any((folder / file).is_file() for file in MODEL_FILES):
            yield f"{knob}: {name} is a folder without a model: none of {', '.join(MODEL_FILES)} is in it"

    def columns_of(self, knob: str, path: str, errors: list[str]) -> Sequence[str] | None:
        """The kept columns of an embedding file, or None and an error if there is no such file now or then."""
        place = Path(path).expanduser()
        if place.resolve() in self.columns:
            return self.columns[place.resolve()]
        try:
            return list(next(iter_embeddings(place)).columns)
        except MissingError:
            errors.append(
                f"{knob}: {path} is not there, and no stage that is switched on writes it{_nearest(path, self.columns)}"
            )
        except UserError as error:
            errors.append(f"{knob}: {error}")
        return None

    def not_written(self, paths: str | Sequence[str] | None) -> list[str]:
        """The given paths that no earlier stage writes."""
        given = [paths] if isinstance(paths, str) else paths or ()
        return [path for path in given if Path(path).expanduser().resolve() not in self.files]


def check_columns(wanted: dict[str, str | None], found: Sequence[str] | None, path: str) -> Iterator[str]:
    """Yield an error for each column that an embedding file will not have.

    :param wanted: knob to column; None is not asked for.
    :param found: None if it is not known.
    """
    for knob, name in wanted.items():
        if name is not None and found is not None and name not in found:
            columns = ", ".join(found) or "none"
            yield f"{knob}: {path} has no column {name}{did_you_mean(name, found)}; its kept columns are {columns}"


def check_paths(**paths: str | Sequence[str] | None) -> Iterator[str]:
    """Yield an error for each path, by knob, that is not there."""
    for knob, given in paths.items():
        for path in [given] if isinstance(given, str) else given or ():
            if not Path(path).expanduser().exists():
                yield f"{knob}: {path} is not there{_nearest(path, ())}"


def errors_of(read: Callable[[], object]) -> Iterator[str]:
    """Yield the error of a function that fails for a user's mistake."""
    try:
        read()
    except UserError as error:
        yield str(error)


def _nearest(path: str, planned: Iterable[Path], *, there: bool = True) -> str:
    """The name nearest to a path, among those in its folder (if they are `there`) and those that will be in it."""
    place = Path(path).expanduser()
    folder = place.parent
    names = [file.name for file in folder.iterdir()] if there and folder.is_dir() else []
    return did_you_mean(place.name, [*names, *(file.name for file in planned if file.parent == folder.resolve())])
