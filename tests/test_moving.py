"""Data, models and outputs that are moved: contents decide what they are, and nothing is taken for another."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ebr_lib import evaluate_retrieval, run_batch_inference
from ebr_lib.data.embeddings.base import manifest_path
from ebr_lib.data.hive import Layout
from ebr_lib.errors import ConfigError, MissingError, ModelError
from ebr_lib.files import write_json
from ebr_lib.finetune.trainer import EbrTrainer
from ebr_lib.inference.job import Job
from ebr_lib.inference.resume import JOB_FILE, with_known_names
from ebr_lib.inference.store import Store
from ebr_lib.model.bases import given_bases, look_for_models
from ebr_lib.model.contract import CONTRACT_FILE, files_sha256, weights_sha256
from ebr_lib.model.loading import load_model
from ebr_lib.model.provenance import identify
from tests.finetune.conftest import adapter, pairs, same, settings, train  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _no_given_bases():
    given_bases.clear()
    yield
    given_bases.clear()


@pytest.fixture(scope="module")
def project(tiny_bert, tmp_path_factory) -> Path:
    """A folder with `bases/bert`, and an adapter on it in `saved/bert-peft-lora`; to be copied, not changed."""
    from ebr_lib.finetune import saving
    from ebr_lib.model.adapters import add_lora

    root = tmp_path_factory.mktemp("project")
    base = shutil.copytree(tiny_bert, root / "bases" / "bert")
    model = load_model(str(base), device="cpu")
    add_lora(model, r=2, alpha=4, dropout=0.0)
    identity = identify(str(base))
    folder = root / "saved" / "bert-peft-lora"
    saving.save_adapter(model, folder, identity, saving.make_contract(model, identity, adapter_side="both"))
    return root


@pytest.fixture
def moved(project, tmp_path) -> tuple[str, Path]:
    """An adapter whose base is no longer where it was, and where that is now."""
    root = tmp_path / "here"
    shutil.copytree(project, root)
    base = Path(shutil.move(root / "bases" / "bert", tmp_path / "elsewhere"))
    folder = root / "saved" / "bert-peft-lora"
    for file, name in ((CONTRACT_FILE, "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        values = json.loads((folder / file).read_text()) | {name: str(root / "bases" / "bert")}
        (folder / file).write_text(json.dumps(values))
    return str(folder), base


def other_weights(base: Path, place: Path) -> Path:
    """A base of another's shape and name, with other weights."""
    shutil.copytree(base, place)
    weights = {name: 1.5 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_a_base_that_was_moved_can_be_given(moved, project, tmp_path):
    folder, base = moved
    with pytest.raises(MissingError, match=r"is an adapter on .*bert, which is not here; .*base_model_path"):
        load_model(folder, device="cpu")
    wrong = other_weights(base, tmp_path / "wrong")
    look_for_models([str(wrong)], "auto")
    with pytest.raises(ModelError, match=r"trained on .*bert with weights of sha256 .*, found .* at .*wrong"):
        load_model(folder, device="cpu")
    look_for_models(str(base), "auto")
    saved = str(project / "saved" / "bert-peft-lora")
    np.testing.assert_array_equal(
        load_model(folder, device="cpu").encode(["warm"]), load_model(saved, device="cpu").encode(["warm"])
    )
    assert identify(folder).base_model == str(base)
    with pytest.raises(MissingError, match=r"base_model_path \./nowhere: no such folder"):
        look_for_models("./nowhere", "auto")


def test_what_was_moved_together_is_found(moved, tmp_path, monkeypatch):
    folder, base = moved
    shutil.copytree(base, tmp_path / "there" / "bases" / "bert")
    whole = shutil.copytree(folder, tmp_path / "there" / "saved" / "bert-peft-lora")
    assert identify(str(whole)).base_model == str(tmp_path / "there" / "bases" / "bert")
    load_model(str(whole), device="cpu")


def test_another_model_at_the_place_of_the_base_is_passed_over(moved):
    """Where the right one can be found; else it is an error."""
    folder, base = moved
    other_weights(base, Path(folder).parents[1] / "bases" / "bert")
    with pytest.raises(ModelError, match="put the original base model there, or set base_model_path"):
        load_model(folder, device="cpu")
    look_for_models(str(base), "auto")
    assert identify(folder).base_model == str(base)


def test_a_model_does_not_depend_on_where_its_base_is(moved):
    folder, base = moved
    before = files_sha256(folder)
    place = Path(folder) / "adapter_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    assert files_sha256(folder) == before
    place.write_text(json.dumps(config | {"lora_alpha": 99}))
    assert files_sha256(folder) != before


def test_weights_that_change_are_read_again(moved):
    _, base = moved
    before = weights_sha256(base)
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, base / "model.safetensors")
    assert weights_sha256(base) != before


def test_every_stage_takes_the_place_of_the_base(moved, tmp_path, pairs):  # noqa: F811
    folder, base = moved
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("id\x01description\n1\x01warm\n2\x01pan\n")
    encoding = {"model_name": folder, "data_path": str(tmp_path / "in"), "output_path": str(tmp_path / "e.txt")}
    with pytest.raises(MissingError, match="base_model_path"):
        run_batch_inference(encoding)
    run_batch_inference(encoding | {"base_model_path": str(base)})
    evaluating = {
        "models": [folder],
        "data_path": str(pairs),
        "bm25": False,
        "output_dir": str(tmp_path / "evaluation"),
    }
    evaluate_retrieval(evaluating | {"base_model_path": str(base), "resamples": 100})
    from ebr_lib.index.run import build_faiss_index
    from ebr_lib.index.search import search

    build_faiss_index({"embedding_path": str(tmp_path / "e.txt"), "output_dir": str(tmp_path / "index")})
    assert search(tmp_path / "index", "warm", 1, base_model_path=str(base))["id"].iloc[0] == "1"


