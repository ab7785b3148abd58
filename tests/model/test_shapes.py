"""Models of every shape: they are loaded as they were saved, and each side is encoded in its own way."""

import functools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import warning_once

from ebr_lib.errors import ModelError
from ebr_lib.finetune.losses import base_model_only
from ebr_lib.logs import warn_once
from ebr_lib.model import adapters
from ebr_lib.model.adapters import ADAPTER_FILE, adapter_weights, add_lora, read_adapter
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.merged import save_merged
from ebr_lib.model.positions import position_limit
from ebr_lib.model.provenance import identify
from ebr_lib.model.shapes import give_pad_token, prompts_by_side
from ebr_lib.model.spec import EncoderSpec
from tests.models import edit_json, load_tiny, move_adapter, save_adapted

TEXTS = ["warm blankets 南瓜", "a", "", "how do i cancel <pad> my <mask> card </s> payment"]
ADAPTED = ("bert", "mpnet", "dense", "layernorm", "last_token", "no_pad", "passage", "kalm")
KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}}

exact = functools.partial(Encoder, precision="float32", backend="torch")


@pytest.fixture(autouse=True)
def _warn_again():
    warn_once.cache_clear()


def trained(tiny_models, shape: str, kind: str = "lora", **kwargs) -> SentenceTransformer:
    """A model with an adapter that changes its vectors."""
    model = load_tiny(tiny_models, shape, trainable=True, **kwargs)
    add_lora(model, r=4, alpha=16, dropout=0.0, **KINDS[kind])
    move_adapter(model)
    return model


def vectors(model: SentenceTransformer, side: str = "query") -> np.ndarray:
    return exact(model, prompt=prompt_of(model, side)).encode(TEXTS)


def save(model: SentenceTransformer, base: Path, folder: Path, side: str = "both") -> str:
    return str(save_adapted(model, base, folder, choice=model.trust_remote_code, side=side))


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), [*((shape, "dora") for shape in ADAPTED), ("bert", "rslora")])
def test_vectors_stay_when_saved_loaded_merged_and_resumed(tiny_models, tmp_path, shape, kind):
    model = trained(tiny_models, shape, kind)
    wanted = {side: vectors(model, side) for side in ("query", "document")}
    assert np.abs(wanted["query"] - vectors(load_tiny(tiny_models, shape))).max() > 1e-3  # training moved them
    trust = shape == "kalm"
    folder = save(model, tiny_models(shape), tmp_path / "adapter")
    loaded = {side: load_model(folder, trust_remote_code=trust, device="cpu", side=side) for side in wanted}
    for side, found in loaded.items():
        np.testing.assert_array_equal(vectors(found, side), wanted[side])
    save_merged(folder, tmp_path / "merged", trust_remote_code=trust, device="cpu")
    merged = load_model(str(tmp_path / "merged"), trust_remote_code=trust, device="cpu")
    np.testing.assert_allclose(vectors(merged, "document"), wanted["document"], atol=5e-5)
    resumed = load_tiny(tiny_models, shape)
    add_lora(resumed, r=4, alpha=16, dropout=0.0, **KINDS[kind])
    adapters.set_adapter_weights(resumed, read_adapter(tmp_path / "adapter"))
    np.testing.assert_array_equal(vectors(resumed), wanted["query"])


@pytest.mark.parametrize("shape", ["dense", "no_pad", "passage"])
def test_an_adapter_for_queries_leaves_documents_to_the_base(tiny_models, tmp_path, shape):
    model = trained(tiny_models, shape, "dora")
    folder = save(model, tiny_models(shape), tmp_path / "adapter", side="query")
    queries, documents = EncoderSpec(folder, device="cpu", precision="float32", backend="torch").encoder_pair()
    np.testing.assert_allclose(queries.encode(TEXTS), vectors(model), atol=5e-5)
    np.testing.assert_array_equal(documents.encode(TEXTS), vectors(load_tiny(tiny_models, shape), "document"))


