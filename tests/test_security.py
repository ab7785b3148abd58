"""Texts in the data are never opened as paths, run or shown as markup; loading a model runs no code."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebr_lib import (
    build_faiss_index,
    check_configs,
    evaluate_retrieval,
    run_batch_inference,
    search,
    train_sentence_transformer,
    visualize_embeddings,
)
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.finetune.trainer import EbrTrainer
from ebr_lib.knobs.presets import read_preset
from ebr_lib.model.loading import load_model
from ebr_lib.model.pickles import to_safetensors

MARKUP = "\"'><script>broken()</script><img src=x onerror=broken()>"
KIND = f"kind {MARKUP}"  # the name of a column
SECRETS = ("cat.png", "song.mp3", "film.mp4", "page.html", "rows.jsonl", "rows.csv", "model.safetensors", "run.py")
ROWS = 48
IN_OPEN = 0x20


class FolderWatch:
    """Notices every file in a folder that any library opens, with Linux's inotify."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._events, os.fsencode(folder), IN_OPEN) > 0

    def noticed(self) -> bool:
        try:
            return bool(os.read(self._events, 1 << 16))
        except BlockingIOError:
            return False


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    for name in SECRETS:
        (folder / name).write_text("secret", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(secrets) -> list[str]:
    """Texts that name the secret files in every way a library might follow, and texts that are markup."""
    paths = [secrets / name for name in SECRETS]
    named = (
        [str(path) for path in paths] + [path.as_uri() for path in paths] + [os.path.relpath(path) for path in paths]
    )
    named += [f"@{paths[0]}", f"$(cat {paths[0]})", f"<img src={paths[0]}>", "https://example.invalid/cat.png"]
    return named + [f"{MARKUP} {i}" for i in range(ROWS - len(named))]


@pytest.fixture(scope="module")
def workflow(texts, secrets, tiny_bert, tmp_path_factory) -> dict:
    """Results of all stages for such texts, and whether a secret file was opened."""
    folder = tmp_path_factory.mktemp("workflow")
    catalogue = [f"{i}\x01{text}\x01{MARKUP} {i % 3}" for i, text in enumerate(texts)]
    (folder / "in.csv").write_text("\n".join([f"id\x01description\x01{KIND}", *catalogue]) + "\n", encoding="utf-8")
    pairs = [json.dumps({"anchor": f"{text} {i}", "positive": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("".join(pairs), encoding="utf-8")
    vectors, model = str(folder / "embeds.txt"), str(tiny_bert)
    watch = FolderWatch(secrets)
    found = {
        "configs": check_configs(visualize={"label_column": KIND}, inference={"description_column": MARKUP}),
        "finetune": train_sentence_transformer(
            {"model_name": model, "data_path": str(folder / "pairs.jsonl"), "output_dir": str(folder / "saved"),
             "train_batch_size": 16, "max_seq_length": 32}
        ),
        "inference": run_batch_inference(
            {"model_name": model, "data_path": str(folder / "in.csv"), "output_path": vectors}
        ),
        "visualize": visualize_embeddings(
            {"embedding_path": vectors, "output_path": str(folder / "maps.png"), "label_column": KIND, "method": "tsne"}
        ),
        "index": build_faiss_index({"embedding_path": vectors, "output_dir": str(folder / "index")}),
    }  # fmt: skip
    found["evaluate"] = evaluate_retrieval(
        {"models": [model], "data_path": found["finetune"].model_path, "output_dir": str(folder / "evaluation"),
         "resamples": 100}
    )  # fmt: skip
    found["search"] = search(found["index"].folder, texts[0], 3, where={KIND: f"{MARKUP} 0"})
    return found | {"opened": watch.noticed()}


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_paths_in_the_data_are_not_opened(workflow, secrets):
    assert not workflow["opened"]
    watch = FolderWatch(secrets)
    (secrets / SECRETS[0]).read_bytes()
    assert watch.noticed()


class Markup(HTMLParser):
    """Counts the scripts of a page and collects attributes that would run one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_markup_in_the_data_is_shown_as_text(workflow):
    pages = {name: Markup(shown._repr_html_()) for name, shown in workflow.items() if name != "opened"}
    pages["doctor"] = Markup(workflow["finetune"].doctor._repr_html_())
    pages["report"] = Markup(workflow["evaluate"].report_html.read_text(encoding="utf-8"))
    assert {name: (page.scripts, page.handlers) for name, page in pages.items()} == dict.fromkeys(pages, (0, []))
    explorer = Markup(workflow["visualize"].explorer.read_text(encoding="utf-8"))
    assert (explorer.scripts, explorer.handlers) == (2, [])  # data and program
    shown = [workflow[name]._repr_html_() for name in ("configs", "visualize", "search")]
    assert all("&lt;script&gt;broken()" in page for page in shown)  # the markup was there
    assert Markup(MARKUP).scripts == 1 and Markup(MARKUP).handlers == ["onerror"]


def test_a_preset_cannot_make_objects(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("lora_r: !!python/object/apply:os.getpid []\n")
    with pytest.raises(ConfigError, match="not readable YAML"):
        read_preset(preset)


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def pickled(tiny_bert, tmp_path) -> Path:
    """The tiny model, weights pickled."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_with_the_command_that_converts_them(pickled, tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle") as refused:
        load_model(str(pickled), device="cpu")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*?)" and give that folder', str(refused.value))[1])
    converted = load_model("./pickled-safetensors", device="cpu")
    wanted = load_model(str(tiny_bert), device="cpu")
    assert np.array_equal(converted.encode(["hello 南瓜"]), wanted.encode(["hello 南瓜"]))


def pickle_weights(place: Path) -> None:
    torch.save(load_file(place), place.with_name(place.name.replace("model", "pytorch_model", 1)).with_suffix(".bin"))
    place.unlink()


def shard(folder: Path) -> None:
    """Split a model's pickle in two that share a tensor."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    halves = list(weights)[::2], list(weights)[1::2]
    for name, keys in zip(names, halves, strict=True):
        torch.save({key: weights[key] for key in keys} | {"tied": weights[keys[0]]}, folder / name)
    index = {
        "metadata": {},
        "weight_map": {key: name for name, keys in zip(names, halves, strict=True) for key in keys},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").unlink()


@pytest.mark.parametrize("layout", ["root", "0_Transformer", "2_Dense", "both", "shards", "route", "dense route"])
def test_the_command_in_the_refusal_converts_every_layout(tiny_models, tmp_path, monkeypatch, layout):
    shape = {"route": "towers", "dense route": "late_towers"}.get(layout, "dense")
    folder = shutil.copytree(tiny_models(shape), tmp_path / "some model")
    texts = ["hello 南瓜"]
    wanted = load_model(str(folder), device="cpu").encode(texts)
    if layout == "0_Transformer":
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["path"] = layout
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / layout).mkdir()
        for file in (*folder.glob("*token*"), folder / "config.json", folder / "sentence_bert_config.json"):
            file.rename(folder / layout / file.name)
        (folder / "model.safetensors").rename(folder / layout / "model.safetensors")
    places = sorted(folder.rglob("model.safetensors"))
    for place in places if layout == "both" else [p for p in places if (p.parent.name == layout) or "route" in layout]:
        pickle_weights(place)
    if layout in ("root", "shards"):
        pickle_weights(folder / "model.safetensors")
    if layout == "shards":
        shard(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=r"\.bin is a pickle") as refused:
        load_model(".", device="cpu")
    exec(re.search(r'python -c "(.*?)" and give that folder', str(refused.value))[1])
    assert np.array_equal(load_model("./some model-safetensors", device="cpu").encode(texts), wanted)


def test_a_pickle_with_objects_is_not_converted(pickled, tmp_path):
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    with pytest.raises(ModelError, match="holds more than tensors"):
        to_safetensors(str(pickled), str(tmp_path / "new"))
    assert not (tmp_path / "opened").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "place", ["2_Dense/pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_a_pickle_instead_of_safetensors_is_not_opened(tiny_bert, tmp_path, place):
    folder, mark = tmp_path / "model", tmp_path / "opened"
    shutil.copytree(tiny_bert, folder)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(pickle.dumps(Bomb(mark)))
    if place.startswith("pytorch_model"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=re.escape(place.rpartition("/")[2])):
        load_model(str(folder), device="cpu")
    assert not mark.exists()


def test_a_fine_tuned_folder_with_a_pickled_adapter_is_refused_and_converted(tiny_bert, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"anchor": f"a {i}", "positive": f"b {i}"}) + "\n" for i in range(8)))
    folder = train_sentence_transformer({
        "model_name": str(tiny_bert), "data_path": str(pairs), "output_dir": str(tmp_path / "out"), "eval_ratio": 0.0,
    }).model_path  # fmt: skip
    wanted = load_model(str(folder), device="cpu").encode(["hello"])
    safe = Path(folder) / "adapter_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle") as refused:
        load_model(str(folder), device="cpu")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*?)" and give that folder', str(refused.value))[1])
    converted = load_model("./tiny-bert-peft-lora-safetensors", device="cpu")
    assert np.array_equal(converted.encode(["hello"]), wanted)
    safe.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match="does not load"):
        load_model(str(folder), device="cpu")


def test_unused_pickles_are_not_opened(tiny_bert, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "opened"
    shutil.copytree(tiny_bert, folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    load_model(str(folder), device="cpu")
    assert not mark.exists()


def test_an_image_model_reads_paths_of_images_as_texts(tiny_bert, tmp_path):
    folder, picture = tmp_path / "model", tmp_path / "cat.png"
    shutil.copytree(tiny_bert, folder)
    picture.write_bytes(b"not for the model")
    texts = [str(picture), "https://example.invalid/cat.jpg"]
    wanted = load_model(str(folder), device="cpu").encode(texts)
    place = folder / "sentence_bert_config.json"
    config = json.loads(place.read_text())
    config["modality_config"]["image"] = config["modality_config"]["text"]
    place.write_text(json.dumps(config))
    assert np.array_equal(load_model(str(folder), device="cpu").encode(texts), wanted)


def test_checkpoints_are_loaded_as_tensors_only(tiny_bert, tmp_path, monkeypatch):
    pairs, mark = tmp_path / "pairs.jsonl", tmp_path / "exploded"
    pairs.write_text("".join(json.dumps({"anchor": f"a {i}", "positive": f"b {i}"}) + "\n" for i in range(24)))
    settings = {
        "model_name": str(tiny_bert), "data_path": str(pairs), "output_dir": str(tmp_path / "out"),
        "train_batch_size": 4, "save_steps": 2, "eval_ratio": 0.0,
    }  # fmt: skip
    step = EbrTrainer.training_step

    def stopped(self, model, inputs, num=None):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, model, inputs, num)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EbrTrainer, "training_step", stopped)
        train_sentence_transformer(settings)
    (checkpoint,) = (tmp_path / "out").glob("*-checkpoints/checkpoint-2")
    for file in (checkpoint / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")):
        whole = file.read_bytes()
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
        with pytest.raises(pickle.UnpicklingError):
            train_sentence_transformer(settings | {"resume_from_checkpoint": "auto"})
        file.write_bytes(whole)
    assert not mark.exists()
