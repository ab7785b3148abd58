"""A model's own code: which classes its folder asks for, and whether the user chose to run them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_lib.errors import ModelError
from ebr_lib.files import write_json
from ebr_lib.logs import logger
from ebr_lib.names import Choice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


# files that may have an auto_map, and its entries that loading a model for texts reads
CONFIG_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
ENTRIES = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")
HEAD = "AutoModelForSequenceClassification"  # what loading a reranker reads instead of AutoModel
LIBRARY = "sentence_transformers."  # modules of any other package are the model's own code
PACKAGE_OF_OWN_CODE = "transformers_modules."  # where transformers imports a model's own code to


@dataclass(frozen=True)
class OwnCode:
    """A class of a model's own: the file that asks for it, as what, and by which reference.

    :param entry: `AutoModel` and the like, or `module` or `activation function`, which the library cannot replace.
    :param reference: `file.Class`, or `owner/repo--file.Class` for code in another repository.
    """

    asked_by: str
    entry: str
    reference: str

    @property
    def replaceable(self) -> bool:
        """Whether the library may have a class of its own for it."""
        return self.entry in ENTRIES

    @property
    def repository(self) -> str | None:
        """The repository that holds the code, if it is not the model's."""
        repository, dashes, _ = self.reference.partition("--")
        return repository if dashes else None

    def __str__(self) -> str:
        return f"{self.entry} {self.reference} in {self.asked_by}"


def own_code(folder: Path, entries: Collection[str] = ENTRIES) -> tuple[OwnCode, ...]:
    """The classes of its own that a model's folder asks for; reads JSON files only."""
    return tuple(code for part, asked in module_folders(folder) for code in (*asked, *_code_of_part(part, entries)))


def module_folders(folder: Path) -> Iterator[tuple[Path, tuple[OwnCode, ...]]]:
    """Folders of a sentence-transformers model's modules, also inside a Router, and each class that is own code."""
    modules = read_json(folder / "modules.json")
    if not isinstance(modules, list):
        yield folder, ()
        return
    for module in modules:
        part = folder / str(module.get("path", ""))
        yield part, _foreign(folder / "modules.json", "module", str(module.get("type", "")), LIBRARY)
        towers = as_mapping(read_json(part / "router_config.json"))
        for place, kind in as_mapping(towers.get("types")).items():
            yield part / place, _foreign(part / "router_config.json", "module", str(kind), LIBRARY)


def _foreign(file: Path, entry: str, reference: str, known: str) -> tuple[OwnCode, ...]:
    return () if not reference or reference.startswith(known) else (OwnCode(str(file), entry, reference),)


def _code_of_part(part: Path, entries: Collection[str]) -> Iterator[OwnCode]:
    for name in CONFIG_FILES:
        values = as_mapping(read_json(part / name))
        auto_map = values.get("auto_map")
        if isinstance(auto_map, list):  # an older form, of tokenizers only
            auto_map = {"AutoTokenizer": auto_map}
        for entry, reference in as_mapping(auto_map).items():
            classes = reference if isinstance(reference, list) else [reference]  # a tokenizer's: slow and fast
            if entry in entries and (named := ", ".join(str(c) for c in classes if c)):
                yield OwnCode(str(part / name), entry, named)
    function = as_mapping(read_json(part / "config.json")).get("activation_function")
    if isinstance(function, str) and "." in function:  # a Dense module's; a transformer's names no package
        yield from _foreign(part / "config.json", "activation function", function, "torch.")


def forget_own_code(folder: Path) -> None:
    """Remove the auto_map from a saved model's configs."""
    for part, _ in module_folders(folder):
        for name in CONFIG_FILES:
            values = as_mapping(read_json(part / name))
            if values.pop("auto_map", None):
                write_json(part / name, values)


