"""A prompt gets the same text in every batch, also from models that read padding."""

from __future__ import annotations

import logging

import pytest
import tiny_models
import torch
import transformers
from batch_sensitive_models import READS_PADDING, longrope_model, spread
from random_adapters import randomise
from test_generate import new_ids
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.evaluation import prompt_batches
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.prompt_batches import batch_rule

TOKENIZER = tiny_tokenizer()


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, len(TOKENIZER), (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", READS_PADDING)
def test_a_model_that_reads_padding_gives_each_prompt_the_text_it_has_alone(name, dtype, caplog):
    config, notice = READS_PADDING[name]
    model, given, decoding = (
        spread(config).to(dtype),
        prompts(5, 12, 12),
        Decoding(max_new_tokens=6),
    )
    alone = [text for prompt in given for text in new_ids(model, TOKENIZER, [prompt], decoding)]
    assert not caplog.records
    assert new_ids(model, TOKENIZER, given, decoding) == alone
    assert new_ids(model, TOKENIZER, given, decoding) == alone
    assert [notice in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS])
def test_prompts_share_a_batch_where_padding_is_masked(arch, dtype):
    model = tiny_models.build(arch, vocab_size=len(TOKENIZER)).to(dtype)
    assert batch_rule(model).notice is None


def test_the_rule_does_not_depend_on_the_adapter():
    model = tiny_models.build("llama", vocab_size=len(TOKENIZER))
    handle = lorakit.attach(model, lorakit.LoRA(rank=2, alpha=4, targets="attention.qv"))
    with torch.no_grad():
        randomise(handle)
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    assert batch_rule(model).notice is None
    assert handle.active


def test_a_mixture_of_experts_and_autocast_have_larger_rounding():
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    mixture = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).bfloat16()
    assert batch_rule(mixture).notice is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        assert batch_rule(dense).notice is None


def test_the_trial_uses_tokens_and_lengths_that_the_model_has():
    config = transformers.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=40,
        tgt_vocab_size=len(TOKENIZER),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    )
    assert batch_rule(transformers.FSMTForConditionalGeneration(config).eval()).notice is None
    assert batch_rule(tiny_models.build("gpt2", n_positions=16)).notice is None


def test_a_trial_that_ran_out_of_memory_is_repeated(monkeypatch):
    model = tiny_models.build("llama", vocab_size=len(TOKENIZER))

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(prompt_batches, "_scores", fail)
        with pytest.raises(MemoryError):
            batch_rule(model)
    assert batch_rule(model).notice is None


def test_a_failed_trial_leaves_each_prompt_alone(monkeypatch):
    model = tiny_models.build("llama", vocab_size=len(TOKENIZER))
    monkeypatch.setattr(prompt_batches, "_scores", lambda *_: 1 / 0)
    rule = batch_rule(model)
    assert not rule.can_share(5, 5)
    assert "a trial batch failed (ZeroDivisionError: division by zero)" in rule.notice


def test_a_prompt_beyond_longropes_short_factors_changes_no_other_text(caplog):
    caplog.set_level(logging.WARNING)
    model = longrope_model()
    given, decoding = prompts(12, 20, 59, 90), Decoding(max_new_tokens=6)
    alone = [text for prompt in given for text in new_ids(model, TOKENIZER, [prompt], decoding)]
    assert new_ids(model, TOKENIZER, given, decoding) == alone
    assert not caplog.records
