"""A saved model that no longer gives the vectors that were saved stops every stage; the message names the cause."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ebr_lib.errors import ModelError
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.finetune.run import train_sentence_transformer
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.model import merged
from ebr_lib.model.contract import CONTRACT_FILE, UNKNOWN_CAUSE, read_contract
from ebr_lib.model.loading import load_model
from tests.models import adapted, bring_own_code, build_tiny, edit_json

NOT_THOSE = "these are not the vectors that were saved"


@pytest.fixture(scope="module")
def originals(tiny_bert, tmp_path_factory) -> Path:
    """A folder with `base`, `adapter` on it, and `merged`."""
    root = tmp_path_factory.mktemp("originals")
    shutil.copytree(tiny_bert, root / "base")
    adapted(root / "base", root / "adapter")
    (root / "merged").mkdir()
    merged.save_merged(str(root / "adapter"), root / "merged", trust_remote_code=False, device="cpu")
    return root


@pytest.fixture
def models(originals, tmp_path) -> Path:
    """A copy to change; its adapter is on the base beside it."""
    root = shutil.copytree(originals, tmp_path / "models")
    edit_json(root / "adapter" / CONTRACT_FILE, base_model=str(root / "base"))
    return root


def turned(folder: Path, share: float) -> None:
    """Turn the saved probe vectors away from the model's, by a share of their length."""
    probes = json.loads((folder / CONTRACT_FILE).read_text())["probes"]
    for side, rows in probes.items():
        vectors = np.array(rows)
        across = np.roll(vectors, 1, axis=1)
        across -= (across * vectors).sum(axis=1, keepdims=True) * vectors / (vectors**2).sum(axis=1, keepdims=True)
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        probes[side] = (vectors + share * across).tolist()
    edit_json(folder / CONTRACT_FILE, probes=probes)


def test_the_cause_of_a_merged_model_is_among_its_own_files(models):
    edit_json(models / "merged" / "1_Pooling" / "config.json", pooling_mode="cls")
    with pytest.raises(
        ModelError, match=r"cause: another model than then \(files that changed: 1_Pooling/config\.json"
    ):
        load_model(str(models / "merged"), device="cpu")


def test_rounding_is_small_in_float32_and_larger_for_other_types(models):
    folder = models / "adapter"
    assert read_contract(folder).number_type == "float32"
    turned(folder, 1e-4)
    load_model(str(folder), device="cpu")
    turned(folder, 1e-3)
    with pytest.raises(ModelError, match=f"{NOT_THOSE}: 0.001.* of their length away, where 0.0003 is rounding"):
        load_model(str(folder), device="cpu")
    edit_json(folder / CONTRACT_FILE, number_type="bfloat16")
    load_model(str(folder), device="cpu")
    turned(folder, 0.1)
    with pytest.raises(ModelError, match=NOT_THOSE):
        load_model(str(folder), device="cpu")


def test_a_contract_that_says_no_number_type_is_called_older(models):
    folder = models / "adapter"
    turned(folder, 0.1)
    edit_json(folder / CONTRACT_FILE, number_type="")
    with pytest.raises(ModelError, match=r"cause: precision \(not recorded then, by an older version; float32 now\)"):
        load_model(str(folder), device="cpu")


def test_bfloat16_weights_are_within_rounding(models):
    load_model(str(models / "adapter"), device="cpu", dtype=torch.bfloat16)


def another_pooling(models: Path) -> None:
    edit_json(models / "base" / "1_Pooling" / "config.json", pooling_mode="cls")


def another_adapter(models: Path) -> None:

    file = models / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: -weight if "lora_B" in name else weight for name, weight in weights.items()}, file)


def another_prompt(models: Path) -> None:
    edit_json(models / "adapter" / CONTRACT_FILE, prompts={"query": "find: ", "document": ""})
    edit_json(models / "adapter" / "config_sentence_transformers.json", prompts={"query": "", "document": ""})


def another_library(models: Path) -> None:
    turned(models / "adapter", 1.0)
    edit_json(models / "adapter" / CONTRACT_FILE, libraries={"torch": "1.0", "peft": "0.1"})


def no_known_cause(models: Path) -> None:
    turned(models / "adapter", 1.0)


CAUSES = {
    another_pooling: (
        r"another base than then \(files that changed: 1_Pooling/config.json\); pooling mean then, cls now"
    ),
    another_adapter: r"another model than then \(files that changed: adapter_model.safetensors\)",
    another_prompt: r"prompt \(query: '' beside the weights, 'find: ' in the contract\)",
    another_library: r"library torch 1.0 then, .* now; library peft 0.1 then",
    no_known_cause: UNKNOWN_CAUSE,
}


@pytest.mark.parametrize("change", CAUSES)
def test_the_likely_cause_is_named(models, change):
    change(models)
    with pytest.raises(ModelError, match=f"likely cause: {CAUSES[change]}"):
        load_model(str(models / "adapter"), device="cpu")


