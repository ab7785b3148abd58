"""A model's own code runs, is left out on purpose, or is refused; it is never left out silently."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ebr_lib.cli import main
from ebr_lib.data.embeddings.base import read_manifest
from ebr_lib.errors import DataError, ModelError
from ebr_lib.evaluate.run import evaluate_retrieval
from ebr_lib.finetune.run import train_sentence_transformer
from ebr_lib.index.change import add_rows
from ebr_lib.index.run import build_faiss_index
from ebr_lib.index.search import search
from ebr_lib.inference.ray_cluster import RayEngine
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.model import merged
from ebr_lib.model.contract import CONTRACT_FILE, read_contract
from ebr_lib.model.loading import check_remote_code, load_model
from ebr_lib.model.remote_code import OwnCode, decide, own_code
from tests.models import adapted, bring_own_code, build_tiny, edit_json

TEXTS = ["a pan of steel", "南瓜的家常做法", "x", "热水器 书籍"]
ASKS = r"brings its own code \(AutoModel modeling.TinyKalmModel in .*config.json\), and is another model without it"


# --- what a folder asks for ---------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
FIRST = {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
CASES = {
    "model": ({"config.json": {"auto_map": {"AutoModel": "m.A"}}}, ["AutoModel m.A"]),
    "config alone": ({"config.json": {"auto_map": {"AutoConfig": "c.A"}}}, ["AutoConfig c.A"]),
    "code for other tasks": ({"config.json": {"auto_map": {"AutoModelForCausalLM": "m.A"}}}, []),
    "none": ({"config.json": {"model_type": "qwen2", "activation_function": "gelu"}, "modules.json": [POOLING]}, []),
    "null": ({"config.json": {"auto_map": None}, "tokenizer_config.json": {"auto_map": []}}, []),
    "tokenizer": ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.A", None]}}}, ["AutoTokenizer t.A"]),
    "tokenizer, older form": ({"tokenizer_config.json": {"auto_map": ["t.A", "t.B"]}}, ["AutoTokenizer t.A, t.B"]),
    "processor": ({"processor_config.json": {"auto_map": {"AutoProcessor": "p.A"}}}, ["AutoProcessor p.A"]),
    "folder of a module": (
        {"modules.json": [FIRST, POOLING], "0_Transformer/config.json": {"auto_map": {"AutoModel": "m.A"}}},
        ["AutoModel m.A"],
    ),
    "module of its own": (
        {"modules.json": [{"path": "", "type": "m.MyPooling"}, POOLING]},
        ["module m.MyPooling"],
    ),
    "tower of a router": (
        {
            "modules.json": [{"path": "", "type": "sentence_transformers.base.modules.Router"}],
            "router_config.json": {
                "types": {"query_0": "sentence_transformers.models.Transformer", "doc_0": "m.Tower"}
            },
            "query_0/config.json": {"auto_map": {"AutoModel": "m.A"}},
        },
        ["AutoModel m.A", "module m.Tower"],
    ),
    "function of a dense layer": (
        {
            "modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "2_Dense/config.json": {"activation_function": "mine.Swish"},
        },
        ["activation function mine.Swish"],
    ),
    "function of torch": (
        {
            "modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Tanh"},
        },
        [],
    ),
    "other repository": ({"config.json": {"auto_map": {"AutoModel": "a/b--m.A"}}}, ["AutoModel a/b--m.A"]),
}


@pytest.mark.parametrize("case", CASES)
def test_own_code_is_found_in_every_file_that_loading_reads(case, tmp_path):
    files, wanted = CASES[case]
    found = own_code(write(tmp_path, files))
    assert sorted(f"{code.entry} {code.reference}" for code in found) == wanted


def test_a_choice_is_refused_if_it_is_impossible_or_was_another_before():
    model = (OwnCode("config.json", "AutoModel", "m.A"),)
    module = (OwnCode("modules.json", "module", "m.Pool"),)
    assert decide("x", (), True) is decide("x", (), "ignore") is decide("x", (), False) is False
    assert (decide("x", model, True), decide("x", model, "ignore"), decide("x", module, True)) == (True, "ignore", True)
    assert decide("x", model, True, made_with=True) is True
    assert decide("x", model, "ignore", made_with=False) == decide("x", model, "ignore", made_with="ignore") == "ignore"
    for found, choice, then, said in (
        (model, False, None, "true; or, if its card says that the library's own class is meant, .* ignore$"),
        (module, False, None, "read the .py files, then set trust_remote_code: true$"),
        (model, False, True, "read the .py files, then set trust_remote_code: true, as it was then$"),
        (model, False, "ignore", "; set trust_remote_code: ignore, as it was then$"),
        (model, False, False, "; set trust_remote_code: ignore, for then the library's class was loaded$"),
        (model, "ignore", True, "ignore was given, .* made under true, which gives other vectors; read"),
        (model, True, "ignore", "true was given, .* made under ignore"),
        (model, True, False, "true was given, .* made under ignore"),
        (module, "ignore", None, "asks for module m.Pool in modules.json, which the library has no class for"),
        ((), False, True, "model x needs its own code; read the .py files"),
        ((OwnCode("c", "AutoModel", "a/b--m.A"),), False, None, "read the .py files of a/b, then"),
    ):
        with pytest.raises(ModelError, match=said):
            decide("x", found, choice, made_with=then)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return bring_own_code(build_tiny("qwen2", tmp_path_factory.mktemp("own") / "shop"))


def pooled(folder: Path, trust: bool) -> np.ndarray:
    """Unit means of the token states, by transformers alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            mean = inner(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def same(vectors: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(((vectors * wanted).sum(axis=1) > 0.999999).all())


def test_a_known_model_type_with_own_code_needs_a_choice(model):
    with pytest.raises(ModelError, match=ASKS):
        load_model(str(model), device="cpu")
    own, stock = pooled(model, True), pooled(model, False)
    assert not same(own, stock)
    assert same(load_model(str(model), trust_remote_code=True, device="cpu").encode(TEXTS), own)
    assert same(load_model(str(model), trust_remote_code="ignore", device="cpu").encode(TEXTS), stock)


def test_code_that_the_library_has_no_class_for_cannot_be_ignored(tiny_models):
    with pytest.raises(ModelError, match=r"ignore: the library has no class of its own for model .*tiny-kalm;"):
        load_model(str(tiny_models("kalm")), trust_remote_code="ignore", device="cpu")


def test_own_code_that_does_not_load_gives_the_reason(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / "modeling.py").write_text("import a_package_that_nobody_has\n" + (folder / "modeling.py").read_text())
    with pytest.raises(ModelError, match=r"its own code .* fails to load it: .*a_package_that_nobody_has"):
        load_model(str(folder), trust_remote_code=True, device="cpu")


def test_a_missing_repository_of_code_is_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "referring")
    edit_json(folder / "config.json", auto_map={"AutoModel": "nobody/code--modeling.TinyKalmModel"})
    with pytest.raises(ModelError, match=r"read the \.py files of nobody/code, then set"):
        load_model(str(folder), device="cpu")
    with pytest.raises(ModelError, match="names the code of another repository: fetch that one too"):
        load_model(str(folder), trust_remote_code=True, device="cpu")


def test_a_model_in_a_module_folder_needs_its_code_at_the_root(model, tmp_path):
    """As older versions of sentence-transformers saved them; the library looks for the code at the root."""
    folder = shutil.copytree(model, tmp_path / "older")
    part = folder / "0_Transformer"
    part.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling.py"):
        (folder / name).rename(part / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"TinyKalmModel in .*0_Transformer/config.json"):
        load_model(str(folder), device="cpu")
    assert same(load_model(str(folder), trust_remote_code="ignore", device="cpu").encode(TEXTS), pooled(model, False))
    with pytest.raises(ModelError, match=r"put its .py files beside its modules.json"):
        load_model(str(folder), trust_remote_code=True, device="cpu")
    (part / "modeling.py").rename(folder / "modeling.py")
    assert same(load_model(str(folder), trust_remote_code=True, device="cpu").encode(TEXTS), pooled(model, True))


def test_code_for_other_tasks_is_logged_and_changes_nothing(model, tmp_path, caplog):
    folder = shutil.copytree(model, tmp_path / "heads")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.TinyKalmModel"})
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        assert same(load_model(str(folder), device="cpu").encode(TEXTS), pooled(model, False))
    assert "AutoModelForCausalLM" in caplog.text and "Qwen2Model" in caplog.text


def test_own_code_that_the_library_ignores_is_an_error(tmp_path):
    """sentence-transformers takes T5's encoder by its type, whatever the folder asks for and the user allows."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import T5Config, T5EncoderModel

    from tests.models import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path / "parts")
    tokenizer.save_pretrained(tmp_path / "parts")
    modules = [Transformer(str(tmp_path / "parts")), Pooling(16, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "t5"))
    bring_own_code(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"true, but T5EncoderModel of the library was loaded, not AutoModel modeling"):
        load_model(str(tmp_path / "t5"), trust_remote_code=True, device="cpu")
    assert load_model(str(tmp_path / "t5"), trust_remote_code="ignore", device="cpu").encode(["a"]).shape == (1, 16)


def cached(hub: Path, name: str, folder: Path) -> None:
    """Lay a folder out as the hub's copy on this machine."""
    place = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


def test_own_code_of_a_hub_name_and_of_another_repository_runs(model, tmp_path, monkeypatch):
    import huggingface_hub.constants
    import transformers.utils.hub

    for library in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(library, "HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "shop/own", model)
    elsewhere = shutil.copytree(model, tmp_path / "copy")
    edit_json(elsewhere / "config.json", auto_map={"AutoModel": "shop/own--modeling.TinyKalmModel"})
    with pytest.raises(ModelError, match=f"model shop/own {ASKS}"):
        load_model("shop/own", device="cpu")
    with pytest.raises(ModelError, match=r"read the \.py files of shop/own, then set"):
        load_model(str(elsewhere), device="cpu")
    assert same(load_model("shop/own", trust_remote_code=True, device="cpu").encode(TEXTS), pooled(model, True))
    assert same(load_model(str(elsewhere), trust_remote_code=True, device="cpu").encode(TEXTS), pooled(model, True))


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[object, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {choice: adapted(model, root / str(choice), choice) for choice in (True, "ignore")}


def test_an_adapter_remembers_how_its_base_was_loaded(adapters, model):
    for choice, folder in adapters.items():
        assert read_contract(folder).trust_remote_code == choice
        other = "ignore" if choice is True else True
        with pytest.raises(ModelError, match=rf"is an adapter on {model}, which {ASKS}.* as it was then"):
            check_remote_code(str(folder), False)
        with pytest.raises(ModelError, match="which gives other vectors"):
            load_model(str(folder), trust_remote_code=other, device="cpu")
        assert load_model(str(folder), trust_remote_code=choice, device="cpu").encode(TEXTS).shape == (4, 32)


def test_an_older_contract_means_the_library_s_class(adapters, tmp_path):
    """Older contracts say false for a model whose code was left out silently."""
    folder = shutil.copytree(adapters["ignore"], tmp_path / "old")
    edit_json(folder / CONTRACT_FILE, trust_remote_code=False)
    for choice in (False, True):
        with pytest.raises(ModelError, match="set trust_remote_code: ignore, for then the library's class was loaded"):
            load_model(str(folder), trust_remote_code=choice, device="cpu")
    assert load_model(str(folder), trust_remote_code="ignore", device="cpu").encode(TEXTS).shape == (4, 32)


def test_an_adapter_whose_base_is_not_here_still_needs_a_choice(adapters, tmp_path):
    folder = shutil.copytree(adapters[True], tmp_path / "far")
    for file, entry in ((CONTRACT_FILE, "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        edit_json(folder / file, **{entry: "nobody/far-away"})
    with pytest.raises(ModelError, match=r"an adapter on nobody/far-away, which needs its own code; read"):
        check_remote_code(str(folder), False)


def test_own_code_of_the_base_of_another_library_s_adapter_is_found(adapters, model, tmp_path):
    folder = shutil.copytree(adapters[True], tmp_path / "plain")
    (folder / CONTRACT_FILE).unlink()
    with pytest.raises(ModelError, match=ASKS):
        load_model(str(folder), device="cpu")
    trusted = load_model(str(folder), trust_remote_code=True, device="cpu").encode(TEXTS)
    assert same(trusted, load_model(str(adapters[True]), trust_remote_code=True, device="cpu").encode(TEXTS))


def test_a_merged_model_carries_its_code_or_asks_for_none(adapters, tmp_path):
    for choice, folder in adapters.items():
        place = tmp_path / str(choice)
        place.mkdir()
        merged.save_merged(str(folder), place, trust_remote_code=choice, device="cpu")
        wanted = load_model(str(folder), trust_remote_code=choice, device="cpu").encode(TEXTS)
        assert read_contract(place).trust_remote_code is (choice is True)
        assert (place / "modeling.py").is_file() is (choice is True)
        moved = place.rename(tmp_path / f"moved-{choice}")  # the base is not needed
        assert same(load_model(str(moved), trust_remote_code=choice is True, device="cpu").encode(TEXTS), wanted)
    with pytest.raises(ModelError, match="as it was then"):
        load_model(str(tmp_path / "moved-True"), device="cpu")


def test_a_merged_model_without_its_code_is_not_kept(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "own_code", lambda folder: ())
    with pytest.raises(ModelError, match="would lack the code of"):
        merged.save_merged(str(adapters[True]), tmp_path, trust_remote_code=True, device="cpu")


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    rows = "".join(f"{i}\x01{text}\n" for i, text in enumerate(TEXTS))
    (folder / "a.csv").write_text(f"id\x01description\n{rows}", encoding="utf-8")
    return folder


def encode(model: Path, catalogue: Path, output: Path, choice, **knobs) -> Path:
    plain = {"precision": "float32", "device": "cpu", "trust_remote_code": choice}
    where = {"model_name": str(model), "data_path": str(catalogue), "output_path": str(output)}
    return run_batch_inference(plain | where | knobs).output


@pytest.fixture(scope="module")
def encoded(model, catalogue, tmp_path_factory) -> dict[object, Path]:
    root = tmp_path_factory.mktemp("encoded")
    return {choice: encode(model, catalogue, root / f"{choice}.txt", choice) for choice in (True, "ignore")}


def test_every_stage_refuses_before_it_reads_data_or_loads_torch(model, adapters, tmp_path):
    output = str(tmp_path / "out")
    calls = [
        ["finetune", "--model_name", str(model), "--data_path", "nowhere", "--output_dir", output],
        ["infer", "--model_name", str(adapters[True]), "--data_path", "nowhere", "--output_path", output + ".txt"],
        ["evaluate", "--models", str(adapters["ignore"]), "--data_path", "nowhere", "--output_dir", output],
    ]
    code = "import sys; from ebr_lib.cli import main; rcs = [main(call) for call in " + repr(calls) + "]; "
    code += "sys.exit(str([*rcs, 'torch' in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *errors, rcs = run.stderr.strip().splitlines()
    assert rcs == "[2, 2, 2, False]"
    assert len(errors) == 3 and all("brings its own code" in error for error in errors)


def test_encoding_loads_what_was_chosen_and_an_output_holds_one_kind(encoded, model, catalogue, tmp_path):
    for choice, output in encoded.items():
        rows = [line.split("\x01")[-1].split() for line in output.read_text(encoding="utf-8").splitlines()[1:]]
        assert same(np.array(rows, dtype=float), pooled(model, choice is True))
        assert read_manifest(output)["model"]["trust_remote_code"] == choice
    own = tmp_path / "own.txt"
    for file in encoded[True].parent.glob("True.txt*"):
        shutil.copy(file, str(file).replace(str(encoded[True]), str(own)))
    with pytest.raises(DataError, match="trust_remote_code: True then, 'ignore' now"):
        encode(model, catalogue, own, "ignore", append=True)


def test_an_index_is_searched_only_with_the_model_as_it_was_loaded(encoded, catalogue, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"text": "steel"}\n', encoding="utf-8")
    config = {"embedding_path": str(encoded[True]), "output_dir": str(tmp_path / "index"), "queries_path": str(queries)}
    with pytest.raises(ModelError, match=rf"{ASKS}.*true, as it was then"):
        build_faiss_index(config)
    build_faiss_index(config | {"trust_remote_code": True})
    for choice in (False, "ignore"):
        with pytest.raises(ModelError, match="true, as it was then"):
            search(tmp_path / "index", "steel", trust_remote_code=choice)
    assert search(tmp_path / "index", TEXTS[1], 1, trust_remote_code=True)["score"].iloc[0] > 0.999
    with pytest.raises(ModelError, match="trust_remote_code True, not 'ignore'"):
        add_rows(tmp_path / "index", encoded["ignore"])


def test_stored_vectors_of_the_other_kind_are_encoded_again(encoded, model, tmp_path):
    queries = tmp_path / "queries.jsonl"
    rows = [{"query": f"find {text}", "positive": text} for text in TEXTS]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "models": [str(model)],
        "queries_path": str(queries),
        "corpus_path": str(encoded[True]),
        "data_path": None,
    }
    config |= {"bm25": False, "resamples": 100, "output_dir": str(tmp_path / "o"), "device": "cpu"}
    for choice, documents in ((True, "vectors of"), ("ignore", "encoded")):
        report = json.loads(evaluate_retrieval(config | {"trust_remote_code": choice}).report_json.read_text())
        assert report["how"]["shop"]["documents"].startswith(documents)


def test_training_refuses_before_reading_data_and_continues_under_the_same_choice(model, tmp_path):
    rows = [{"anchor": f"red kite {i}", "positive": f"a kite in red, number {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model_name": str(model),
        "data_path": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "saved"),
    }
    config |= {"eval_ratio": 0, "max_seq_length": 16, "lora_r": 2, "merge_adapter": True}
    with pytest.raises(ModelError, match=ASKS):
        train_sentence_transformer(config | {"data_path": "nowhere"})
    result = train_sentence_transformer(config | {"trust_remote_code": "ignore"})
    assert read_contract(result.model_path).trust_remote_code == "ignore"
    assert own_code(Path(result.merged_path)) == ()
    assert "trust_remote_code='ignore'" in (Path(result.model_path) / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match="set trust_remote_code: ignore, as it was then"):
        train_sentence_transformer(config | {"model_name": result.model_path, "data_path": "nowhere"})


def test_no_ray_worker_starts_for_a_model_that_is_refused(model, catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(RayEngine, "__init__", lambda *_: pytest.fail("started"))
    with pytest.raises(ModelError, match=ASKS):
        encode(model, catalogue, tmp_path / "out.parquet", False, engine="ray")


def test_the_flag_is_yes_or_no_or_ignore(model, capsys):
    for flag, said in ((["ignore"], "nowhere"), ([], "nowhere"), (["maybe"], "wanted a valid boolean or 'ignore'")):
        call = ["infer", "--model_name", str(model), "--data_path", "nowhere", "--trust_remote_code", *flag]
        assert main(call) == 2
        assert said in capsys.readouterr().err
