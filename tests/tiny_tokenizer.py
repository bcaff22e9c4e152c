"""Small tokenizers that need no download and encode any text.

Byte-level BPE with a few merges, so words have several tokens and boundaries matter. Ids are the same
in every call. A model for it needs a vocabulary of `len(tiny_tokenizer())`.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, TURN, EOS = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
CLS, SEP = "[CLS]", "[SEP]"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Nemotron 3's: the generation prompt opens a thought, unless `enable_thinking` is false.
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n' + m.reasoning_content + '</think>' if m.reasoning_content else '<think></think>' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}"
    "{{ '\n' if enable_thinking is not defined or enable_thinking else '</think>' }}{% endif %}"
)

SENTENCES = (
    "The river pub near the park serves cheap English food.",
    "A man is playing a large flute, and a plane is taking off.",
    "Return the index where to insert the item in the list.",
    "Summarise the conversation: Amanda baked cookies and will bring Jerry some tomorrow.",
)


def tiny_tokenizer(
    *, adds_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Return a causal language model's tokenizer with pad, bos and eos tokens and a ChatML template."""
    backend = _byte_level([PAD, BOS, TURN, EOS])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, backend.token_to_id(BOS))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer with token types: [CLS] a [SEP] b [SEP]."""
    backend = _byte_level([PAD, CLS, SEP])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (CLS, SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        cls_token=CLS,
        sep_token=SEP,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a blank before a text, and strips one from it, as Llama 2's does."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "\u2581", *map(chr, range(33, 127)), "\u2581" * 2]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "\u2581")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    replaced, stripped = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [replaced, decoders.ByteFallback(), decoders.Fuse(), stripped]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _byte_level(special_tokens: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend
