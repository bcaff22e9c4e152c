"""A conversation computes only its new tokens, and answers as if it computed all of them."""

from __future__ import annotations

import pytest
import tiny_models
from random_adapters import randomise
from tiny_runs import save_base
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

import lorakit
from lorakit.compute.adapter_file import AdapterFile
from lorakit.evaluation.conversation import Conversation
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate
from lorakit.evaluation.prompt_cache import PromptCache

NEW = 6
FORGETFUL = CHAT_TEMPLATE.replace(
    "message['content']",
    "('' if message['role'] == 'assistant' and not loop.last else message['content'])",
)
"""A template that drops the assistant's earlier turns."""


@pytest.fixture
def base(tmp_path):
    save_base(tmp_path / "base", max_position_embeddings=512)
    for seed, method in enumerate((lorakit.LoRA(rank=4), lorakit.PrefixLayer(infix_length=2))):
        handle = lorakit.attach(lorakit.load_base(tmp_path / "base", dtype="float32").model, method)
        randomise(handle, seed=seed)
        handle.save(tmp_path / type(method).__name__)
    base = lorakit.load_base(tmp_path / "base", dtype="float32")
    base.model.generation_config.eos_token_id = None  # answers of one length
    return base


@pytest.fixture
def computed(base) -> list[int]:
    """Numbers of tokens that the base computed, one per forward pass."""
    lengths: list[int] = []

    def count(layer, args) -> None:
        lengths.append(args[0].shape[1])

    base.model.get_input_embeddings().register_forward_pre_hook(count)
    return lengths


def ids_of(conversation: Conversation, *more: dict) -> list[int]:
    return conversation.template.ids([*conversation.messages, *more], answer=True)


def reply(conversation: Conversation, message: str, **options) -> list[int]:
    """Return the ids of a prompt whose answer must be that of a generation without a cache."""
    ids = ids_of(conversation, {"role": "user", "content": message})
    (expected,) = generate(
        conversation.base.model, conversation.template.tokenizer, [ids], conversation.decoding
    )
    answer = conversation.reply(message, **options)
    assert expected.startswith(answer) if options else answer == expected
    return ids


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, FORGETFUL])
def test_three_turns_answer_as_without_a_cache(base, computed, template: str) -> None:
    base.tokenizer.chat_template = template
    conversation = Conversation(base, decoding=Decoding(max_new_tokens=NEW))
    first = reply(conversation, "The river")
    for message in ("pub", "park"):
        computed.clear()
        ids = reply(conversation, message)
        whole, started = computed[0], computed[NEW]  # without the cache, and with it
        assert whole == len(ids)
        assert started < whole - len(first) // 2


@pytest.mark.slow
def test_another_adapter_never_reads_the_cache(base, computed, tmp_path) -> None:
    conversation = Conversation(base, decoding=Decoding(max_new_tokens=NEW))
    reply(conversation, "The river")
    conversation.load(AdapterFile.read(tmp_path / "LoRA"))
    for name in ("LoRA", None, "LoRA"):
        conversation.choose(name)
        computed.clear()
        ids = reply(conversation, "pub")
        assert computed[NEW] == len(ids)
    computed.clear()
    ids = reply(conversation, "pub")
    assert computed[NEW] < len(ids)
    conversation.load(AdapterFile.read(tmp_path / "PrefixLayer"))
    for _ in range(2):  # with virtual tokens before and after the prompt
        reply(conversation, "pub")


def test_a_reset_and_an_interrupted_answer(base, computed) -> None:
    conversation = Conversation(base, decoding=Decoding(max_new_tokens=NEW))
    reply(conversation, "The river")
    checks = iter([False, False, True])
    reply(conversation, "pub", interrupted=lambda: next(checks))
    reply(conversation, "park")
    conversation.reset()
    reply(conversation, "The park")
    reply(conversation, "food")


def test_a_forward_pass_that_fails_leaves_no_cache(base, computed) -> None:
    conversation = Conversation(base, decoding=Decoding(max_new_tokens=NEW))
    reply(conversation, "The river")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = base.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        conversation.reply("pub")  # the first layer has cached its tokens, the second has not
    hook.remove()
    computed.clear()
    ids = reply(conversation, "pub")
    assert computed[NEW] == len(ids)


@pytest.mark.parametrize("arch", tiny_models.DECODERS)
def test_every_architecture_answers_as_without_a_cache(arch: str) -> None:
    """Those with sliding windows too, whose layers cannot forget their last tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_models.build(arch, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    cache, settings = PromptCache(), Decoding(max_new_tokens=NEW)
    ids = tokenizer("The river pub")["input_ids"]
    for more in ("park", "food"):
        expected = generate(model, tokenizer, [ids], settings)
        assert generate(model, tokenizer, [ids], settings, cache=cache) == expected
        ids = [*ids, *tokenizer(more)["input_ids"]]
