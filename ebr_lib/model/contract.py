"""The contract of a saved model: how to use it, and probe vectors that show whether it still gives the same ones."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebr_lib.errors import ModelError
from ebr_lib.files import sha256_of, write_json
from ebr_lib.logs import logger
from ebr_lib.model.positions import position_limit
from ebr_lib.model.remote_code import as_mapping, module_folders, read_json, runs_own_code
from ebr_lib.names import Choice, OnChangedVectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CONTRACT_FILE = "ebr_contract.json"
# files beside the weights that vectors depend on; a training run writes other files into the folder as well
SETUP_FILES = ("modules.json", "*config.json", "tokenizer.json", "vocab.txt", "*.model", "*.py")
# Largest relative distance of a probe's vector to the saved one that counts as rounding. Measured in float32 on a CPU,
# models of 6 and 24 layers: 1, 2 and 4 threads 0; alone, without padding 1.6e-6; eager attention 1e-6; without oneDNN
# 1e-6; AVX2 1.6e-6; without AVX 1.7e-6; against float64 1.5e-6; adapter merged 2.8e-6. With weights or arithmetic in
# bfloat16 6e-3 to 2e-2: "other" is for those.
ROUNDING = {"float32": 3e-4, "other": 4.5e-2}
UNKNOWN_CAUSE = (
    "a tensor that was not loaded, or other arithmetic; no file, setting or library that is recorded differs"
)
LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "peft")
PROBES = (
    "wireless earphones that stay in while running",
    "How do I cancel a payment I made by card?",
    "送给妈妈的生日礼物",
    "热水器不出热水怎么办",
    "iPhone 15 手机壳 透明 防摔",
    "a",
)


@dataclass(frozen=True)
class Contract:
    """How a saved model was trained.

    `adapter_side` is "both", or "query" if documents keep the base model's vectors. `probes` maps a side to the vectors
    (texts × dimensions) of `PROBES` with that side's prompt. `number_type` is the type of the weights that made them,
    `libraries` the versions, `base_files` and `own_files` the sha256 of the files of base and model.
    """

    base_model: str
    base_sha256: str | None
    trust_remote_code: Choice
    prompts: dict[str, str]
    max_seq_length: int
    pooling: str
    normalize: bool
    dimension: int
    merged: bool = False
    adapter_side: str = "both"
    matryoshka_dims: tuple[int, ...] = ()
    probes: dict[str, list[list[float]]] = field(default_factory=dict)
    number_type: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    base_files: dict[str, str] = field(default_factory=dict)
    own_files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the contract into a saved model's folder, with the sha256 of the files there."""
        write_json(folder / CONTRACT_FILE, asdict(replace(self, own_files=named_sha256(folder))))


def read_contract(folder: str | Path) -> Contract | None:
    """Read the contract in a model's folder; None where there is none.

    :raises ModelError: it cannot be read.
    """
    path = Path(folder) / CONTRACT_FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Contract(**values)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{path} is not a readable contract ({error}); take the model from its original place"
        ) from error


def trained_dims(folder: Path) -> tuple[int, ...]:
    """Dimensions to which a model says that its vectors can be cut (Matryoshka); empty where it says nothing."""
    if (contract := read_contract(folder)) and contract.matryoshka_dims:
        return tuple(contract.matryoshka_dims)
    for name in ("config_sentence_transformers.json", "config.json"):
        said = as_mapping(read_json(folder / name))
        if dims := said.get("matryoshka_dims") or said.get("matryoshka_dimensions"):
            return tuple(map(int, dims))
    return ()


def setup_of(model: SentenceTransformer) -> dict[str, Any]:
    """A model's pooling, normalisation and dimension, as keys of a `Contract`."""
    pooling = next((module for module in model if type(module).__name__ == "Pooling"), None)
    return {
        "pooling": str(getattr(pooling, "pooling_mode", "none")),
        "normalize": any(type(module).__name__ == "Normalize" for module in model),
        "dimension": int(model.get_embedding_dimension() or 0),
    }


def probe_vectors(model: SentenceTransformer, prompt: str) -> list[list[float]]:
    """Vectors of the probe texts (texts × dimensions), to seven digits."""
    vectors = model.encode(list(PROBES), prompt=prompt or None, show_progress_bar=False, convert_to_numpy=True)
    return [[float(f"{x:.7g}") for x in vector] for vector in vectors]


def number_type(model: SentenceTransformer) -> str:
    """The type of a model's weights, such as float32; with several, one that is not float32."""
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    return min(kinds - {"float32"}, default="float32")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that vectors depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in LIBRARIES}


def check_probes(
    model: SentenceTransformer,
    contract: Contract,
    side: str,
    on_changed_vectors: OnChangedVectors,
    *,
    name: str,
    folder: Path,
    base: Path | None,
) -> None:
    """Compare a model's probe vectors, and the length that it cuts texts to, with those that were saved.

    :param side: "query" or "document"; if both sides have the same weights, the other's probes are compared too.
    :param name: the model's, as the user gave it.
    :param folder: the model's own.
    :param base: folder of its base, which is `folder` for a merged model; None if it is not on this machine.
    :raises ModelError: they differ by more than rounding, unless `on_changed_vectors` is "warn", which logs it.
    """
    sides = [side] if contract.adapter_side == "query" else [side, "document" if side == "query" else "query"]
    distance = max(_distance(model, contract, each, name) for each in sides)
    same_type = number_type(model) == contract.number_type
    allowed = ROUNDING[contract.number_type if same_type and contract.number_type in ROUNDING else "other"]
    shorter = _other_length(model, contract, side)
    if distance <= allowed and not shorter:
        return
    causes = [*shorter, *_differences(model, contract, folder, base)]
    said = (
        f"model {name}: these are not the vectors that were saved: {distance:.2g} of their length away, where "
        f"{allowed:.2g} is rounding; likely cause: {'; '.join(causes) or UNKNOWN_CAUSE}. Vectors made earlier do not "
    )
    if on_changed_vectors == "error":
        raise ModelError(
            f"{said}match these: put back what changed, or set on_changed_vectors: warn and encode everything again"
        )
    logger.warning("向量与保存时不同 %smatch these (on_changed_vectors: warn)", said)


