"""The encoder gives the vectors of `SentenceTransformer.encode`, and counts texts and tokens."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding

from ebr_lib.errors import ConfigError, DataError, ModelError, NotFiniteError
from ebr_lib.finetune.losses import base_model_only
from ebr_lib.model import encoder
from ebr_lib.model import precision as model_precision
from ebr_lib.model.adapters import add_lora
from ebr_lib.model.encoder import Encoder, batches
from ebr_lib.model.loading import load_model
from tests.models import load_tiny, tiny_tokenizer

TEXTS = [
    "how do i cancel my card payment",
    "a",
    "  two  spaces ",
    "送给妈妈的生日礼物",
    "blankets and pans " * 60,
    "iPhone 手机壳 苹果",
    "\tÀé😀</s>",
    *[f"row {i} " * (i % 9 + 1) for i in range(40)],
]
KINDS = ("bert", "xlm-r", "modernbert", "qwen2", "kalm")

exact = functools.partial(Encoder, precision="float32", backend="torch")


@pytest.fixture
def bert(tiny_bert):
    return load_model(str(tiny_bert), device="cpu")


def stock(model, texts=TEXTS, **kwargs):
    return model.encode(texts, show_progress_bar=False, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_library_s(tiny_models, kind):
    model = load_tiny(tiny_models, kind)
    for prompt, include_prompt in (("", True), ("query: ", True), ("query: ", False)):
        model.set_pooling_include_prompt(include_prompt)
        found = exact(model, prompt=prompt, normalize=False).encode(TEXTS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, stock(model, prompt=prompt or None), atol=1e-5)


def test_half_a_character_is_an_error_that_names_the_text(bert):
    with pytest.raises(DataError, match=r"text 2 of 3 holds half a character .*: 'b \\ud83d'"):
        exact(bert).encode(["a", "b \ud83d", "c"])
    with pytest.raises(ConfigError, match=r"prompt .* holds half a character"):
        Encoder(bert, prompt="\udcb2")


def with_nan_for(letter: str, folder, place) -> str:
    """A model whose embedding of a letter is NaN."""
    model = load_model(str(folder), device="cpu")
    (token,) = model.tokenizer(letter, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model[0].auto_model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(str(place))
    return str(place)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_is_an_error_that_names_the_texts(tiny_bert, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: True)
    model = load_model(with_nan_for("Q", tiny_bert, tmp_path / "nan"), device="cpu")
    texts = [f"row {i}" for i in range(150)] + ["a Q text"] + [f"more {i}" for i in range(150)]
    with pytest.raises(NotFiniteError, match=r"not finite \(NaN\) for 1 of 301 texts, such as 'a Q text'; ") as error:
        Encoder(model, precision=dtype, backend="torch").encode(texts)
    assert ("set precision to float32" in str(error.value)) == (dtype == "bfloat16")


def test_vectors_of_the_packaged_model(minilm):
    model = load_model(str(minilm), device="cpu")
    np.testing.assert_allclose(exact(model).encode(TEXTS[:7]), stock(model, TEXTS[:7]), atol=1e-5)


def test_left_padding_is_kept(tiny_models):
    model = load_model(str(tiny_models("qwen2")), device="cpu")
    model.tokenizer.padding_side = "left"
    model[1].pooling_mode = "lasttoken"
    np.testing.assert_allclose(exact(model).encode(TEXTS), stock(model), atol=1e-5)


def test_texts_are_cut_at_the_model_s_length_and_counted(bert):
    bert.max_seq_length = 10_000
    whole = [len(ids) for ids in bert.tokenizer(TEXTS)["input_ids"]]
    bert.max_seq_length = 12
    encoder = exact(bert, normalize=False)
    np.testing.assert_allclose(encoder.encode(TEXTS), stock(bert), atol=1e-5)
    stats = encoder.stats
    assert stats.texts == len(TEXTS)
    assert stats.truncated == sum(n > 12 for n in whole) > 0
    assert stats.tokens == sum(min(n, 12) for n in whole)
    assert stats.tokens + stats.tokens_lost == sum(whole)
    assert stats.lost_share == pytest.approx(1 - stats.tokens / sum(whole))


def test_the_length_may_change_and_the_model_be_used_in_between(bert):
    encoder = exact(bert, normalize=False)
    encoder.encode(TEXTS)
    bert.max_seq_length = 8
    wanted = stock(bert)  # leaves padding and truncation set in the shared tokenizer
    np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-5)


def test_padding_share_by_hand(bert):
    encoder = exact(bert)
    a, b = "pan", "pan " * 6
    encoder.encode([a, b])
    short, long = (len(ids) for ids in bert.tokenizer([a, b])["input_ids"])
    assert encoder.stats.slots == 2 * long
    assert encoder.stats.padding_share == pytest.approx((long - short) / (2 * long))


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_cut_first_and_normalised_after(bert, normalize):
    encoder = exact(bert, truncate_dim=8, normalize=normalize)
    found = encoder.encode(TEXTS)
    assert encoder.dim == 8
    wanted = stock(bert)[:, :8]
    if normalize:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_model_s_own_cut_is_kept(bert):
    bert.truncate_dim = 8
    encoder = exact(bert, normalize=False)
    assert encoder.dim == 8
    np.testing.assert_allclose(encoder.encode(TEXTS), stock(bert), atol=1e-5)


def test_same_texts_give_the_same_bits(bert):
    first = exact(bert).encode(TEXTS)
    assert np.array_equal(first, exact(bert).encode(TEXTS))


def test_order_and_batch_size_do_not_change_vectors(bert):
    wanted = exact(bert).encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    found = exact(bert, batch_tokens=64).encode([TEXTS[i] for i in order])
    np.testing.assert_allclose(found, wanted[order], atol=1e-5)


def test_nothing_gives_no_rows(bert):
    assert exact(bert).encode([]).shape == (0, 32)
    assert exact(bert).stats.padding_share == 0


def test_batches_keep_to_the_budget():
    lengths = np.sort(np.random.default_rng(0).integers(1, 400, 500))[::-1]
    cuts = list(batches(lengths, 1000))
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(500))
    for cut in cuts:
        longest, rows = lengths[cut.start], cut.stop - cut.start
        assert rows == 1 or longest * rows <= 1000
    assert list(batches(np.array([5000, 10]), 1000)) == [slice(0, 1), slice(1, 2)]


def test_a_batch_ends_where_texts_get_much_shorter():
    lengths = np.array([400, 390, 380] + [10] * 20)
    assert next(batches(lengths, 4096)) == slice(0, 3)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_halves_this_and_later_batches(bert, caplog, error):
    encoder, failed = exact(bert), list[int]()
    wanted = encoder.encode(TEXTS)

    def small(module, features):
        seen = features[0]["attention_mask"]
        if (count := int(seen.sum())) > 100 and len(seen) > 1:
            failed.append(count)
            raise error("too much")

    hook = bert[0].register_forward_pre_hook(small)
    with caplog.at_level(logging.WARNING, "ebr_lib"):
        np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    assert len(failed) == 2 and failed[1] <= failed[0] // 2
    assert caplog.text.count("内存不足") == 2
    encoder.encode(TEXTS)  # the size of later batches is known to fit
    assert len(failed) == 2
    hook.remove()
    bert[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("too much")))
    with pytest.raises(ModelError, match=r"a single text of \d+ tokens .*lower max_seq_length"):
        encoder.encode(["a b c"])


def test_a_missing_precision_becomes_float32_and_is_logged(bert, monkeypatch, caplog):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: False)
    with caplog.at_level(logging.INFO, logger="ebr_lib"):
        assert Encoder(bert, precision="auto", backend="torch").precision == "float32"
        assert not caplog.records
        assert Encoder(bert, precision="bfloat16", backend="torch").precision == "float32"
    assert "bfloat16" in caplog.text


def test_bfloat16_copies_the_model(bert, monkeypatch):
    monkeypatch.setattr(model_precision, "cpu_has_bf16", lambda: True)
    encoder = Encoder(bert, precision="auto", prompt="query: ", backend="torch")
    assert encoder.precision == "bfloat16"
    assert {weight.dtype for weight in encoder.model[0].parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in bert.parameters()} == {torch.float32}
    wanted = exact(bert, prompt="query: ").encode(TEXTS)
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)  # normalised in float32
    assert (found * wanted).sum(axis=1).min() > 0.99
    assert not np.array_equal(found, wanted)


def test_float32_of_a_half_precision_model(tiny_bert):
    model = load_model(str(tiny_bert), device="cpu", dtype=torch.bfloat16)
    encoder = exact(model)
    assert {weight.dtype for weight in encoder.model.parameters()} == {torch.float32}


def test_any_modules(bert):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[bert[0], bert[1], Dense(32, 24), bert[2]], device="cpu")
    encoder = exact(model)
    assert encoder.dim == 24
    np.testing.assert_allclose(encoder.encode(TEXTS), stock(model), atol=1e-5)


def test_a_model_without_a_transformer_is_encoded_by_the_library():
    static = StaticEmbedding(tiny_tokenizer()._tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[static], device="cpu")
    encoder = exact(model, normalize=False)
    np.testing.assert_allclose(encoder.encode(TEXTS), stock(model), atol=1e-6)
    assert encoder.encode([]).shape == (0, 16)


def test_adapters_count_while_enabled(bert):
    torch.manual_seed(0)
    plain = exact(bert).encode(TEXTS)
    add_lora(bert, r=4, alpha=8, dropout=0.5)
    for name, weight in bert.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    bert.train()
    encoder = exact(bert)
    adapted = encoder.encode(TEXTS)
    assert bert.training  # dropout was off, and is on again
    assert np.array_equal(adapted, encoder.encode(TEXTS))
    assert np.abs(adapted - plain).max() > 1e-3
    np.testing.assert_allclose(adapted, stock(bert), atol=1e-5)
    with base_model_only(bert):
        np.testing.assert_allclose(encoder.encode(TEXTS), plain, atol=1e-6)


def test_tokenize_then_embed_is_encode(bert):
    encoder = exact(bert)
    tokens = encoder.tokenize(TEXTS)
    assert np.array_equal(encoder.embed(tokens), encoder.encode(TEXTS))


def test_bar_counts_texts_and_is_gone_when_done(bert, capsys):
    exact(bert).encode(TEXTS, show_bar=True)
    shown = capsys.readouterr().err
    assert f"/{len(TEXTS)} " in shown and shown.endswith(" \r")


def test_texts_are_tokenized_in_chunks_of_bounded_size(bert, monkeypatch):
    texts = ["a" * 90, *["blanket"] * 30, "毯子" * 60, "", "b" * 40, "c" * 70]
    whole = exact(bert).tokenize(texts)
    monkeypatch.setattr(encoder, "TOKENIZER_CHUNK", 10)
    monkeypatch.setattr(encoder, "TOKENIZER_CHARACTERS", 100)
    chunks = list(encoder._chunks(texts))
    assert [text for chunk in chunks for text in chunk] == texts
    assert all(len(chunk) <= 10 and (len(chunk) == 1 or sum(map(len, chunk)) <= 100) for chunk in chunks)
    cut = exact(bert).tokenize(texts)
    assert all(np.array_equal(getattr(whole, name), getattr(cut, name)) for name in ("ids", "lengths", "lost"))
    assert len(exact(bert).tokenize([])) == 0
