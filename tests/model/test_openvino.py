"""On a CPU, OpenVINO gives the library's vectors; if it does not, torch encodes and the log says so."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
import torch

from ebr_lib.errors import DataError, ModelError
from ebr_lib.inference.run import run_batch_inference
from ebr_lib.model import openvino
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.encoder import Encoder
from ebr_lib.model.loading import load_model, prompt_of
from ebr_lib.model.precision import cpu_has_bf16
from tests.models import load_tiny

TEXTS = [
    "how do i cancel my card payment",
    "a",
    "",
    "送给妈妈的生日礼物",
    "blankets and pans " * 60,
    "my <pad> and <mask> are </s> text",
    *[f"row {i} " * (i % 9 + 1) for i in range(40)],
]
KINDS = ("bert", "xlm-r", "mpnet", "modernbert", "kalm", "dense", "last_token", "no_pad")

pytestmark = pytest.mark.usefixtures("openvino")
bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bfloat16")


@pytest.fixture
def bert(tiny_bert):
    return load_model(str(tiny_bert), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_library_s(tiny_models, kind):
    model = load_tiny(tiny_models, kind)
    prompt = prompt_of(model, "query")
    encoder = Encoder(model, prompt=prompt, normalize=False, precision="float32", backend="openvino", batch_tokens=300)
    assert encoder.backend == "openvino"
    found = encoder.encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS, prompt=prompt), atol=1e-5)
    assert np.array_equal(found, encoder.encode(TEXTS))


@bf16
@pytest.mark.parametrize("kind", ["bert", "modernbert", "last_token"])
def test_vectors_in_bfloat16_are_near(tiny_models, kind):
    model = load_tiny(tiny_models, kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, a gated layer is left to torch
    try:
        encoder = Encoder(model, precision="bfloat16", backend="openvino")
    finally:
        torch.set_num_threads(threads)
    assert (encoder.precision, encoder.backend) == ("bfloat16", "openvino")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    wanted = model.encode(TEXTS, normalize_embeddings=True)
    assert (encoder.encode(TEXTS) * wanted).sum(axis=1).min() > 0.999


def test_vectors_stay_when_the_memory_of_a_batch_is_reused(tiny_models):
    """CLS pooling alone returns a view of the states."""
    model = load_tiny(tiny_models, "bert")
    model[1].pooling_mode = "cls"
    del model[2]
    encoder = Encoder(model, normalize=False, precision="float32", backend="openvino", batch_tokens=64)
    np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_prompts_share_one_compiled_model(bert):
    queries = Encoder(bert, prompt="query: ", precision="float32", backend="openvino")
    documents = queries.with_prompt("passage: ")
    assert documents._compiled is queries._compiled
    np.testing.assert_allclose(documents.encode(TEXTS), bert.encode(TEXTS, prompt="passage: "), atol=1e-5)
    np.testing.assert_allclose(queries.encode(TEXTS), bert.encode(TEXTS, prompt="query: "), atol=1e-5)
    assert queries.stats.texts == documents.stats.texts == len(TEXTS)


def test_an_unmerged_adapter_counts(bert):
    add_lora(bert, r=4, alpha=8, dropout=0.5, dora=True)
    torch.manual_seed(0)
    for name, weight in bert.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    found = Encoder(bert.train(), precision="float32", backend="openvino").encode(TEXTS)
    assert bert.training
    np.testing.assert_allclose(found, bert.eval().encode(TEXTS), atol=1e-5)


def test_a_model_that_traces_differently_runs_on_torch(bert, caplog):
    """Tracing may freeze a value that varies, so vectors are compared."""
    inner, forward = bert[0].model, bert[0].model.forward

    def traced_otherwise(*args, **kwargs):
        out = forward(*args, **kwargs)
        if torch.jit.is_tracing():
            out.last_hidden_state = out.last_hidden_state.flip(-1)
        return out

    inner.forward = traced_otherwise
    with caplog.at_level(logging.INFO, "ebr_lib"):
        encoder = Encoder(bert, precision="float32")
    assert encoder.backend == "torch"
    assert "vectors differ from torch's by" in caplog.text
    np.testing.assert_allclose(encoder.encode(TEXTS), bert.encode(TEXTS), atol=1e-5)
    with pytest.raises(ModelError, match=r"backend openvino cannot encode .* differ .*set backend: auto"):
        Encoder(bert, precision="float32", backend="openvino")


def test_a_model_that_cannot_be_traced_runs_on_torch(bert, caplog):
    def forward(*args, **kwargs):
        raise NotImplementedError("only when traced") if torch.jit.is_tracing() else AssertionError

    bert[0].model.forward = forward
    root = logging.getLogger()
    before = root.level, root.handlers[:], root.filters[:]
    with caplog.at_level(logging.INFO, "ebr_lib"):
        assert Encoder(bert, precision="float32").backend == "torch"
    assert "not on OpenVINO" in caplog.text
    assert (root.level, root.handlers, root.filters) == before  # OpenVINO silences it and does not undo that


def test_a_static_model_is_encoded_by_the_library(tiny_models):
    model = load_tiny(tiny_models, "static")
    assert Encoder(model).backend == "torch"
    with pytest.raises(ModelError, match="not a transformer"):
        Encoder(model, backend="openvino")


def test_a_gated_layer_with_one_thread_runs_on_torch_in_bfloat16(tiny_models, monkeypatch):
    """OpenVINO would end the process."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = load_tiny(tiny_models, "qwen2")
    with pytest.raises(openvino.ConversionError, match="two threads"):
        openvino.compiled_transformer(model, "bfloat16")
    assert openvino._streams(model, "float32") == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert openvino._streams(model, "bfloat16") == 2


def test_no_telemetry_is_sent():
    assert sys.modules["openvino_telemetry"] is None
    from openvino.tools.ovc.telemetry_utils import tm

    assert tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_the_knob_chooses_the_backend_and_the_manifest_records_it(tmp_path, tiny_bert):
    (tmp_path / "in.csv").write_text("id\x01description\n1\x01blanket\n", encoding="utf-8")
    config = {"model_name": str(tiny_bert), "data_path": str(tmp_path / "in.csv"), "device": "cpu"}
    made = {}
    for backend in ("auto", "torch"):
        output = tmp_path / backend / "e.txt"
        result = run_batch_inference(config | {"output_path": str(output), "backend": backend, "precision": "float32"})
        made[backend] = json.loads(result.manifest.read_text())["settings"].get("backend", "torch")
    assert made == {"auto": "openvino", "torch": "torch"}
    other = {
        "output_path": str(tmp_path / "auto" / "e.txt"),
        "backend": "torch",
        "precision": "float32",
        "append": True,
    }
    with pytest.raises(DataError, match="backend: 'openvino' then"):
        run_batch_inference(config | other)