def test_an_output_is_appended_to_when_model_base_and_data_have_moved(moved, tmp_path):
    folder, base = moved
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("id\x01description\n1\x01warm\n")
    encoding = {"output_path": str(tmp_path / "out" / "e.txt"), "append": True}
    places = {"model_name": folder, "base_model_path": str(base), "data_path": str(tmp_path / "in")}
    run_batch_inference(encoding | places)
    shutil.move(tmp_path / "out", tmp_path / "new" / "out")
    new = {name: shutil.move(place, tmp_path / "new" / f"the {name}") for name, place in places.items()}
    data = tmp_path / "new" / "the data_path"
    (data / "a.csv").rename(data / "renamed.csv")
    (data / "b.csv").write_text("id\x01description\n2\x01pan\n")
    given_bases.clear()
    result = run_batch_inference(
        {"append": True, "output_path": str(tmp_path / "new" / "out" / "e.txt")} | {n: str(p) for n, p in new.items()}
    )
    assert result.counts["written"] == 2


@dataclass(frozen=True)
class Named:
    name: str


def job_of(output: Path, files: list[tuple[str, str]]) -> Job:
    inputs = tuple({"path": name, "size": 1, "sha256": sha} for name, sha in files)
    layout = Layout(b"\x01", None, "auto", False)
    return Job(tuple(Named(name) for name, _ in files), layout, "text", (), output, {}, inputs, append=True)


@pytest.mark.parametrize("known_by", ["manifest", "parts", "state"])
def test_inputs_are_known_by_contents_and_partition(tmp_path, known_by):
    output = tmp_path / "out.txt"
    work = output.with_name("out.txt.work")
    work.mkdir()
    then = job_of(output, [("a.csv", "1"), ("b.csv", "2"), ("c.csv", "2"), ("dt=1/d.csv", "3"), ("gone.csv", "4")])
    if known_by == "state":
        with contextlib.closing(Store(work)) as store:
            store.save(state={"earlier": then.inputs[:2], "inputs": then.inputs[2:]})
    elif known_by == "parts":
        write_json(work / JOB_FILE, {"inputs": then.inputs})
    else:
        output.touch()
        write_json(manifest_path(output), {"inputs": then.inputs})
    files = [
        ("new.csv", "9"),
        ("y.csv", "2"),
        ("dt=1/e.csv", "3"),
        ("dt=2/d.csv", "3"),
        ("b.csv", "2"),
        ("1/a.csv", "1"),
    ]
    now = with_known_names(job_of(output, files))
    names = ["a.csv", "b.csv", "c.csv", "dt=1/d.csv", "new.csv", "dt=2/d.csv"]
    assert [source.name for source in now.sources] == [entry["path"] for entry in now.inputs] == names
    assert [entry["sha256"] for entry in now.inputs] == ["1", "2", "2", "3", "9", "3"]
    assert with_known_names(now) == now


# --- fine-tuning --------------------------------------------------------------------------------------------------


def test_training_goes_on_after_all_was_moved_and_the_base_renamed(settings, tmp_path, monkeypatch):  # noqa: F811
    places = {"model_name": tmp_path / "a" / "bert", "data_path": tmp_path / "a" / "rows.jsonl"}
    places["output_dir"] = tmp_path / "a" / "out"
    shutil.copytree(settings["model_name"], places["model_name"])
    shutil.copy(settings["data_path"], places["data_path"])
    given = settings | {name: str(place) for name, place in places.items()} | {"eval_steps": 2, "save_steps": 2}
    whole = adapter(train(given, output_dir=str(tmp_path / "whole")))
    step = EbrTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("died")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(EbrTrainer, "training_step", dying)
        train(given)
    shutil.move(tmp_path / "a", tmp_path / "b")
    shutil.move(tmp_path / "b" / "bert", tmp_path / "b" / "bert2")
    new = {name: str(tmp_path / "b" / place.name) for name, place in places.items()}
    new["model_name"] += "2"
    result = train(given | new, resume_from_checkpoint="auto")
    assert same(adapter(result), whole) and not (tmp_path / "a").exists()
    assert sorted(path.name for path in (tmp_path / "b" / "out").iterdir()) == [Path(result.model_path).name]


def test_a_second_base_of_the_same_name_does_not_replace_the_first_one_s_model(settings, tiny_bert, tmp_path):  # noqa: F811
    first = train(settings)
    before = adapter(first)
    other = other_weights(tiny_bert, tmp_path / "other" / tiny_bert.name)
    with pytest.raises(ConfigError, match=r"trained from another base .* would be replaced; give another output_dir"):
        train(settings, model_name=str(other))
    assert same(adapter(first), before)


def test_an_adapter_whose_base_has_moved_is_trained_further(moved, settings):  # noqa: F811
    folder, base = moved
    result = train(settings, model_name=folder, base_model_path=str(base), num_epochs=0.2)
    given_bases.clear()
    assert json.loads((Path(result.model_path) / CONTRACT_FILE).read_text())["base_model"] == str(base)
    load_model(result.model_path, device="cpu")
