from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from random_adapters import randomise
from tiny_tokenizer import tiny_sentencepiece, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import lorakit
from lorakit.errors import BaseModelError, ConfigurationError, DataError
from lorakit.evaluation import generate as generating
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate
from lorakit.evaluation.generation_settings import generation_config
from lorakit.evaluation.prompt_batches import batch_rule
from lorakit.evaluation.prompt_cache import PromptCache

PROMPTS = ["The river", "A man is playing a large flute, and", "Return", "Summarise the park pub"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_models.build("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


class Ids:
    """A tokenizer that decodes each token to one character, since the bytes of a random model may not be text."""

    def __init__(self, tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self.tokenizer = tokenizer

    def encode(self, text: str, **settings) -> list[int]:
        return self.tokenizer.encode(text, **settings)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        special = (self.eos_token_id, self.pad_token_id)
        return "".join(chr(i) for i in ids if i not in special)


def new_ids(model, tokenizer, *args, **settings) -> list[list[int]]:
    """Generate, and return token ids in place of texts."""
    return [[*map(ord, text)] for text in generate(model, Ids(tokenizer), *args, **settings)]


def greedy_by_hand(model, tokenizer, prompt: str, steps: int) -> list[int]:
    """Greedy decoding by definition: one prompt and one full forward pass at a time."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_the_definition_in_any_batch_and_in_input_order(
    model, tokenizer, batch_size: int
) -> None:
    expected = [greedy_by_hand(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    decoding = Decoding(max_new_tokens=12, batch_size=batch_size)
    assert new_ids(model, tokenizer, PROMPTS, decoding) == expected
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert generate(model, tokenizer, PROMPTS, decoding) == texts


@pytest.mark.parametrize("adds_eos", [False, True])
def test_token_ids_and_text_are_the_same_prompt(model, adds_eos) -> None:
    """Also where the tokenizer adds eos to a text: the answer follows the prompt."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    if adds_eos:
        end = [("<|im_end|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|im_end|>", special_tokens=end
        )
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    decoding = Decoding(max_new_tokens=5)
    assert generate(model, tokenizer, ids, decoding) == generate(
        model, tokenizer, PROMPTS, decoding
    )


def test_generation_stops_at_any_of_the_models_end_tokens(model, tokenizer) -> None:
    ids = greedy_by_hand(model, tokenizer, PROMPTS[0], 12)
    place = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    ends = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [ends, ids[place]]
        shorter = new_ids(model, tokenizer, PROMPTS, Decoding(max_new_tokens=12))[0]
    finally:
        model.generation_config.eos_token_id = ends
    assert (
        shorter == ids[:place]
    )  # without the end token, which the tokenizer does not call special


def test_generation_stops_at_the_tasks_stop_ids_and_when_interrupted(model, tokenizer) -> None:
    ids = greedy_by_hand(model, tokenizer, PROMPTS[0], 12)
    place = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    settings = Decoding(max_new_tokens=12)
    stopped = new_ids(model, tokenizer, PROMPTS[:1], settings, stop_ids=[ids[place]])
    assert stopped == [ids[:place]]
    checks = iter([False, False, True])
    stopped = new_ids(model, tokenizer, PROMPTS[:1], settings, interrupted=lambda: next(checks))
    assert stopped == [ids[:3]]


def test_texts_without_an_end_token_are_reported_as_cut(model, tokenizer) -> None:
    ids = greedy_by_hand(model, tokenizer, PROMPTS[0], 12)
    place = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    for most in (place, place + 1, 12):
        cut: list[int] = []
        settings = Decoding(max_new_tokens=most, batch_size=2)
        texts = new_ids(
            model, tokenizer, PROMPTS, settings, stop_ids=[ids[place]], on_cut=cut.append
        )
        assert sorted(cut) == [i for i, own in enumerate(texts) if len(own) == most]
        assert (0 in cut) == (most == place)


@pytest.mark.parametrize(
    ("kind", "continues", "text"),
    [("text", False, "    return"), ("ids", True, "    return"), ("ids", False, "   return")],
)
def test_a_text_that_continues_the_prompt_keeps_its_first_blank(
    monkeypatch, kind, continues, text
) -> None:
    """The decoder of Llama 2's tokenizer strips the blank at the start of a text."""
    tokenizer, prompt = tiny_sentencepiece(), "def f(x):\n"
    model = tiny_models.build("llama", vocab_size=len(tokenizer))
    new = [*tokenizer.encode("    return"), tokenizer.eos_token_id, tokenizer.encode("x")[-1]]

    def generated(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([new])], dim=1)

    monkeypatch.setattr(model, "generate", generated)
    prompts = [prompt if kind == "text" else tokenizer.encode(prompt)]
    short = Decoding(max_new_tokens=8)
    assert generate(model, tokenizer, prompts, short, is_continuation=continues) == [text]


def test_draws_follow_their_seed_and_leave_the_random_state(model, tokenizer) -> None:
    state = torch.get_rng_state()
    draws = [
        generate(model, tokenizer, PROMPTS, Decoding(max_new_tokens=8, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.get_rng_state())


def test_every_setting_reaches_the_generation(model, tokenizer) -> None:
    drawn = Decoding(max_new_tokens=7, temperature=0.6, top_p=0.8, top_k=5)
    config = generation_config(model, tokenizer, drawn, ())
    assert (config.max_new_tokens, config.do_sample, config.num_beams) == (7, True, 1)
    assert (config.temperature, config.top_p, config.top_k) == (0.6, 0.8, 5)
    searched = Decoding(max_new_tokens=7, beams=3, length_penalty=0.9)
    config = generation_config(model, tokenizer, searched, ())
    assert (config.do_sample, config.num_beams, config.length_penalty) == (False, 3, 0.9)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str
)
def test_draws_among_the_likeliest_token_are_greedy(model, tokenizer, settings) -> None:
    greedy = new_ids(model, tokenizer, PROMPTS, Decoding(max_new_tokens=6))
    drawn = Decoding(max_new_tokens=6, seed=3, **{"temperature": 1.0, **settings})
    assert new_ids(model, tokenizer, PROMPTS, drawn) == greedy


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"length_penalty": 4.0}, {"length_penalty": 4.0}),
        ({"length_penalty": 0.1}, {"length_penalty": 0.1}),
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(model, tokenizer, ours, theirs) -> None:
    found = new_ids(model, tokenizer, PROMPTS, Decoding(max_new_tokens=8, beams=4, **ours))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, **theirs}
        expected = model.generate(start, pad_token_id=tokenizer.pad_token_id, **options)
        assert ids == [i for i in expected[0, start.shape[1] :] if i != tokenizer.eos_token_id]


METHODS = {
    "llama": lorakit.PrefixLayer(prefix_length=2, infix_length=1),
    "gpt2": lorakit.PrefixEmbedding(prefix_length=2, infix_length=1),
    "qwen2": lorakit.LoRA(rank=2),
}


@pytest.mark.parametrize("arch", tiny_models.DECODERS)
def test_a_prompt_is_computed_once_for_all_its_beams(arch, tokenizer, monkeypatch) -> None:
    """With sliding windows, virtual tokens and padding: the texts of separate prompts."""
    model = tiny_models.build(arch, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if arch in METHODS:
        randomise(lorakit.attach(model, METHODS[arch]))
    search = Decoding(max_new_tokens=8, beams=4, length_penalty=0.9)
    batch_rule(model)  # computes prompts of its own
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = new_ids(model, tokenizer, PROMPTS, search)
    hook.remove()
    assert {rows for rows, tokens in shapes if tokens > 1} == {len(PROMPTS)}
    monkeypatch.setattr(generating, "computed_prompts", lambda *_: None)
    alone = [new_ids(model, tokenizer, [prompt], search) for prompt in PROMPTS]
    assert found == [text for [text] in alone]


def test_the_models_own_defaults_do_not_change_greedy(model, tokenizer) -> None:
    expected = generate(model, tokenizer, PROMPTS, Decoding(max_new_tokens=8))
    own = model.generation_config
    before = own.do_sample, own.repetition_penalty
    try:
        own.do_sample, own.repetition_penalty = True, 5.0
        assert generate(model, tokenizer, PROMPTS, Decoding(max_new_tokens=8)) == expected
    finally:
        own.do_sample, own.repetition_penalty = before


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rule", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
def test_the_model_bans_its_tokens_as_in_transformers(model, tokenizer, rule, beams) -> None:
    first, second, *_ = greedy_by_hand(model, tokenizer, PROMPTS[0], 12)
    start, own = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"], model.generation_config
    try:
        own.update(**{rule: [[first, second]] if rule == "bad_words_ids" else [first]})
        search = Decoding(max_new_tokens=6, beams=beams)
        [found] = new_ids(model, tokenizer, PROMPTS[:1], search)
        expected = model.generate(start, num_beams=beams, max_new_tokens=6, do_sample=False)
    finally:
        own.update(**{rule: None})
    assert found == [i for i in expected[0, start.shape[1] :] if i != tokenizer.eos_token_id]
    assert found[:2] != [first, second]


def log_likelihood(model, tokenizer, prompt: str, text: list[int]) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + text])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].log_softmax(-1)
    chosen = log_probabilities[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
    return float(chosen.sum())


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2),
        transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["a recurrent model", "a model without a cache"],
)
def test_beams_of_a_model_whose_cache_cannot_be_repeated(tokenizer, config) -> None:
    config.vocab_size = len(tokenizer)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    start = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for beams, options in ((3, {}), (1, {"cache": PromptCache()})):
        found = new_ids(
            model,
            tokenizer,
            [start[0].tolist()],
            Decoding(max_new_tokens=4, beams=beams),
            **options,
        )
        expected = model.generate(start, num_beams=beams, max_new_tokens=4, **ends)
        special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert found == [[i for i in expected[0, start.shape[1] :].tolist() if i not in special]]


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`")
@pytest.mark.parametrize(("beams", "size"), [(1, 1), (4, 1), (4, 2)])
def test_an_ngram_of_the_prompt_may_be_copied_once(model, tokenizer, beams, size) -> None:
    """transformers does not see the ids of prompts that are given as embeddings, so it bans repetitions alone."""
    search = Decoding(max_new_tokens=12, beams=beams, no_repeat_ngram=size)
    found = new_ids(model, tokenizer, PROMPTS, search)
    assert found != new_ids(model, tokenizer, PROMPTS, Decoding(max_new_tokens=12, beams=beams))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(
            inputs_embeds=model.get_input_embeddings()(start),
            attention_mask=torch.ones_like(start),
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=12,
            num_beams=beams,
            no_repeat_ngram_size=size,
        )
        assert ids == [i for i in expected[0] if i != tokenizer.eos_token_id]


def test_beams_find_a_likelier_text(model, tokenizer) -> None:
    greedy, beams = (
        new_ids(model, tokenizer, PROMPTS, Decoding(max_new_tokens=4, beams=beams))
        for beams in (1, 8)
    )
    assert greedy != beams
    for prompt, one, other in zip(PROMPTS, greedy, beams, strict=True):
        assert len(one) == len(other) == 4
        likelihoods = [log_likelihood(model, tokenizer, prompt, ids) for ids in (one, other)]
        assert likelihoods[1] >= likelihoods[0] - 1e-4


def test_the_training_flag_comes_back_and_progress_is_told(model, tokenizer) -> None:
    done: list[int] = []
    model.train()
    generate(
        model, tokenizer, PROMPTS, Decoding(max_new_tokens=1, batch_size=3), progress=done.append
    )
    assert model.training
    assert done == [3, 4]
    model.eval()


def test_no_prompts_give_no_texts(model, tokenizer) -> None:
    assert generate(model, tokenizer, []) == []


def test_prompts_that_cannot_be_continued_say_why(model, tokenizer) -> None:
    with pytest.raises(DataError, match=r"one text, 'the'; a list of texts was expected"):
        generate(model, tokenizer, "the")
    with pytest.raises(DataError, match="Prompt 2 is empty"):
        generate(model, tokenizer, [[5], []], Decoding(max_new_tokens=5))
    with pytest.raises(DataError, match=r"Prompt 1 has 60 tokens.*context of 64"):
        generate(model, tokenizer, [[5] * 60], Decoding(max_new_tokens=5))


def test_a_model_that_labels_text_is_refused(tokenizer) -> None:
    model = tiny_models.build("llama", "sequence-classification", vocab_size=len(tokenizer))
    with pytest.raises(BaseModelError, match=r"LlamaForSequenceClassification.*lorakit evaluate"):
        generate(model, tokenizer, ["The river"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"beams": 0}, "beams"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"top_p": 0.9}, "need sampling, but temperature is 0"),
        ({"temperature": 1.0, "beams": 4}, "exclude each other"),
    ],
)
def test_settings_that_cannot_work_name_themselves(settings, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Decoding(**settings)