def read_json(path: Path) -> Any:
    """The value of a JSON file; None for a missing or broken file, which loading the model reports."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def decide(
    name: str, found: tuple[OwnCode, ...], choice: Choice, *, made_with: Choice | None = None, via: str = ""
) -> Choice:
    """Check a user's choice against a model's own code; False where the model has none.

    :param made_with: the choice under which an adapter was trained or vectors were made, if known.
    :param via: how the model needs the code, for a message: "is an adapter on …, which ".
    :raises ModelError: nothing was chosen and it matters, or the choice is not `made_with`.
    """
    if not choice and (found or made_with):
        asks = f"brings its own code ({found[0]}), and is another model without it" if found else "needs its own code"
        raise ModelError(f"model {name} {via}{asks}; {_remedy(found, made_with)}")
    if not found:
        return False
    if choice == "ignore" and (stuck := [code for code in found if not code.replaceable]):
        raise ModelError(
            f"trust_remote_code: ignore: model {name} {via}asks for {stuck[0]}, which the library has no class for; "
            "read the .py files, then set trust_remote_code: true"
        )
    if made_with is not None and (choice is True) != (made_with is True):
        then, now = (str(value).lower() for value in (made_with or "ignore", choice))
        raise ModelError(
            f"trust_remote_code: {now} was given, but what was made with model {name} was made under {then}, "
            f"which gives other vectors; {_remedy(found, made_with)}"
        )
    return choice


def _remedy(found: tuple[OwnCode, ...], made_with: Choice | None) -> str:
    elsewhere = next((f" of {code.repository}" for code in found if code.repository), "")
    run = f"read the .py files{elsewhere}, then set trust_remote_code: true"
    if made_with:
        return f"{run}, as it was then" if made_with is True else "set trust_remote_code: ignore, as it was then"
    if made_with is False:
        return "set trust_remote_code: ignore, for then the library's class was loaded"
    if not all(code.replaceable for code in found):
        return run
    return f"{run}; or, if its card says that the library's own class is meant, set trust_remote_code: ignore"


def runs_own_code(model: SentenceTransformer) -> bool:
    """Whether any part of a loaded model has a class of the model's own."""
    parts = (part for module in model.modules() for part in (module, getattr(module, "tokenizer", None)))
    return any(type(part).__module__.startswith(PACKAGE_OF_OWN_CODE) for part in parts)


def check_loaded(name: str, model: SentenceTransformer, choice: Choice) -> None:
    """Compare the classes that were loaded with those that the model's configs, as loaded, ask for.

    :raises ModelError: own code was to run and did not, or was left out without a choice.
    """
    from sentence_transformers.sentence_transformer.modules import Transformer

    for module in model.modules():
        if not isinstance(module, Transformer):
            continue
        auto_map = as_mapping(getattr(module.auto_model.config, "auto_map", None))
        heads = [entry for entry in auto_map if entry.startswith("AutoModelFor")]
        if heads and "AutoModel" not in auto_map:
            logger.warning(
                "模型自带代码只用于 %s，向量由库的 %s 计算 (%s: its own code is for other tasks)",
                ", ".join(heads), type(module.auto_model).__name__, name,
            )  # fmt: skip
        asked = as_mapping(getattr(module.tokenizer, "init_kwargs", None)).get("auto_map")
        of_tokenizer = asked.get("AutoTokenizer") if isinstance(asked, dict) else asked
        for loaded, entry, reference in (
            (module.auto_model, "AutoModel", auto_map.get("AutoModel")),
            (module.tokenizer, "AutoTokenizer", of_tokenizer),
        ):
            if not reference or choice == "ignore" or type(loaded).__module__.startswith(PACKAGE_OF_OWN_CODE):
                continue
            code = OwnCode("its config", entry, str(reference))
            decide(name, (code,), choice)  # raises where nothing was chosen
            raise ModelError(
                f"model {name}: trust_remote_code is true, but {type(loaded).__name__} of the library was loaded, not "
                f"{code}; if the library's class is meant, set trust_remote_code: ignore"
            )