@pytest.mark.parametrize("shape", ["dense", "layernorm", "last_token"])
def test_only_the_adapter_is_trained_when_new_and_when_continued(tiny_models, tmp_path, shape):
    model = trained(tiny_models, shape, "dora")
    folder = save(model, tiny_models(shape), tmp_path / "adapter")
    for one in (model, load_model(folder, device="cpu", trainable=True)):
        trainable = {name for name, weight in one.named_parameters() if weight.requires_grad}
        assert len(trainable) == len(adapter_weights(one)) > 0
        assert all("lora_" in name for name in trainable)
        move_adapter(one)
        assert all(
            torch.equal(weight, other)
            for part, base in zip(list(one)[1:], list(load_tiny(tiny_models, shape))[1:], strict=True)
            for weight, other in zip(part.parameters(), base.parameters(), strict=True)
        )


def test_a_saved_adapter_is_not_rounded_to_the_type_of_its_base(tiny_models, tmp_path):
    model = trained(tiny_models, "dense", dtype=torch.bfloat16)
    assert model[2].linear.weight.dtype == torch.float32  # as it is in the file and will be served
    torch.testing.assert_close(model[2].linear.weight, load_tiny(tiny_models, "dense")[2].linear.weight, atol=0, rtol=0)
    assert model.encode(TEXTS).dtype == np.float32
    folder = save(model, tiny_models("dense"), tmp_path / "adapter")
    wanted = adapter_weights(model)
    found = adapter_weights(load_model(folder, device="cpu", trainable=True, dtype=torch.bfloat16))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("change", ["one less", "one more", "another shape"])
def test_a_tensor_that_is_not_loaded_is_an_error(tiny_models, tmp_path, change):
    folder = Path(save(trained(tiny_models, "bert", "dora"), tiny_models("bert"), tmp_path / "adapter"))
    weights = load_file(folder / ADAPTER_FILE)
    name = next(name for name in weights if "magnitude" in name)
    if change == "one less":
        del weights[name]
    elif change == "one more":
        weights[name.replace("layer.0", "layer.7")] = weights[name].clone()
    else:
        weights[name] = torch.cat([weights[name], weights[name]])
    save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors of the adapter are not in the model.*magnitude"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["LayerNorm"]},
        {"target_modules": ["query", "word_embeddings"], "exclude_modules": None},
    ],
)
def test_adapters_of_other_libraries_are_loaded_and_merged_exactly(tiny_models, tmp_path, more):
    """A folder without a contract, whose adapter sentence-transformers loads."""
    from peft import LoraConfig

    model = load_tiny(tiny_models, "dense")
    all_linear = {"target_modules": "all-linear", "exclude_modules": r"pooler.*", "r": 4}
    model.add_adapter(LoraConfig(**all_linear | more), "default")
    model.requires_grad_(False)
    for name, weight in model[0].named_parameters():
        weight.requires_grad_("lora_" in name or "modules_to_save" in name or ("bias" in more and "bias" in name))
    move_adapter(model)
    wanted = vectors(model)
    model[0].model.peft_config["default"].base_model_name_or_path = str(tiny_models("dense"))
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    np.testing.assert_allclose(vectors(load_model(str(tmp_path / "theirs"), device="cpu")), wanted, atol=1e-6)
    merged = load_model(str(tmp_path / "theirs"), device="cpu", merged=True)
    np.testing.assert_allclose(vectors(merged), wanted, atol=5e-5)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())