def test_a_precision_that_differs_is_named(models):
    turned(models / "adapter", 1.0)
    with pytest.raises(ModelError, match=r"precision \(float32 then, bfloat16 now\)"):
        load_model(str(models / "adapter"), device="cpu", dtype=torch.bfloat16)


def test_another_length_is_found_although_short_probes_agree(models):
    load_model(str(models / "merged"), device="cpu")
    edit_json(models / "merged" / CONTRACT_FILE, max_seq_length=16)
    with pytest.raises(ModelError, match=r"likely cause: length \(texts are cut at 128 tokens, 16 then\)"):
        load_model(str(models / "merged"), device="cpu")
    assert load_model(str(models / "merged"), device="cpu", on_changed_vectors="warn").max_seq_length == 128


def test_own_code_that_changed_is_named(tmp_path):
    base = bring_own_code(build_tiny("qwen2", tmp_path / "base"))
    folder = adapted(base, tmp_path / "adapter", True)
    code = (base / "modeling.py").read_text()
    (base / "modeling.py").write_text(code.replace('{"full_attention": seen', '{"full_attention": None'))
    with pytest.raises(ModelError, match=r"likely cause: remote code \(files of the base that changed: modeling.py\)"):
        load_model(str(folder), trust_remote_code=True, device="cpu")
    config = json.loads((base / "config.json").read_text())
    del config["auto_map"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"likely cause: remote code \(the model's own code ran then"):
        load_model(str(folder), device="cpu")


# --- every stage that writes or serves vectors --------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"anchor": f"red kite {i}", "positive": f"a kite in red, number {i}"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = "".join(f"{i}\x01{row['positive']}\n" for i, row in enumerate(rows))
    (folder / "a.csv").write_text(f"id\x01description\n{texts}", encoding="utf-8")
    return folder


def encode(model: Path, data: Path, output: Path, **knobs) -> Path:
    plain = {"device": "cpu", "precision": "float32", "file_patterns": ["*.csv"]}
    where = {"model_name": str(model), "data_path": str(data), "output_path": str(output)}
    return run_batch_inference(plain | where | knobs).output


def test_every_stage_stops_or_warns(models, data, tmp_path, caplog):
    model, pairs, output = models / "adapter", data / "pairs.jsonl", tmp_path / "out.txt"
    encode(model, data, output)
    index = {"embedding_path": str(output), "output_dir": str(tmp_path / "index")}
    build_faiss_index(index)
    turned(model, 1.0)
    evaluation = {"models": [str(model)], "data_path": str(pairs), "query_column": "anchor", "bm25": False}
    evaluation |= {"resamples": 100, "output_dir": str(tmp_path / "e"), "device": "cpu"}
    training = {"model_name": str(model), "data_path": str(pairs), "output_dir": str(tmp_path / "saved")}
    training |= {"eval_ratio": 0, "max_seq_length": 16, "bf16": False}
    measured = index | {"queries_path": str(pairs), "query_column": "anchor", "output_dir": str(tmp_path / "i2")}
    written = output.read_bytes()
    stages = {
        "encode": lambda **knob: encode(model, data, output, **knob),
        "evaluate": lambda **knob: evaluate_retrieval(evaluation | knob),
        "index": lambda **knob: build_faiss_index(measured | knob),
        "search": lambda **knob: search(tmp_path / "index", "red", **knob),
        "continue training": lambda **knob: train_sentence_transformer(training | knob),
    }
    for name, stage in stages.items():
        with pytest.raises(ModelError, match=NOT_THOSE):
            stage()
        assert output.read_bytes() == written, name
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ebr_lib"):
            stage(on_changed_vectors="warn")
        assert "与保存时不同" in caplog.text and UNKNOWN_CAUSE in caplog.text, name


def test_a_base_model_whose_files_changed_does_not_serve_its_earlier_vectors(models, data, tmp_path, caplog):
    base, output = models / "base", encode(models / "base", data, tmp_path / "out.txt")
    build_faiss_index({"embedding_path": str(output), "output_dir": str(tmp_path / "index")})
    found = search(tmp_path / "index", "red kite")
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    assert search(tmp_path / "index", "red kite", model_name=str(moved)).equals(found)
    another_pooling(models)
    with pytest.raises(ModelError, match=r"pooling or .py files have changed since .*on_changed_vectors: warn goes on"):
        search(tmp_path / "index", "red kite", model_name=f"{base}/")
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        assert len(search(tmp_path / "index", "red kite", on_changed_vectors="warn", model_name=f"{base}/"))
    assert "模型文件已改变" in caplog.text
    config = {"models": [str(base)], "queries_path": str(data / "pairs.jsonl"), "corpus_path": str(output)}
    config |= {"query_column": "anchor", "bm25": False, "resamples": 100, "data_path": None}
    report = evaluate_retrieval(config | {"output_dir": str(tmp_path / "e"), "device": "cpu"}).report_json
    assert json.loads(report.read_text())["how"]["base"]["documents"] == "encoded"
