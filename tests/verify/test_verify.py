"""`verify` names the cause of a difference: a small server breaks in each of the usual ways."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from ebr_lib import cli, verify_endpoint
from ebr_lib.errors import ConfigError, MissingError, ModelError
from ebr_lib.metrics import unit
from ebr_lib.model.loading import load_model
from ebr_lib.verify import run
from tests.models import adapted, edit_json
from tests.servers import as_json, serving, vectors_answer

QUERY, DOCUMENT = "query: ", "passage: "


@pytest.fixture(scope="module")
def trained(tiny_models, tmp_path_factory) -> Path:
    """An adapter on a base with a prompt for each side; a cause is found by embedding 174 times."""
    return adapted(tiny_models("one_layer"), tmp_path_factory.mktemp("trained") / "shop-peft-lora")


@pytest.fixture(scope="module", autouse=True)
def each_model_is_loaded_once():
    known, load = {}, run.trained_sides

    def once(spec, sides):
        key = repr((spec, sides))
        if key not in known:
            known[key] = load(spec, sides)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "trained_sides", once)
        yield


@pytest.fixture(scope="module")
def loaded(trained):
    return load_model(str(trained), device="cpu", merged=True)


@pytest.fixture
def model(loaded):
    """The served model, as sentence-transformers runs it; a test may break it."""
    return copy.deepcopy(loaded)


def encode(model, texts):
    return model.encode(texts, show_progress_bar=False, convert_to_tensor=True).float().numpy()


def verified(trained, encoder, **knobs):
    """What `verify` finds on a server whose vectors `encoder` makes of the texts that arrive."""

    def answer(path, body, headers):
        if path == "/v1/models":
            return as_json({"data": [{"id": "shop"}]})
        return vectors_answer(path, encoder(body["inputs" if path == "/embed" else "input"]))

    with serving(answer) as url:
        return verify_endpoint({"target": url, "model_name": str(trained), "device": "cpu"} | knobs)


def test_the_same_vectors_pass_by_either_api(trained, model):
    result = verified(trained, lambda texts: encode(model, texts))
    assert result.is_same and result.causes == ()
    assert [(gap.side, gap.kind) for gap in result.gaps] == [
        (side, f"{length} {language}")
        for side in ("query", "document")
        for length in ("short", "long")
        for language in ("English", "Chinese")
    ]
    assert max(gap.distance for gap in result.gaps) < 1e-5

    def tei_only(path, body, headers):
        return vectors_answer(path, encode(model, body["inputs"])) if path == "/embed" else as_json({}, 404)

    with serving(tei_only) as url:
        assert verify_endpoint({"target": url, "model_name": str(trained), "sides": ["query"]}).is_same


def shorter(model):
    model.max_seq_length = 64


def from_the_left(model):
    model.tokenizer.truncation_side = "left"


def without_end(model):
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )


def cls_pooling(model):
    model[1].pooling_mode = "cls"


def in_bfloat16(model):
    model.bfloat16()


@pytest.mark.parametrize(
    ("broken", "causes"),
    [
        (shorter, ["truncation length 64 (the model was trained with 128)"]),
        (from_the_left, ["truncation side (the beginning of long texts is cut off, not the end)"]),
        (without_end, ["end-of-text token missing (the tokenizer closes every text with one)"]),
        (cls_pooling, ["pooling cls (the model was trained with mean)"]),
        (in_bfloat16, ["precision ("]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_model_is_explained(trained, model, broken, causes):
    broken(model)
    result = verified(trained, lambda texts: encode(model, texts))
    assert len(result.causes) == len(causes), result.causes
    assert [found[: len(cause)] for found, cause in zip(result.causes, causes, strict=True)] == causes


def test_half_precision_is_allowed_when_asked_for(trained, model):
    in_bfloat16(model)
    assert verified(trained, lambda texts: encode(model, texts), precision="half").is_same


def test_a_prompt_may_be_missing_doubled_or_the_other_side_s(trained, model):
    bare = verified(trained, lambda texts: encode(model, texts), prompts="server")
    assert bare.causes == tuple(
        f"prompt missing (the model was trained with {prompt!r} before every {side})"
        for prompt, side in ((QUERY, "query"), (DOCUMENT, "document"))
    )
    twice = verified(trained, lambda texts: encode(model, [QUERY + text for text in texts]), sides=["query"])
    assert twice.causes == (f"prompt doubled (the server puts its own before {QUERY!r})",)
    both = verified(trained, lambda texts: encode(model, [QUERY + text for text in texts]), prompts="server")
    assert both.causes == (f"prompt of the other side ({QUERY!r}, for a document {DOCUMENT!r})",)


def test_the_server_s_own_prompts_are_asked_for_by_name(trained, model):
    asked = []

    def answer(path, body, headers):
        asked.append((body.get("prompt_name"), headers["Authorization"], body.get("truncate")))
        prompt = {"query": QUERY, "document": DOCUMENT}[body["prompt_name"]]
        return vectors_answer(path, encode(model, [prompt + text for text in body["inputs"]]))

    token = trained.parent / "token"
    token.write_text("secret\n", encoding="utf-8")
    with serving(answer) as url:
        knobs = {"prompts": "name", "token_file": str(token), "request": {"truncate": True}}
        assert verify_endpoint(
            {"target": f"{url}/embed", "model_name": str(trained), "served_name": "x"} | knobs
        ).is_same
    assert set(asked) == {("query", "Bearer secret", True), ("document", "Bearer secret", True)}


def test_of_several_served_models_the_trained_one_is_asked(trained, model):
    asked, names = set(), ["base", trained.name]

    def answer(path, body, headers):
        if path == "/v1/models":
            return as_json({"data": [{"id": name} for name in names]})
        asked.add(body["model"])
        return vectors_answer(path, encode(model, body["input"]))

    with serving(answer) as url:
        knobs = {"target": f"{url}/v1", "model_name": str(trained), "sides": ["query"]}
        assert verify_endpoint(knobs).is_same and asked == {trained.name}
        names[1] = "other"
        with pytest.raises(ModelError, match=r"serves several models \(base, other\), none named .*; give served_name"):
            verify_endpoint(knobs)
        assert verify_endpoint(knobs | {"served_name": "other"}).is_same


def test_vectors_that_are_not_of_length_one(trained, model):
    parts = torch.nn.ModuleList(list(model)[:-1])

    def raw(texts):
        features = model.preprocess(texts)
        with torch.no_grad():
            for part in parts:
                features = part(features)
        return features["sentence_embedding"].numpy()

    causes = verified(trained, raw).causes
    assert len(causes) == 1, causes
    (cause,) = causes
    assert cause.startswith("normalisation missing (")


def test_vectors_that_are_cut_must_have_length_one_again(trained, model):
    def cut(texts):
        return encode(model, texts)[:, :16]

    (cause,) = verified(trained, cut, truncate_dim=16).causes
    assert cause.startswith("normalisation missing (")
    assert verified(trained, lambda texts: unit(cut(texts)), truncate_dim=16).is_same


def test_the_base_model_without_its_adapter_also_with_a_second_mistake(trained, tiny_models):
    base = load_model(str(tiny_models("one_layer")), device="cpu")
    found = verified(trained, lambda texts: encode(base, texts))
    assert len(found.causes) == 1 and found.causes[0].startswith("base model without the adapter (")
    cls_pooling(base)
    found = verified(trained, lambda texts: encode(base, texts))
    assert [cause.split()[0] for cause in found.causes] == ["base", "pooling"]


def test_another_model_is_unknown(trained, tiny_models):
    other = load_model(str(tiny_models("xlm-r")), device="cpu")
    assert all(cause.startswith("unknown (") for cause in verified(trained, lambda texts: encode(other, texts)).causes)


def test_long_texts_that_a_server_refuses(trained, model):
    def answer(path, body, headers):
        if any(len(text) > 500 for text in body.get("input", ())):
            return as_json({"error": "too many tokens"}, 413)
        return vectors_answer(path, encode(model, body["input"])) if body else as_json({}, 404)

    with serving(answer) as url:
        (cause,) = verify_endpoint({"target": url, "model_name": str(trained)}).causes
    assert cause.startswith("truncation (long texts are refused: ") and "too many tokens" in cause


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_sentence_transformers_folder(trained, loaded, tmp_path):
    folder = tmp_path / "merged"
    loaded.save_pretrained(str(folder), create_model_card=False)
    knobs = {"target": str(folder), "model_name": str(trained)}
    assert verify_endpoint(knobs).is_same
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name="query")
    assert verify_endpoint(knobs).causes[0] == f"prompt doubled (the server puts its own before {QUERY!r})"
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name=None)
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode="max")
    assert verify_endpoint(knobs).causes == ("pooling max (the model was trained with mean)",)


def test_the_adapter_of_queries_only_does_not_belong_on_documents(tiny_models, tmp_path):
    from ebr_lib.model.adapters import add_lora
    from tests.models import move_adapter, save_adapted

    base = tiny_models("bert")
    model = load_model(str(base), device="cpu")
    add_lora(model, r=2, alpha=4, dropout=0.0)
    move_adapter(model)
    folder = save_adapted(model, base, tmp_path / "q-peft-lora", side="query")
    served = load_model(str(folder), device="cpu", merged=True)
    found = verified(folder, lambda texts: encode(served, texts))
    assert found.causes == ("the adapter is on documents too, and is for queries only",)
    assert verified(folder, lambda texts: encode(served, texts), sides=["query"]).is_same


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, "text/html", b"<!doctype html><title>Sign in</title>"), r"answers with an HTML page .*Sign in"),
        ((502, "text/html", b"<h1>Bad gateway</h1>"), r"answers 502 .*Bad gateway"),
        ((401, "application/json", b"{}"), r"answers 401 .*token_file"),
        ((302, "text/html", b""), r"answers 302 .*http://127\.0\.0\.1:9/login: give that address"),
        ((200, "text/plain", b"ok"), r"text/plain that is not JSON: ok"),
        (as_json({"data": [{"index": 0}]}), r"JSON that holds no vectors"),
        (as_json({"data": []}), r"gives 0 vectors for 3 texts"),
        (as_json({"data": [{"index": i, "embedding": [0.5] * 3} for i in range(3)]}), r"wanted 3 vectors of 32 dim"),
        (as_json({"data": [{"index": i, "embedding": [0.5] * (i + 1)} for i in range(3)]}), r"of several dimensions"),
        (as_json({"data": [{"index": i, "embedding": ["nan"] * 32} for i in range(3)]}), r"not finite \(NaN\)"),
    ],
)
def test_an_endpoint_without_vectors_is_a_sentence(trained, answer, said, capsys):
    with serving(lambda path, body, headers: answer) as url:
        status = cli.main(["verify", f"{url}/v1", "--model_name", str(trained), "--served_name", "x"])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ")
    assert re.search(said, error), error


def test_addresses_and_folders_that_are_not_there(trained, tmp_path):
    model = {"model_name": str(trained)}
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1/embeddings cannot be reached"):
        verify_endpoint({"target": "http://127.0.0.1:9"} | model)
    with pytest.raises(MissingError, match="nowhere: no such folder"):
        verify_endpoint({"target": str(tmp_path / "nowhere")} | model)
    with pytest.raises(MissingError, match="holds neither a model nor a graph"):
        verify_endpoint({"target": str(tmp_path)} | model)
    with pytest.raises(ConfigError, match="not an address of http"):
        verify_endpoint({"target": "ftp://host/x"} | model)
    (tmp_path / "token").write_text("two words", encoding="utf-8")
    for file, error in (("token", ConfigError), ("none", MissingError)):
        with pytest.raises(error, match="token_file"):
            verify_endpoint({"target": "http://127.0.0.1:9", "token_file": str(tmp_path / file)} | model)


def test_the_command_fails_on_other_vectors(trained, loaded, tmp_path, capsys):
    folder = tmp_path / "merged"
    loaded.save_pretrained(str(folder), create_model_card=False)
    words = ["verify", str(folder), "--model_name", str(trained)]
    assert cli.main(words) == 0
    shutil.rmtree(folder / "1_Pooling")
    assert cli.main(words) == 2
    assert "does not load" in capsys.readouterr().err