def test_an_adapter_without_its_base_s_files_keeps_the_base_s_pooling(tiny_models, tmp_path):
    model = trained(tiny_models, "dense", "dora")
    model[0].model.peft_config["default"].base_model_name_or_path = str(tiny_models("dense"))
    model[0].model.save_pretrained(tmp_path / "alone")
    np.testing.assert_array_equal(vectors(load_model(str(tmp_path / "alone"), device="cpu")), vectors(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pooling", "no pooling"),
        ("tokenizer", "knows no words"),
        ("model.safetensors", "does not load"),
        ("2_Dense/model.safetensors", "does not load"),
        ("2_Dense/config.json", "does not load"),
    ],
)
def test_an_incomplete_model_is_refused(tiny_models, tmp_path, change, message):
    folder = shutil.copytree(tiny_models("dense"), tmp_path / "model")
    if change == "pooling":
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps(modules[:1]))
    elif change == "tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    else:
        (folder / change).write_bytes((folder / change).read_bytes()[:40])
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), device="cpu")


def test_layers_that_only_the_files_have_are_logged(tiny_bert, tmp_path, caplog):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    edit_json(folder / "config.json", num_hidden_layers=1)
    load_model(str(folder), device="cpu")
    assert "are not used: encoder.layer.1" in caplog.text
    edit_json(folder / "config.json", num_hidden_layers=2, intermediate_size=16)
    with pytest.raises(ModelError, match=r"another shape than config\.json says: encoder"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("lost", ["layer.1.attention.self.query.weight", "embeddings", "pooler"])
def test_weights_that_the_files_lack_are_an_error(tiny_bert, tmp_path, caplog, request, lost):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = {name: weight for name, weight in load_file(folder / "model.safetensors").items() if lost not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.ERROR)  # as TRANSFORMERS_VERBOSITY=error does
    request.addfinalizer(lambda: library.setLevel(level))
    if lost == "pooler":  # of which no embedding is made
        load_model(str(folder), device="cpu")
    else:
        with pytest.raises(ModelError, match=f"would be random numbers: .*{lost}"):
            load_model(str(folder), device="cpu")
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.usefixtures("openvino")
def test_in_bfloat16_a_trained_model_and_its_saved_one_give_the_same_vectors(tiny_models, tmp_path):
    model = trained(tiny_models, "dense", "dora")
    wanted = Encoder(model, precision="bfloat16").encode(TEXTS)
    with base_model_only(model):
        of_base = Encoder(model, precision="bfloat16").encode(TEXTS)
    assert adapters.is_adapted(model)
    folder = save(model, tiny_models("dense"), tmp_path / "adapter")
    served = EncoderSpec(folder, device="cpu", precision="bfloat16", query_prompt="").encoder("query")
    np.testing.assert_array_equal(served.encode(TEXTS), wanted)
    np.testing.assert_array_equal(of_base, Encoder(load_tiny(tiny_models, "dense"), precision="bfloat16").encode(TEXTS))


# --- sides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["towers", "late_towers"])
def test_each_side_uses_its_own_tower(tiny_models, shape):
    library = SentenceTransformer(str(tiny_models(shape)), device="cpu")
    task = {"query": "query", "document": "passage" if shape == "late_towers" else "document"}
    wanted = {side: library.encode(TEXTS, task=name, normalize_embeddings=True) for side, name in task.items()}
    assert np.abs(wanted["query"] - wanted["document"]).max() > 0.1
    for precision, allowed in (("float32", 1e-6), ("bfloat16", 2e-2)):
        spec = EncoderSpec(str(tiny_models(shape)), device="cpu", precision=precision, backend="torch")
        pair = spec.encoder_pair()
        for side, encoder in zip(wanted, pair, strict=True):
            np.testing.assert_allclose(encoder.encode(TEXTS), wanted[side], atol=allowed)


def test_each_side_uses_its_task(tiny_models):
    where = str(tiny_models("tasks"))
    library = SentenceTransformer(where, trust_remote_code=True, device="cpu")
    for side, task in (("query", "retrieval.query"), ("document", "retrieval.passage")):
        wanted = library.encode(TEXTS, task=task, normalize_embeddings=True)
        assert np.abs(wanted - library.encode(TEXTS, normalize_embeddings=True)).max() > 0.1
        spec = EncoderSpec(where, device="cpu", precision="float32", backend="torch", trust_remote_code=True)
        found = spec.encoder_pair()[side == "document"]
        np.testing.assert_allclose(found.encode(TEXTS), wanted, atol=1e-6)
        assert (Encoder(found.model, precision="bfloat16").encode(TEXTS) * wanted).sum(axis=1).min() > 0.999
    with pytest.raises(ModelError, match=r"different tasks.*cannot be fine-tuned"):
        load_model(where, trust_remote_code=True, device="cpu", trainable=True)


def test_a_model_of_two_towers_has_an_identity(tiny_models):
    assert identify(str(tiny_models("towers"))).sha256 != identify(str(tiny_models("late_towers"))).sha256
    assert identify(str(tiny_models("static"))).sha256


def test_two_towers_are_not_trained(tiny_models):
    for shape in ("towers", "late_towers"):
        with pytest.raises(ModelError, match=r"two towers.*cannot be fine-tuned here"):
            load_tiny(tiny_models, shape, trainable=True)


def test_routes_of_unknown_names_are_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models("towers"), tmp_path / "model")
    place = folder / "router_config.json"
    config = json.loads(place.read_text())
    config["structure"] = dict(zip(("left", "right"), config["structure"].values(), strict=True))
    config["parameters"]["default_route"] = "left"
    place.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"routes named left, right.*query texts"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("prompts", "default", "wanted"),
    [
        ({"query": "q: ", "document": "", "passage": "p: "}, "passage", ("q: ", "p: ")),
        ({"query": "", "document": "", "search_query": "q: ", "search_document": "d: "}, None, ("q: ", "d: ")),
        ({"query": "q: ", "document": ""}, "query", ("q: ", "")),
        ({"query": "", "document": "", "general": "all: "}, "general", ("all: ", "all: ")),
        ({"query": "q: ", "document": None, "general": "all: "}, "general", ("q: ", "all: ")),
        ({"Query": "q: ", "Corpus": "c: "}, None, ("q: ", "c: ")),
        ({"query": "", "document": ""}, None, ("", "")),
    ],
)
def test_prompts_are_found_by_side(prompts, default, wanted):
    assert tuple(prompts_by_side(prompts, default, "m").values()) == wanted


