"""Training goes on from what an earlier run saved: its adapter, or its merged model."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.config import FinetuneConfig
from ebr_lib.errors import ConfigError, ModelError
from ebr_lib.knobs import read_preset
from ebr_lib.model.contract import CONTRACT_FILE, PROBES
from ebr_lib.model.loading import load_model
from tests.test_finetune import adapter, pairs, same, settings, train  # noqa: F401 (fixtures)

TEXTS = ["red kite", "书籍 this lamp", "warm"]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one * other).sum(axis=1)).min())


def test_from_a_merged_model_the_new_adapter_belongs_to_it(settings, tmp_path):  # noqa: F811
    merged = train(settings, merge_adapter=True, num_epochs=3).merged_path
    start = load_model(merged, device="cpu").encode(TEXTS)
    again = train(settings, model_name=merged, output_dir=str(tmp_path / "again"), learning_rate=1e-7)
    contract = json.loads((Path(again.model_path) / CONTRACT_FILE).read_text())
    assert contract["base_model"] == merged
    assert cosine(load_model(again.model_path, device="cpu").encode(TEXTS), start) > 0.9999


def test_an_adapter_goes_on_as_it_was_saved_and_says_what_it_ignores(settings, tmp_path, caplog):  # noqa: F811
    first = train(settings)
    more = {"model_name": first.model_path, "output_dir": str(tmp_path / "on"), "lora_r": 8, "lora_alpha": 8}
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        second = train(settings, **more)
    assert "lora_r 4 (8 is ignored)" in caplog.text
    assert {name: weight.shape for name, weight in adapter(second).items()} == {
        name: weight.shape for name, weight in adapter(first).items()
    }
    assert not same(adapter(second), adapter(first))
    saved = FinetuneConfig.resolve(read_preset(Path(second.model_path) / "finetune_config.yaml"))
    assert saved.lora_r == 4


def test_a_query_adapter_does_not_become_one_for_both_sides(settings, tmp_path):  # noqa: F811
    first = train(settings, adapter_side="query")
    more = {"model_name": first.model_path, "output_dir": str(tmp_path / "on")}
    with pytest.raises(ConfigError, match=r"adapter_side: 'both' wanted.*was trained for 'query'"):
        train(settings, **more)
    second = train(settings, **more, adapter_side="query")
    base = load_model(settings["model_name"], device="cpu", max_seq_length=32)
    documents = load_model(second.model_path, device="cpu", side="document")
    assert np.array_equal(documents.encode(TEXTS), base.encode(TEXTS))


def test_an_adapter_of_another_library_is_refused(settings, tmp_path):  # noqa: F811
    first = Path(train(settings).model_path)
    (first / CONTRACT_FILE).unlink()
    with pytest.raises(ModelError, match="an adapter that this stage did not save; merge it"):
        train(settings, model_name=str(first), output_dir=str(tmp_path / "on"))


def test_merged_weights_would_move_the_documents_of_a_query_adapter():
    with pytest.raises(ConfigError, match="merge_adapter and adapter_side query"):
        FinetuneConfig(merge_adapter=True, adapter_side="query")


def test_the_card_of_a_query_adapter_shows_how_documents_are_encoded(settings):  # noqa: F811
    card = (Path(train(settings, adapter_side="query").model_path) / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code, found)
    base = load_model(settings["model_name"], device="cpu", max_seq_length=32)
    assert np.array_equal(found["documents"], base.encode([PROBES[-2]]))
