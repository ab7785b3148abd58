"""A knob is defined once; checks, flags, saved config and tables follow from its definition."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from ebr_lib.cli import STAGES, main, main_finetune
from ebr_lib.config import check_configs
from ebr_lib.errors import ConfigError, MissingError
from ebr_lib.finetune.config import FinetuneConfig
from ebr_lib.index.config import SearchConfig
from ebr_lib.inference.config import InferenceConfig
from ebr_lib.knobs.checks import Config, knob
from ebr_lib.knobs.flags import from_flags
from ebr_lib.knobs.presets import read_yaml
from ebr_lib.knobs.tables import knob_table, with_tables

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Small(Config):
    size: Annotated[int, Field(ge=1, le=8)] = knob(4, "Size.", "大小。")
    rate: Annotated[float, Field(gt=0)] = knob(1e-3, "Rate.", "比率。")
    kind: Literal["a", "b"] = knob("a", "Kind.", "种类。")
    names: tuple[str, ...] = knob(["x"], "Names.", "名称。")
    on: bool = knob(False, "On.", "开关。")


def problems(given) -> str:
    with pytest.raises(ConfigError) as caught:
        Small.resolve(given)
    return str(caught.value)


def test_all_errors_are_listed_at_once():
    text = problems({"siez": 3, "rate": -1, "kind": "c", "on": 1})
    assert "siez: unknown; did you mean size?" in text
    assert "rate: -1 is not allowed; wanted greater than 0" in text
    assert "kind: 'c' is not allowed; wanted 'a' or 'b'" in text
    assert "on: 1 is not allowed" in text


@pytest.mark.parametrize(
    "given",
    [{"rate": float("nan")}, {"rate": float("inf")}, {"size": True}, {"size": "4"}, {"size": 4.0}, {"rate": "1e-3"}],
)
def test_nan_bools_and_texts_are_rejected_as_numbers(given):
    assert next(iter(given)) in problems(given)


def test_seeds_have_32_bits():
    with pytest.raises(ConfigError, match="seed"):
        FinetuneConfig.resolve({"seed": 2**32})
    assert FinetuneConfig.resolve({"seed": 2**32 - 1}).seed == 2**32 - 1


def test_an_int_for_a_float_stays_an_int():
    assert Small.resolve({"rate": 1}).to_dict()["rate"].__repr__() == "1"


def test_yaml_reads_scientific_notation():
    assert read_yaml("3e-5") == 3e-5
    assert read_yaml("2E+3") == 2000.0
    assert read_yaml("1.5e-3") == 1.5e-3
    assert read_yaml("e5") == "e5"


def test_defaults_then_presets_then_given(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("size: 2\nrate: 2e-5\n")
    second.write_text("size: 3\n")
    config = Small.resolve({"kind": "b", "preset": str(first)})
    assert (config.size, config.rate, config.kind) == (2, 2e-5, "b")
    assert Small.resolve({"rate": 1.0}, [first, second]).to_dict() | {"names": 0} == {
        "size": 3, "rate": 1.0, "kind": "a", "names": 0, "on": False,
    }  # fmt: skip


def test_a_saved_config_is_a_preset(tmp_path):
    config = Small.resolve({"size": 7, "names": ["一", "two"], "rate": 3e-5})
    config.save(tmp_path / "saved.yaml")
    assert Small.resolve(None, [tmp_path / "saved.yaml"]) == config


def test_a_config_is_immutable():
    names = ["x"]
    config = Small.resolve({"names": names})
    names.append("y")
    assert config.names == ("x",)
    prompt = {"anchor": "q: "}
    config = FinetuneConfig.resolve({"prompt": prompt})
    prompt["anchor"] = "changed"
    assert config.prompt == {"anchor": "q: "}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 1  # type: ignore[misc]


def test_missing_and_broken_presets(tmp_path):
    with pytest.raises(MissingError, match="there is no such file"):
        Small.resolve(None, [tmp_path / "none.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="wanted a mapping"):
        Small.resolve(None, [tmp_path / "list.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not readable YAML"):
        Small.resolve(None, [tmp_path / "broken.yaml"])


def test_flags_become_the_same_values_as_a_preset():
    flags = {"size": "2", "rate": "2e-4", "on": "true", "names": ["007", "b"], "kind": "b"}
    assert from_flags(Small, flags).to_dict() == {
        "size": 2,
        "rate": 2e-4,
        "kind": "b",
        "names": ["007", "b"],
        "on": True,
    }
    assert from_flags(Small, {"names": ["a,b"]}).names == ("a", "b")


def test_text_flags_are_not_parsed_as_yaml():
    config = from_flags(SearchConfig, {"query": "null", "where": ["kind=k1, big", "size=[a, b]"]})
    assert config.query == "null" and config.where == ("kind=k1, big", "size=[a, b]")
    assert from_flags(SearchConfig, {"query": "{a}"}).query == "{a}"


def test_a_path_knob_takes_one_path_or_several():
    assert from_flags(FinetuneConfig, {"data_path": ["a,b.json"]}).data_path == "a,b.json"
    assert from_flags(FinetuneConfig, {"data_path": ["a", "b"]}).data_path == ("a", "b")
    assert FinetuneConfig.resolve({"data_path": ["a", "b"]}).to_dict()["data_path"] == ["a", "b"]
    with pytest.raises(ConfigError, match="data_path: 3 is not allowed"):
        FinetuneConfig.resolve({"data_path": 3})


@pytest.mark.parametrize("stage", STAGES)
def test_a_tilde_is_the_home_folder_in_every_path_knob(stage, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    kind = STAGES[stage].config
    places = [f.name for f in dataclasses.fields(kind) if re.search("_(path|dir)$|model_name|^models$", f.name)]
    assert len(places) > 1
    for name in places:
        given = ["~/a.png", "b"] if name == "models" else "~/a.png"
        needed = {"positive_rank_max": 50} if name == "mining_corpus_path" else {}
        value = getattr(kind.resolve({name: given} | needed), name)
        assert value == (("/home/me/a.png", "b") if name == "models" else "/home/me/a.png")
    assert InferenceConfig.resolve({"delimiter": "~"}).delimiter == "~"


def test_contradicting_knobs_are_errors():
    with pytest.raises(ConfigError, match="fp16 and bf16: choose one"):
        FinetuneConfig.resolve({"fp16": True, "bf16": True})
    with pytest.raises(ConfigError, match="early_stopping_patience needs held-out data"):
        FinetuneConfig.resolve({"early_stopping_patience": 1, "eval_ratio": 0.0})


def test_errors_of_all_stages_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        check_configs(finetune={"lora_r": 0}, inference={"descripton_column": "x"})
    assert "lora_r: 0" in str(caught.value)
    assert "did you mean description_column?" in str(caught.value)
    assert check_configs(inference={"description_column": "x"}).inference == InferenceConfig(description_column="x")


def test_the_guide_commands_resolve():
    defaults = FinetuneConfig()
    expected = {
        "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "max_seq_length": 256, "num_epochs": 1,
        "train_batch_size": 6, "eval_batch_size": None, "learning_rate": 2e-4, "weight_decay": 0.01,
        "l1_regularization": 0.0, "max_grad_norm": 1.0, "label_smoothing": 0.0, "noise_prob": 0.1,
        "gradient_accumulation_steps": 1, "early_stopping_patience": 0, "lr_scheduler_type": "linear",
        "model_name": "all-MiniLM-L6-v2", "data_path": "./train_text", "output_dir": "./saved_model",
        "noise_apply_to_fields": ("anchor", "positive"),
    }  # fmt: skip
    assert {name: getattr(defaults, name) for name in expected} == expected


def test_tables_are_written_between_marks():
    document = "a\n<!-- knobs:small -->\nold\n<!-- /knobs -->\nb\n<!-- knobs:small:zh -->\n<!-- /knobs -->\n"
    written = with_tables(document, {"small": Small})
    assert "old" not in written
    assert "| `size` | int, ≥ 1, ≤ 8 | `4` | Size. |" in written
    assert "| `size` | int, ≥ 1, ≤ 8 | `4` | 大小。 |" in written
    assert with_tables(written, {"small": Small}) == written
    assert knob_table(Small).count("\n") == 6


# --- the command line ---------------------------------------------------------------------------------------------


def test_an_unknown_flag_names_the_nearest(capsys):
    assert main_finetune(["--noise_porb", "0.1"]) == 2
    assert "--noise_porb: unknown; did you mean noise_prob?" in capsys.readouterr().err


HEAVY = {"torch", "transformers", "sklearn", "matplotlib", "faiss"}


def output_without(libraries: set[str], code: str) -> str:
    """Output of a process, which must not have imported any of the libraries."""
    code += f"loaded = {libraries} & set(sys.modules)\nsys.exit(f'imported {{loaded}}' if loaded else 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_help_is_instant_and_imports_no_torch():
    code = (
        "import sys; from ebr_lib.cli import main_finetune\ntry: main_finetune(['--help'])\nexcept SystemExit: pass\n"
    )
    assert "--early_stopping_patience" in output_without({*HEAVY, "numpy"}, code)


def test_a_mistyped_knob_is_an_error_before_heavy_imports():
    code = (
        "import sys, ebr_lib as e\n"
        "from ebr_lib.errors import ConfigError\n"
        "stages = e.train_sentence_transformer, e.run_batch_inference, e.visualize_embeddings, e.evaluate_retrieval\n"
        "for stage in (*stages, e.build_faiss_index):\n"
        "    try: stage({'noise_porb': 1})\n"
        "    except ConfigError as error: print(error)\n"
    )
    assert output_without(HEAVY, code).count("noise_porb: unknown") == 5


def test_the_tables_are_printed_or_written_into_documents(tmp_path, capsys):
    assert main(["knobs"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pairs\n\n| knob |") and "| `k` | int, ≥ 1 | `10` |" in printed
    document = tmp_path / "a.md"
    document.write_text("<!-- knobs:search -->\n<!-- /knobs -->\n")
    assert main(["knobs", "--write", str(document)]) == 0
    assert "| `index_dir` | str |" in document.read_text() and capsys.readouterr().out == ""


def test_an_interrupted_command_exits_as_shells_expect(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("ebr_lib.index.search.run_search", interrupted)
    assert main(["search", "a"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_config_shows_the_knobs_that_differ_from_their_defaults():
    shown = re.sub(" (id|class)=[^>]*", "", Small.resolve({"size": 7})._repr_html_())
    changed, every = shown.split("<details>")
    assert re.search(r"<td>size</td>\s*<td>7</td>\s*<td>4</td>", changed) and "kind" not in changed
    assert (
        re.search(r"<td>size</td>\s*<td>7</td>", every)
        and re.search(r"<td>kind</td>\s*<td>a</td>", every)
        and "全部 5 项" in every
    )


def test_a_flag_that_is_not_yaml_is_an_error(capsys):
    assert main_finetune(["--lora_r", "[1"]) == 2
    assert "lora_r: '[1' is not allowed" in capsys.readouterr().err
