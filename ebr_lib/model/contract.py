"""The contract of a saved model: what whoever loads it must do alike, and probe vectors that show whether they do."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebr_lib.errors import ModelError
from ebr_lib.files import sha256_of, write_json
from ebr_lib.logs import logger
from ebr_lib.model.remote_code import Choice, module_folders

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CONTRACT_FILE = "ebr_contract.json"
# beside the weights; not what a run writes into the folder of the model that it trains
SETUP_FILES = ("modules.json", "*config.json", "tokenizer.json", "vocab.txt", "*.model", "*.py")
PROBE_COSINE = 0.999  # below this the vectors are not those of the saved model; bf16 stays above 0.9998
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
    """What a saved model was trained with.

    `adapter_side` is "both", or "query" when documents keep the base model's vectors. `probes` maps a side to the
    vectors (texts × dimensions) of `PROBES`, prompt of that side included.
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

    def save(self, folder: Path) -> None:
        """Write the contract into a model's folder."""
        write_json(folder / CONTRACT_FILE, asdict(self))


def read_contract(folder: str | Path) -> Contract | None:
    """The contract in a model's folder, or None where there is none.

    :raises ModelError: there is one and it cannot be read.
    """
    path = Path(folder) / CONTRACT_FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Contract(**values)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is no readable contract ({error}); take the model from its original place") from error


def setup_of(model: SentenceTransformer) -> dict[str, Any]:
    """What a model makes of its token vectors, by the names that a `Contract` has for it."""
    pooling = next((module for module in model if type(module).__name__ == "Pooling"), None)
    return {
        "pooling": str(getattr(pooling, "pooling_mode", "none")),
        "normalize": any(type(module).__name__ == "Normalize" for module in model),
        "dimension": int(model.get_embedding_dimension() or 0),
    }


def probe_vectors(model: SentenceTransformer, prompt: str) -> list[list[float]]:
    """Vectors of the probe texts (texts × dimensions), as the model in its present state gives them."""
    vectors = model.encode(list(PROBES), prompt=prompt or None, show_progress_bar=False, convert_to_numpy=True)
    return [[float(f"{x:.7g}") for x in vector] for vector in vectors]


def check_probes(model: SentenceTransformer, contract: Contract, side: str, where: str) -> float:
    """Compare the model's probe vectors with the saved ones; warn loudly when they differ.

    :returns: the smallest cosine over the probes, 1.0 where the contract holds none.
    :raises ModelError: the vectors have another dimension than the saved ones.
    """
    saved = np.asarray(contract.probes.get(side, []), dtype=np.float64)
    if not saved.size:
        return 1.0
    now = np.asarray(probe_vectors(model, contract.prompts.get(side, "")), dtype=np.float64)
    if now.shape != saved.shape:
        raise ModelError(f"{where}: vectors of {now.shape[1]} dimensions, the model was saved with {saved.shape[1]}")
    norms = np.linalg.norm(now, axis=1) * np.linalg.norm(saved, axis=1)
    cosine = float(((now * saved).sum(axis=1) / np.maximum(norms, 1e-12)).min())
    if cosine < PROBE_COSINE:
        logger.warning(
            "%s: THESE ARE NOT THE VECTORS THAT WERE SAVED: smallest cosine to the saved probes %.4f, wanted %.3f or "
            "more. The base model or the libraries have changed%s; vectors of this model do not match earlier ones.",
            where,
            cosine,
            PROBE_COSINE,
            _changes(model, contract),
        )
    return cosine


def _changes(model: SentenceTransformer, contract: Contract) -> str:
    then = asdict(contract)
    changes = [f"{name} {then[name]} then, {now} now" for name, now in setup_of(model).items() if now != then[name]]
    return f" ({', '.join(changes)})" if changes else ""


def weights_sha256(folder: str | Path) -> str | None:
    """One sha256 for the safetensors files of a model's folder, of its modules where it holds none itself (two towers,
    static embeddings); None where there are none."""
    parts = (part for part, _ in module_folders(Path(folder)))
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(f for p in parts for f in p.glob("*.safetensors"))
    stats = [(str(file), file.stat()) for file in files]
    return _sha256_of_files(tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))


@functools.lru_cache(maxsize=64)
def _sha256_of_files(files: tuple[tuple[str, int, int, int], ...]) -> str | None:
    """As `weights_sha256`, of files (name, bytes, time of the last change, number): a run asks several times, and
    gigabytes take seconds."""
    sums = [sha256_of(name) for name, *_ in files]
    if len(sums) <= 1:
        return sums[0] if sums else None
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def files_sha256(folder: str | Path) -> str:
    """One sha256 for what a model is made of besides the weights of `weights_sha256`.

    Two models of equal weights that pool otherwise, or have another dense layer or tokenizer, differ in this; where the
    base of an adapter lies does not count.
    """
    folder = Path(folder)
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    files = [file for pattern in SETUP_FILES for file in folder.glob(pattern)]
    for part in {module["path"] for module in modules if module["path"]}:
        files += [file for pattern in ("*.safetensors", *SETUP_FILES) for file in (folder / part).glob(pattern)]
    named = sorted((file.relative_to(folder).as_posix(), _sha256_without_place(file)) for file in files)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _sha256_without_place(file: Path) -> str:
    if file.name != "adapter_config.json":
        return sha256_of(file)
    values = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
