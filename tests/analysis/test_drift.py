"""Compare drift with the KL divergences and losses of two separate models, text by text."""

from __future__ import annotations

import pytest
import tiny_runs
import torch
from random_adapters import randomise
from tiny_tokenizer import SENTENCES

import lorakit
from lorakit.analysis import adapter_drift, divergence, drift
from lorakit.analysis.drift import read_texts
from lorakit.errors import BaseModelError, ConfigurationError, DataError
from lorakit.models.base_config import BaseConfig
from lorakit.tasks.language_modelling import start_ids


def test_divergence_by_its_definition():
    base, adapted = torch.randn(7, 11), torch.randn(7, 11)
    kl, changed = divergence(base, adapted)
    p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (base, adapted))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))
    assert torch.equal(changed, base.argmax(-1) != adapted.argmax(-1))
    assert not divergence(base, base)[0].any()


def test_classes_that_are_masked_in_both():
    logits = torch.tensor([[1.0, -torch.inf, 0.0]])
    kl, _ = divergence(logits, logits + torch.tensor([0.0, 0.0, 1.0]))
    assert kl.isfinite().all()
    with pytest.raises(ConfigurationError, match="equal shape"):
        divergence(torch.ones(2, 3), torch.ones(2, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny base and a random adapter for it."""
    folder = tmp_path_factory.mktemp("drift")
    name = tiny_runs.save_base(folder / "base")
    model = lorakit.load_base(name, dtype="float32").model
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, targets="all-linear"), name="a")
    randomise(handle)
    handle.save(folder / "adapter")
    (folder / "text.txt").write_text("\n\n".join(SENTENCES) + "\n", encoding="utf-8")
    return folder


def test_against_two_models_run_apart(folder):
    base = BaseConfig(name=str(folder / "base"), dtype="float32")
    found = adapter_drift(folder / "adapter", folder / "text.txt", base=base, batch_size=3)
    loaded = lorakit.load_base(base.name, dtype="float32")
    adapted = lorakit.load_base(base.name, dtype="float32").model
    lorakit.load(adapted, folder / "adapter")
    kls, changed, losses, count = [], 0, [0.0, 0.0], 0
    for text, one in zip(SENTENCES, found.pieces, strict=True):
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = [m(input_ids=ids).logits[0, :-1].double() for m in (loaded.model, adapted)]
        p, q = (torch.distributions.Categorical(logits=each) for each in logits)
        kl = torch.distributions.kl_divergence(p, q)
        torch.testing.assert_close(torch.tensor(one.kl).double(), kl, rtol=1e-3, atol=1e-6)
        kls += kl.tolist()
        changed += int((logits[0].argmax(-1) != logits[1].argmax(-1)).sum())
        targets = ids[0, 1:]
        for i, each in enumerate(logits):
            losses[i] += float(torch.nn.functional.cross_entropy(each, targets, reduction="sum"))
        count += len(targets)
        most = int(kl.argmax())
        assert one.most["kl"] == pytest.approx(float(kl[most]), rel=1e-3)
        likely = [loaded.tokenizer.decode([int(each[most].argmax())]) for each in logits]
        assert [one.most["base"], one.most["adapted"]] == likely
        context = loaded.tokenizer.decode(
            ids[0, : most + 1]
        )  # up to the token before the predicted one
        assert one.most["context"] == context
    assert found.positions == count
    assert found.kl == pytest.approx(sum(kls) / count, rel=1e-4)
    assert found.changed == changed / count
    assert found.loss_base == pytest.approx(losses[0] / count, rel=1e-5)
    assert found.loss_adapted == pytest.approx(losses[1] / count, rel=1e-5)
    assert found.kl > 0.01
    assert found.to_json()["overall"]["texts"] == len(SENTENCES)


def test_an_adapter_that_does_nothing_leaves_every_prediction(folder, tmp_path):
    model = lorakit.load_base(str(folder / "base"), dtype="float32").model
    lorakit.attach(model, lorakit.LoRA(rank=2, targets="mlp"), name="a").save(tmp_path / "fresh")
    base = BaseConfig(name=str(folder / "base"), dtype="float32")
    found = adapter_drift(tmp_path / "fresh", folder / "text.txt", base=base)
    assert (found.kl, found.changed) == (0, 0)
    assert found.loss_base == found.loss_adapted


@pytest.mark.parametrize("kind", [lorakit.PrefixEmbedding, lorakit.PrefixLayer])
def test_words_are_compared_after_virtual_tokens(folder, tmp_path, kind):
    base = BaseConfig(name=str(folder / "base"), dtype="float32")
    loaded = lorakit.load_base(base.name, dtype="float32")
    handle = lorakit.attach(loaded.model, kind(prefix_length=2, infix_length=1), name="a")
    randomise(handle)
    handle.save(tmp_path / "prefix")
    found = adapter_drift(tmp_path / "prefix", folder / "text.txt", base=base, batch_size=3)
    start = len(start_ids(loaded.tokenizer))
    for text, one in zip(SENTENCES, found.pieces, strict=True):
        ids = loaded.tokenizer(text).input_ids
        placed = handle.virtual_tokens.place(ids, keep=start, prompt=start)
        both = []
        for choice, row, first in ((None, ids, 0), ("a", placed, 3)):
            handle.activate(choice)
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([row])).logits[0, first:-1].double()
            both.append(torch.distributions.Categorical(logits=logits))
        kl = torch.distributions.kl_divergence(*both)
        torch.testing.assert_close(torch.tensor(one.kl).double(), kl, rtol=1e-3, atol=1e-6)
        handle.activate("a")
    assert found.kl > 1e-4


def test_virtual_tokens_take_of_the_context(folder, tmp_path):
    base = BaseConfig(name=str(folder / "base"), dtype="float32")
    model = lorakit.load_base(base.name, dtype="float32").model
    handle = lorakit.attach(model, lorakit.PrefixEmbedding(prefix_length=3), name="a")
    handle.save(tmp_path / "prefix")
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    found = adapter_drift(tmp_path / "prefix", tmp_path / "text.txt", base=base)
    room = model.config.max_position_embeddings - handle.virtual_tokens.total
    assert max(len(piece.kl) for piece in found.pieces) == room - 1


def test_long_texts_are_cut(folder):
    base = BaseConfig(name=str(folder / "base"), dtype="float32")
    found = adapter_drift(
        folder / "adapter", text=folder / "text.txt", base=base, max_length=8, limit=2
    )
    assert max(len(piece.kl) for piece in found.pieces) == 7
    assert len(found.pieces) > 2
    assert found.to_json()["overall"]["texts"] == 2


def test_every_piece_starts_as_a_text_does(folder, monkeypatch):
    base = lorakit.load_base(folder / "base", dtype="float32")
    text = SENTENCES[0] * 3
    bare = base.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(drift, "start_ids", lambda _: [1, 2])
    (pieces,) = drift._pieces(base, [text], 8)
    assert len(pieces) > 2
    assert all(piece[:2] == [1, 2] and len(piece) <= 8 for piece in pieces)
    assert [i for piece in pieces for i in piece[2:]] == bare


def test_texts_may_hold_what_only_python_takes_for_ends_of_lines(tmp_path):
    (tmp_path / "text.txt").write_bytes("a\u2028b\r\n \nc\x0cd\x85e\rf\n".encode())
    assert read_texts(tmp_path / "text.txt") == ["a\u2028b", "c\x0cd\x85e", "f"]


def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path):
    (tmp_path / "text.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "text.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n  \n", "has no text"),
        ("latin.txt", b"caf\xe9\n", r"latin\.txt:1: not UTF-8 .* save the file as UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n', "data file with columns"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_files_that_are_no_text(folder, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        adapter_drift(folder / "adapter", tmp_path / name)


@pytest.mark.parametrize("settings", [{"limit": 0}, {"batch_size": 0}, {"max_length": 1}])
def test_settings_that_cannot_work(folder, settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        adapter_drift(folder / "adapter", folder / "text.txt", **settings)


def test_a_model_that_writes_no_text(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base", "t5")
    model = lorakit.load_base(base, task="seq2seq-lm", dtype="float32").model
    lorakit.attach(model, lorakit.LoRA(rank=2), name="a").save(tmp_path / "a")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(BaseModelError, match="model that generates text"):
        adapter_drift(tmp_path / "a", tmp_path / "text.txt", base=BaseConfig(name=base))


def test_a_classifier_that_records_no_task(tmp_path):
    base = tiny_runs.save_base(tmp_path / "base")
    head = {"task": "sequence-classification", "num_labels": 3}
    model = lorakit.load_base(base, dtype="float32", **head).model
    lorakit.attach(model, lorakit.LoRA(rank=2, train_modules=("score",))).save(tmp_path / "a")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(BaseModelError, match="is a LlamaForSequenceClassification"):
        adapter_drift(tmp_path / "a", tmp_path / "text.txt", base=BaseConfig(name=base))
