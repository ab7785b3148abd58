"""Training goes on from what an earlier run saved: its adapter, or its merged model."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.errors import ConfigError, DataError, ModelError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.finetune.trainer import EbrTrainer
from ebr_lib.knobs.presets import read_preset
from ebr_lib.model.contract import CONTRACT_FILE, PROBES
from ebr_lib.model.loading import load_model
from tests.finetune.test_finetune import adapter, pairs, same, settings, train  # noqa: F401 (fixtures)

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


def test_going_on_with_other_settings_is_said(settings, tmp_path, caplog):  # noqa: F811
    first = train(settings, matryoshka_dims=[16])
    more = {"model_name": first.model_path, "output_dir": str(tmp_path / "on"), "max_seq_length": 16}
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        train(settings, **more)
    assert "max_seq_length 16 (was 32), matryoshka_dims () (was (16,))" in caplog.text


# --- interrupted, and begun anew ----------------------------------------------------------------------------------


@pytest.fixture
def die(monkeypatch):
    """A function: from now on, training dies after so many steps."""
    step = EbrTrainer.training_step

    def after(steps: int) -> None:
        def dying(self, *args, **kwargs):
            if self.state.global_step == steps:
                raise RuntimeError("died")
            return step(self, *args, **kwargs)

        monkeypatch.setattr(EbrTrainer, "training_step", dying)

    return after


def test_checkpoints_are_put_aside_and_never_lost(settings, die):  # noqa: F811
    out = Path(settings["output_dir"])
    for steps in (3, 1, 3, 4):
        die(steps)
        with pytest.raises(RuntimeError, match="died"):
            train(settings, save_steps=2)
    found = sorted(str(path.relative_to(out)) for path in out.glob("*/checkpoint-*"))
    names = ("tiny-bert-checkpoints.previous", "tiny-bert-checkpoints.previous-2", "tiny-bert-checkpoints")
    assert found == sorted(
        [f"{names[0]}/checkpoint-2", f"{names[1]}/checkpoint-2"] + [f"{names[2]}/checkpoint-{n}" for n in (2, 4)]
    )


def test_a_run_does_not_go_on_from_another_base(settings, die, tmp_path, tiny_bert):  # noqa: F811
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    die(3)
    with pytest.raises(RuntimeError, match="died"):
        train(settings, model_name=str(base), save_steps=2)
    weights = {name: 1.5 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"base_sha256: was '\w+', is '\w+'"):
        train(settings, model_name=str(base), save_steps=2, resume_from_checkpoint="auto")


@pytest.mark.parametrize("name", ["tiny-bert-peft-lora", "tiny-bert-merged", "tiny-bert-checkpoints"])
def test_what_stands_in_the_place_of_the_output_is_told_first(settings, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr("ebr_lib.finetune.run._read", lambda config: pytest.fail("read"))
    place = Path(settings["output_dir"]) / name
    place.parent.mkdir()
    place.write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} is a file"):
        train(settings)
    assert place.read_text() == "mine"


def test_a_folder_that_is_no_model_of_ours_is_not_replaced(settings):  # noqa: F811
    notes = Path(settings["output_dir"]) / "tiny-bert-peft-lora" / "my_notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(ConfigError, match="holds no model of this stage"):
        train(settings)
    assert notes.read_text() == "mine"


# --- what is held out decides nothing of the training -------------------------------------------------------------


def test_held_out_rows_change_no_training(settings, tmp_path):  # noqa: F811
    """The same held-out pairs, with hard negatives and with answers that training would mask: loss and adapter stay."""
    rows = [json.loads(line) for line in Path(settings["data_path"]).read_text(encoding="utf-8").splitlines()]
    other = [row | {"positive": rows[(i + 9) % len(rows)]["positive"]} for i, row in enumerate(rows[:12])]
    heldout = {
        "plain": [{"anchor": f"held out {i}", "positive": row["positive"]} for i, row in enumerate(rows[:12])],
        "negatives": [row | {"negative": [rows[20]["positive"], "nothing"]} for row in other],
    }
    found = {}
    for name, lines in heldout.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        knobs = {"eval_data_path": str(path), "best_metric": "loss", "output_dir": str(tmp_path / name)}
        result = train(settings, **knobs)
        log = [json.loads(line) for line in (Path(result.model_path) / "training_log.jsonl").read_text().splitlines()]
        found[name] = adapter(result), [(e["loss"], e["masked_share"]) for e in log if "loss" in e]
    assert found["plain"][1] == found["negatives"][1]
    assert same(found["plain"][0], found["negatives"][0])


def test_one_row_alone_teaches_nothing_and_is_told(settings, tmp_path):  # noqa: F811
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"anchor": "a", "positive": "b"}))
    with pytest.raises(DataError, match="one training row, and no negative"):
        train(settings, data_path=str(path), eval_ratio=0)
    path.write_text(json.dumps({"anchor": "a", "positive": "b", "negative": "c"}))
    assert train(settings, data_path=str(path), eval_ratio=0).steps == 1