def _distance(model: SentenceTransformer, contract: Contract, side: str, name: str) -> float:
    """Largest distance of a probe's vector to the saved one, relative to the saved one's length."""
    saved = np.asarray(contract.probes.get(side, []), dtype=np.float64)
    if not saved.size:
        return 0.0
    now = np.asarray(probe_vectors(model, contract.prompts.get(side) or ""), dtype=np.float64)
    if now.shape != saved.shape:
        raise ModelError(f"{name}: vectors of {now.shape[1]} dimensions, the model was saved with {saved.shape[1]}")
    lengths = np.maximum(np.linalg.norm(saved, axis=1), 1e-12)
    return float(np.nan_to_num(np.linalg.norm(now - saved, axis=1) / lengths, nan=np.inf).max())


def _other_length(model: SentenceTransformer, contract: Contract, side: str) -> list[str]:
    """Report that long texts are cut at another length, which the short probes do not show."""
    if not contract.max_seq_length or (contract.adapter_side == "query" and side == "document"):
        return []
    wanted = min(contract.max_seq_length, position_limit(model) or contract.max_seq_length)
    now = model.max_seq_length
    return [] if now == wanted else [f"length (texts are cut at {now} tokens, {wanted} then)"]


def _differences(model: SentenceTransformer, contract: Contract, folder: Path, base: Path | None) -> Iterator[str]:
    """Known differences to when the model was saved, the surest causes first."""
    if contract.trust_remote_code is True and not runs_own_code(model):
        yield "remote code (the model's own code ran then, and its files no longer ask for it)"
    if not contract.merged:  # a merged model does not need its base
        yield from _changed_files("base", base, contract.base_files)
    yield from _changed_files("model", folder, contract.own_files)
    then = asdict(contract)
    yield from (f"{name} {then[name]} then, {now} now" for name, now in setup_of(model).items() if now != then[name])
    own = as_mapping(as_mapping(read_json(folder / "config_sentence_transformers.json")).get("prompts"))
    yield from (
        f"prompt ({side}: {own[side]!r} beside the weights, {text!r} in the contract)"
        for side, text in contract.prompts.items()
        if side in own and own[side] != text
    )
    if contract.number_type != (now := number_type(model)):
        then_type = (
            f"{contract.number_type} then," if contract.number_type else "not recorded then, by an older version;"
        )
        yield f"precision ({then_type} {now} now)"
    for name, now in library_versions().items():
        if (version := contract.libraries.get(name, now)) != now:
            yield f"library {name} {version} then, {now} now"


def _changed_files(owner: str, folder: Path | None, then: dict[str, str]) -> Iterator[str]:
    now = named_sha256(folder) if folder and then else then
    changed = sorted(file for file in then if now.get(file) != then[file])
    if code := [file for file in changed if file.endswith(".py")]:
        yield f"remote code (files of the {owner} that changed: {', '.join(code)})"
    if others := [file for file in changed if file not in code]:
        yield f"another {owner} than then (files that changed: {', '.join(others)})"


def weights_sha256(folder: str | Path) -> str | None:
    """One sha256 for the safetensors files of a model's folder, or of its modules' folders (two towers, static
    embeddings); None where there are none."""
    parts = (part for part, _ in module_folders(Path(folder)))
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(f for p in parts for f in p.glob("*.safetensors"))
    stats = [(str(file), file.stat()) for file in files]
    return _sha256_of_files(tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))


@functools.lru_cache(maxsize=64)
def _sha256_of_files(files: tuple[tuple[str, int, int, int], ...]) -> str | None:
    """`weights_sha256` of files (name, bytes, last change, inode), cached: a run asks several times."""
    sums = [sha256_of(name) for name, *_ in files]
    if len(sums) <= 1:
        return sums[0] if sums else None
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def named_sha256(folder: str | Path, weights: bool = True) -> dict[str, str]:
    """The sha256 of every file that a model's vectors depend on, by its path in the folder.

    :param weights: include the weights at the root.
    """
    folder = Path(folder)
    modules = read_json(folder / "modules.json") or []
    patterns = ("*.safetensors", *SETUP_FILES)
    files = [file for pattern in patterns[0 if weights else 1 :] for file in folder.glob(pattern)]
    for part in dict.fromkeys(module["path"] for module in modules if module["path"]):
        files += [file for pattern in patterns for file in (folder / part).glob(pattern)]
    return {file.relative_to(folder).as_posix(): _sha256_without_place(file) for file in files}


def files_sha256(folder: str | Path) -> str:
    """One sha256 for everything that a model's vectors depend on besides the weights of `weights_sha256`.

    It differs for models with equal weights and another pooling, dense layer or tokenizer.
    """
    named = sorted(named_sha256(folder, weights=False).items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _sha256_without_place(file: Path) -> str:
    """The sha256 of a file; the path of an adapter's base does not count."""
    if file.name != "adapter_config.json":
        return sha256_of(file)
    values = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