def test_unknown_prompt_names_are_logged(caplog):
    assert prompts_by_side({"query": "", "classify": "c: "}, None, "m") == {"query": "", "document": ""}
    assert "classify" in caplog.text


def test_an_empty_prompt_stays_empty_despite_a_default_prompt(tiny_models, caplog):
    tiny_models("passage")
    caplog.clear()
    warning_once.cache_clear()
    model = load_tiny(tiny_models, "passage")
    assert "prompt" not in caplog.text
    bare = SentenceTransformer(str(tiny_models("passage")), device="cpu").encode(TEXTS, prompt="")
    np.testing.assert_allclose(exact(model, prompt="").encode(TEXTS), bare, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS), bare, atol=1e-6)
    encoder = exact(model, prompt="")
    encoder._tokenizer = None  # a model that prepares texts in its own way
    model.default_prompt_name = "document"
    np.testing.assert_allclose(encoder.encode(TEXTS), bare, atol=1e-6)


def test_a_saved_empty_prompt_stays_empty(tiny_models, tmp_path):
    model = trained(tiny_models, "passage")
    model.prompts["document"] = ""
    folder = save(model, tiny_models("passage"), tmp_path / "adapter")
    save_merged(folder, tmp_path / "merged", trust_remote_code=False, device="cpu")
    for name in (folder, str(tmp_path / "merged")):
        assert load_model(name, device="cpu").prompts == {"query": "query: ", "document": ""}
    SentenceTransformer(str(tmp_path / "merged"), device="cpu")  # a default prompt that is gone would stop it


