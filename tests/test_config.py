"""All configs are checked together, with the files, models and columns that they name, before any compute."""

from __future__ import annotations

import json

import pytest

from ebr_lib.config import check_configs
from ebr_lib.errors import ConfigError


@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_bert):
    """A workflow of which no stage has run, and its toggles."""
    monkeypatch.chdir(tmp_path)
    rows = [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "infer").mkdir()
    (tmp_path / "infer" / "a.csv").write_text("item_id\x01title\x01description\n1\x01t\x01d\n")
    tuned = "saved/tiny-bert-peft-lora"
    configs = {
        "finetune": {"model_name": str(tiny_bert), "data_path": "train.jsonl", "output_dir": "saved"},
        "inference": {"model_name": tuned, "data_path": "infer", "output_path": "e.txt", "output_columns": ["title"]},
        "visualize": {"embedding_path": "e.txt", "label_column": "title"},
        "evaluate": {"models": [str(tiny_bert), tuned], "data_path": tuned},
        "index": {"embedding_path": "e.txt", "id_column": "title", "queries_path": "train.jsonl"},
    }
    return configs, dict.fromkeys(configs, True)


def test_what_earlier_stages_will_write_counts_as_there(shop):
    configs, run = shop
    checked = check_configs(**configs, run=run)
    assert checked.on == tuple(configs) and checked.visualize.label_column == "title"
    assert "checked" in repr(checked) and "<details>" in checked._repr_html_()


@pytest.mark.parametrize(
    ("stage", "knobs", "said"),
    [
        ("finetune", {"data_path": "trian.jsonl"}, "data_path: trian.jsonl is not there; did you mean train.jsonl"),
        ("finetune", {"replay_data_path": "trian.jsonl"}, "replay_data_path: trian.jsonl is not there"),
        ("finetune", {"model_name": "./no"}, "model_name: model ./no: no such folder"),
        ("inference", {"model_name": "saved/tiny-bert-peft-lroa"}, "did you mean tiny-bert-peft-lora"),
        ("inference", {"model_name": "infer"}, "infer is a folder without a model"),
        ("inference", {"description_column": "descripton"}, r"no column descripton; did you mean description\?"),
        ("inference", {"output_columns": ["titel"]}, r"no column titel; did you mean title\?"),
        ("inference", {"data_path": "infre"}, r"infre is not there; did you mean infer\?"),
        ("visualize", {"label_column": "description"}, "e.txt has no column description; its kept columns are title"),
        ("visualize", {"embedding_path": "ee.txt"}, r"ee.txt is not there, .* did you mean e.txt\?"),
        ("evaluate", {"data_path": "saved/no"}, "evaluation data saved/no: wanted"),
        ("evaluate", {"models": ["./no"]}, "models: model ./no: no such folder"),
        ("evaluate", {"queries_path": "train.jsonl", "slice_columns": ["city"]}, "no column city"),
        ("index", {"id_column": "item_id"}, "has no column item_id"),
        ("index", {"queries_path": "train.jsonl", "query_column": "q"}, "no column q"),
    ],
)
def test_each_mistake_is_found_before_any_compute_with_the_nearest_name(shop, stage, knobs, said):
    configs, run = shop
    configs[stage] |= knobs
    with pytest.raises(ConfigError, match=rf"(?s){stage}:\n.*{said}"):
        check_configs(**configs, run=run)


def test_before_and_after_are_of_one_model(shop):
    configs, run = shop
    base = configs["inference"] | {"model_name": configs["finetune"]["model_name"], "output_path": "base.txt"}
    run |= {"base": True}
    check_configs(**configs, base=base, run=run)
    with pytest.raises(ConfigError, match="base: model_name is all-MiniLM-L6-v2, and fine-tuning"):
        check_configs(**configs, base=base | {"model_name": "all-MiniLM-L6-v2"}, run=run)


def test_mistakes_of_several_stages_are_reported_at_once(shop):
    configs, run = shop
    configs["inference"]["description_column"] = "text"
    configs["visualize"]["label_column"] = "label"
    configs["index"]["queries_path"] = "none.jsonl"
    with pytest.raises(ConfigError, match=r"(?s)inference:.*text.*visualize:.*label.*index:.*none\.jsonl"):
        check_configs(**configs, run=run)


def test_a_switched_off_stage_needs_its_files_only_for_those_that_are_on(shop):
    configs, run = shop
    with pytest.raises(ConfigError, match="is not there, and no stage that is switched on writes it"):
        check_configs(**configs, run=run | {"inference": False})
    off = dict.fromkeys(run, False)
    assert check_configs(**configs, run=off | {"finetune": True}).on == ("finetune",)


def test_no_held_out_queries_no_evaluation(shop):
    configs, run = shop
    configs["finetune"]["eval_ratio"] = 0
    with pytest.raises(ConfigError, match="will hold no held-out queries; fine-tune with eval_ratio above 0"):
        check_configs(**configs, run=run)


def test_unknown_stages_and_configs_of_another_type_are_refused():
    with pytest.raises(ConfigError, match="no stage finetun"):
        check_configs(finetun={})
    with pytest.raises(ConfigError, match=r"FinetuneConfig: wanted a dict of knobs, found 'x\.yaml'"):
        check_configs(finetune="x.yaml")