# --- tokens and positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "usable"), [("xlm-r", 513), ("mpnet", 512), ("bert", 512), ("qwen2", 512)])
def test_texts_are_cut_at_the_positions_that_there_are(tiny_models, tmp_path, caplog, kind, usable):
    folder = shutil.copytree(tiny_models(kind), tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 514}))
    model = load_model(str(folder), device="cpu")
    assert position_limit(model) == model.max_seq_length == usable
    assert "位置" in caplog.text
    caplog.clear()
    encoded = exact(model).encode(["long " * 2000, "a"])
    assert np.isfinite(encoded).all()
    assert load_model(str(folder), device="cpu", max_seq_length=9000).max_seq_length == usable
    assert load_model(str(folder), device="cpu").max_seq_length == usable
    assert len(caplog.records) == 1  # of 9000; what is the model's own was said before


def test_a_tokenizer_without_a_limit_is_cut_at_the_positions(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models("xlm-r"), tmp_path / "model")
    (folder / "sentence_bert_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", model_max_length=int(1e30))
    model = load_model(str(folder), device="cpu")
    assert model.max_seq_length == 513
    assert np.isfinite(model.encode(["long " * 2000])).all()


@pytest.mark.parametrize("pad", [None, 599_999])
def test_padding_is_hidden_whatever_token_pads(tiny_models, pad):
    model = load_tiny(tiny_models, "no_pad")
    model.tokenizer.pad_token = None
    if pad is not None:
        model.tokenizer.add_special_tokens({"pad_token": "<beyond the table>"})
    give_pad_token(model)
    assert 0 <= model.tokenizer.pad_token_id < model[0].model.config.vocab_size
    together = vectors(model)
    alone = np.concatenate([exact(model).encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


# --- other kinds of models ----------------------------------------------------------------------------------------


def test_static_embeddings_encode_in_float32_and_are_not_trained(tiny_models):
    wanted = SentenceTransformer(str(tiny_models("static")), device="cpu").encode(TEXTS[:2], normalize_embeddings=True)
    model = load_tiny(tiny_models, "static")
    np.testing.assert_allclose(Encoder(model, precision="bfloat16").encode(TEXTS[:2]), wanted, atol=1e-6)
    with pytest.raises(ModelError, match=r"StaticEmbedding, not a transformer.*cannot be fine-tuned"):
        add_lora(model, r=4, alpha=8, dropout=0.0)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "XLMRobertaForTokenClassification"])
def test_a_model_that_classifies_is_refused_by_name(tiny_bert, tmp_path, kind):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    edit_json(folder / "config.json", architectures=[kind])
    load_model(str(folder), device="cpu")  # with modules.json and a pooling it is meant to embed
    (folder / "modules.json").unlink()
    with pytest.raises(ModelError, match=f"is a {kind}, not an embedding model"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder"])
def test_a_model_of_another_kind_of_the_library_is_refused_by_name(tiny_bert, tmp_path, kind):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"is a {kind}, not an embedding model"):
        load_model(str(folder), device="cpu")


def test_without_modules_json_the_assumed_pooling_is_logged(tiny_bert, tmp_path, caplog):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    wanted = vectors(load_model(str(folder), device="cpu"))
    (folder / "modules.json").unlink()
    np.testing.assert_allclose(vectors(load_model(str(folder), device="cpu")), wanted, atol=1e-6)
    load_model(str(folder), device="cpu")
    assert caplog.text.count("mean pooling is assumed") == 1


def test_a_token_without_a_vector_is_an_error_that_names_the_text(tiny_models):
    """The tokenizer has one token more than the model's table has rows."""
    model = load_tiny(tiny_models, "no_pad")
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    encoder = exact(model)
    with pytest.raises(ModelError, match=r"text 2 of 3 \('warm <extra> blanket'\) has the token '<extra>' of number"):
        encoder.encode(["steel", "warm <extra> blanket", "wool"])
    assert encoder.encode(["steel"]).shape == (1, 32)
