from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from lorakit.errors import DataError
from lorakit.serving.http.prompts import encode_chat
from lorakit.serving.http.schemas import Message
from lorakit.tasks import BadRow, Chat, Completion, TooLong, chat, chat_template
from lorakit.tasks.chat_template import ChatTemplate

# The same conversation format with {% generation %} tags: end of turn inside or outside the tag.
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED_WITHOUT_END = TAGGED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Drops the thoughts of earlier answers when another turn follows, as Qwen 3 does.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the river pub?"},
    {"role": "assistant", "content": "Near the park."},
    {"role": "tool", "content": "rating: 5"},
    {"role": "assistant", "content": "It is cheap."},
]


def encode(messages, template=CHAT_TEMPLATE, *, tools=None, system=None, **settings):
    tokenizer = tiny_tokenizer(chat_template=template)
    task = Chat(tokenizer, **({"max_length": 100_000} | settings))
    fields = {"messages": messages, "tools": tools, "system": system}
    return task.encode(fields), tokenizer


def target_text(example, tokenizer):
    """Decode each run of consecutive target tokens."""
    runs, previous = [], False
    for token, target in zip(example.input_ids, example.loss_mask, strict=True):
        if target:
            runs = [*runs[:-1], runs[-1] + [token]] if previous else [*runs, [token]]
        previous = target
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAGGED, TAGGED_WITHOUT_END])
def test_loss_is_on_the_assistants_turns_and_their_ends_alone(template):
    example, tokenizer = encode(TURNS, template)
    assert target_text(example, tokenizer) == ["Near the park.<|im_end|>", "It is cheap.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered.rstrip("\n")
    assert example.completion == "It is cheap."
    assert example.prompt_ids == ChatTemplate(tokenizer).ids(TURNS[:-1], answer=True)
    assert example.prompt == tokenizer.decode(example.prompt_ids)


CONTENT = st.text(min_size=1).filter(lambda t: t.strip() and t.isprintable() and "<|" not in t)
EXCHANGES = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


@pytest.mark.slow
@given(exchanges=EXCHANGES)
def test_prefix_rendering_and_generation_tags_agree(exchanges):
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    by_prefix, tokenizer = encode(messages)
    by_tag, _ = encode(messages, TAGGED)
    assert by_prefix == by_tag
    answers = [answer + "<|im_end|>" for _, answer in exchanges]
    assert target_text(by_prefix, tokenizer) == answers


WITH_SPECIAL = st.lists(
    st.sampled_from(["a", " ", "\n", "é", "<|im_end|>", "<|im_start|>", "<|im"])
)


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITHOUT_END, WITHOUT_END + " ", REWRITING])
@given(contents=st.lists(WITH_SPECIAL.map("".join), min_size=2, max_size=6))
def test_tokens_reused_from_the_whole_conversation_are_those_of_its_parts(template, contents):
    tokenizer = tiny_tokenizer(chat_template=template)
    roles = ("user", "assistant") * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    quick, plain = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
    plain._special_tokens = lambda *_: []  # tokenise each part from its start

    def turns(by):
        try:
            return by.assistant_turns(messages, None)
        except BadRow as error:
            return str(error)

    assert turns(quick) == turns(plain)


def test_the_cost_of_tokenising_grows_with_the_length_of_a_conversation(monkeypatch):
    tokenised = []

    def counting(tokenizer, text):
        tokenised.append(len(text))
        return tokenizer.encode(text, add_special_tokens=False)

    for module in (chat, chat_template):
        monkeypatch.setattr(module, "encode_text", counting)
    exchange = [{"role": "user", "content": "a " * 50}, {"role": "assistant", "content": "b " * 50}]
    _, tokenizer = encode(exchange * 20)
    length = len(ChatTemplate(tokenizer).text(exchange * 20))
    assert length <= sum(tokenised) < 3 * length


def test_the_prompt_has_the_header_of_the_turn_even_if_it_is_tagged_as_generated():
    header = "{{ '<|im_start|>' + m['role'] + '\n' }}"
    template = TAGGED.replace(header, "{% if m['role'] != 'assistant' %}" + header + "{% endif %}")
    template = template.replace("{% generation %}", "{% generation %}" + header)
    example, tokenizer = encode(TURNS, template)
    assert example.prompt_ids == ChatTemplate(tokenizer).ids(TURNS[:-1], answer=True)
    assert target_text(example, tokenizer)[-1] == "<|im_start|>assistant\nIt is cheap.<|im_end|>"


def test_eos_follows_the_last_turn_where_the_template_writes_no_end():
    example, tokenizer = encode(TURNS[1:3], WITHOUT_END)
    assert target_text(example, tokenizer) == [" Near the park.\n<|im_end|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAGGED])
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_turns_that_the_data_excludes_have_no_loss(template, key):
    first, last = TURNS[2] | key, TURNS[4] | {"weight": 1, "train": True}
    example, tokenizer = encode([TURNS[1], first, TURNS[3], last], template)
    assert target_text(example, tokenizer) == ["It is cheap.<|im_end|>"]
    assert example.input_ids == encode([TURNS[1], TURNS[2], *TURNS[3:]], template)[0].input_ids
    # The conversation ends with the last turn that has a loss.
    ends, _ = encode([TURNS[1], TURNS[2], TURNS[3], TURNS[4] | key], template)
    assert ends == encode([TURNS[1], TURNS[2]], template)[0]


def test_a_function_call_of_sharegpt_may_be_excluded():
    call = {"from": "function_call", "value": '{"name": "search", "arguments": {}}', "weight": 0}
    example, tokenizer = encode([*sharegpt([TURNS[1]]), call, *TURNS[3:]], TOOL_TEMPLATE)
    assert target_text(example, tokenizer) == ["It is cheap.<|im_end|>"]


def test_what_follows_the_last_assistant_turn_is_left_out():
    example, _ = encode([*TURNS, {"role": "user", "content": "Thanks!"}])
    assert example == encode(TURNS)[0]


def test_a_template_that_rewrites_earlier_turns_is_rejected():
    single, tokenizer = encode(TURNS[:3], REWRITING)
    assert target_text(single, tokenizer) == ["<think></think>Near the park.<|im_end|>"]
    with pytest.raises(
        BadRow, match=r"assistant turn 1 differently .* weight 0 .*\{% generation %\}"
    ):
        encode(TURNS, REWRITING)
    example, tokenizer = encode([*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]], REWRITING)
    assert target_text(example, tokenizer) == ["<think></think>It is cheap.<|im_end|>"]


END = "{{ '<|im_end|>\n' }}"
OPENING = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
HEADER = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
# Phi writes eos after the last turn besides, gpt-oss in place of the end-of-turn token.
EOS_BESIDES = OPENING + END + HEADER + "{% else %}{{ '<|bos|>' }}{% endif %}"
EOS_INSTEAD = (
    OPENING
    + "{% if loop.last and m.role == 'assistant' %}{{ '<|bos|>' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
    + HEADER
    + "{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end"), [(EOS_BESIDES, "<|im_end|>\n<|bos|>"), (EOS_INSTEAD, "<|bos|>")]
)
def test_the_last_turn_may_end_differently(template, end):
    example, tokenizer = encode(TURNS, template)
    assert target_text(example, tokenizer) == ["Near the park.<|im_end|>", f"It is cheap.{end}"]
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered
    # Without an end-of-turn token the next turn's opening is no end.
    with pytest.raises(BadRow, match="cannot be split into turns"):
        encode(TURNS, EOS_INSTEAD.replace("{{ '<|im_end|>' }}", ""))


def test_a_greeting_may_be_excluded():
    greeting, *turns = [TURNS[2] | {"weight": 0}, *TURNS[1:3]]
    example, tokenizer = encode([greeting, *turns])
    assert target_text(example, tokenizer) == ["Near the park.<|im_end|>"]
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>assistant\nNear the park.")


@pytest.mark.parametrize(
    "template",
    [
        WITHOUT_END.replace("'assistant:'", "'assistant: '"),  # " p" is one token
        TAGGED.replace("assistant\n' }}{% endif", "assistant\n ' }}{% endif"),
    ],
    ids=["without tags", "with tags"],
)
def test_a_boundary_inside_a_token_is_rejected(template):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "pub"}]
    with pytest.raises(
        BadRow, match=r"cannot be split .* turn 1 .*\. Remove white space at the st"
    ):
        encode(turns, template)


@pytest.mark.parametrize("template", [TAGGED, CHAT_TEMPLATE])
def test_the_end_of_a_turn_is_known_wherever_generation_starts(template):
    # As templates of thinking models, whose generation prompt opens a thought.
    template = template.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert Chat.stop_ids(tiny_tokenizer(chat_template=template)) == [end]


def test_truncation_keeps_the_last_turn():
    whole, tokenizer = encode(TURNS)
    example, _ = encode(TURNS, max_length=25, truncate=True)
    assert len(example) == 25
    assert example.input_ids == whole.input_ids[-25:]
    assert example.loss_mask == whole.loss_mask[-25:]
    assert target_text(example, tokenizer)[-1] == "It is cheap.<|im_end|>"
    with pytest.raises(TooLong):
        encode(TURNS, max_length=25)


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}" + CHAT_TEMPLATE
    example, tokenizer = encode(TURNS[1:3], template, tools=[{"name": "search"}])
    assert tokenizer.decode(example.input_ids).startswith("search\n<|im_start|>user")


def test_tool_calls_may_stand_in_place_of_content():
    template = CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['tool_calls'][0]['name'] if message.tool_calls else message['content'])",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    example, tokenizer = encode([TURNS[1], call], template)
    assert target_text(example, tokenizer) == ["search<|im_end|>"]


# Writes tool calls or the content, as templates of Llama 3 and Mistral do.
CALLS_ONLY = CHAT_TEMPLATE.replace(
    "message['content']",
    "(message.tool_calls | tojson if message.tool_calls is defined else message['content'])",
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CALLS_ONLY])
@pytest.mark.parametrize("calls", [None, []])
def test_null_entries_of_parquet_rows_and_empty_lists_of_calls_are_ignored(template, calls):
    messages = [{**message, "tool_calls": calls, "name": None} for message in TURNS]
    assert encode(messages, template)[0] == encode(TURNS, template)[0]


def sharegpt(messages):
    senders = {"user": "human", "assistant": "gpt"}
    return [
        {"from": senders.get(m["role"], m["role"]), "value": m["content"], "weight": None}
        for m in messages
    ]


def test_messages_may_be_json_text():
    assert encode(json.dumps(TURNS))[0] == encode(TURNS)[0]
    for text in ("Hi", "{}", "[" * 100_000):
        with pytest.raises(BadRow, match=r"expected a list of \{role, content\}, or its JSON text"):
            encode(text)


def test_sharegpt_messages_are_read():
    assert encode(sharegpt(TURNS))[0] == encode(TURNS)[0]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace(" + ", " ~ ")])
def test_contents_as_lists_of_parts_are_read_as_text(template):
    # With ~ a template would write the list as Python prints it, without an error.
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"][:3]}, {"text": m["content"][3:]}]}
        for m in TURNS
    ]
    assert encode(parts, template)[0] == encode(TURNS, template)[0]


def test_alpacas_rows_become_a_question_and_an_answer():
    task = Chat(tiny_tokenizer(), max_length=1000)
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (fields,) = task.rows(row)
    expected = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert task.encode(fields) == encode(expected)[0]


def test_messages_as_prompt_and_completion_are_one_conversation():
    """Those of TRL; the loss includes the completion only."""
    turns = [
        {"role": role, "content": f"text {i}"} for i, role in enumerate(("user", "assistant") * 2)
    ]
    task = Chat(tiny_tokenizer(), max_length=1000)
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert Chat.reads(row, [row])
    assert not Completion.reads(row, [row])
    (fields,) = task.rows(row)
    turns[1] = {**turns[1], "weight": 0}
    assert task.encode(fields) == encode(turns)[0]
    texts = {"prompt": "a", "completion": "b"}
    assert Completion.reads(texts, [texts])
    assert not Chat.reads(texts, [texts])
    (fields,) = task.rows(texts)  # if the configuration says chat
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert task.encode(fields) == encode(pair)[0]


CALL = {"role": "assistant", "tool_calls": [{"name": "search"}]}
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}" + CHAT_TEMPLATE.replace(
    "message['content']",
    "message['content'] + (message.tool_calls[0].function.arguments | tojson if message.tool_calls else '')",
)


def calling(arguments):
    function = {"name": "search", "arguments": arguments}
    return {**CALL, "tool_calls": [{"type": "function", "function": function}]}


def test_arguments_as_json_text_are_not_encoded_twice():
    example, tokenizer = encode([TURNS[1], calling('{"city": "Rome"}')], TOOL_TEMPLATE)
    assert target_text(example, tokenizer) == ['{"city": "Rome"}<|im_end|>']


@pytest.mark.parametrize(
    ("answer", "template", "reference"),
    [
        (calling({"city": "Rome"}), TOOL_TEMPLATE, '{"city": "Rome"}'),
        (
            calling({"city": "Rome"}) | {"content": "I search. "},
            TOOL_TEMPLATE,
            'I search. {"city": "Rome"}',
        ),
        (TURNS[2], REWRITING, "<think></think>Near the park."),
        (TURNS[2], TAGGED, "Near the park."),
        (TURNS[2], WITHOUT_END, "Near the park."),
    ],
)
def test_the_reference_is_what_a_perfect_model_generates(answer, template, reference):
    example, tokenizer = encode([TURNS[1], answer], template)
    assert example.completion == reference
    generated = example.input_ids[example.prompt_length :]
    output = Chat.answer(tokenizer.decode(generated, skip_special_tokens=True))
    assert Chat.score([output], [[example]])["rouge_l"] == 100


def test_a_reference_keeps_special_tokens_of_the_content():
    example, _ = encode([TURNS[1], {"role": "assistant", "content": "b<|im_end|>c"}])
    assert example.completion == "b<|im_end|>c"  # `lorakit data` warns of them


@pytest.mark.parametrize("sender", ["observation", "tool", "function_response"])
def test_function_calls_of_sharegpt_are_tool_calls(sender):
    call = {"name": "search", "arguments": {"city": "Rome"}}
    result, answer = {"role": "tool", "content": "5"}, TURNS[4]
    shared = [*sharegpt([TURNS[1]]), {"from": "function_call", "value": json.dumps(call)}]
    shared += [{"from": sender, "value": "5"}, *sharegpt([answer])]
    example, tokenizer = encode(shared, TOOL_TEMPLATE)
    assert target_text(example, tokenizer)[0] == '{"city": "Rome"}<|im_end|>'
    messages = [TURNS[1], calling(call["arguments"]), result, answer]
    assert example == encode(messages, TOOL_TEMPLATE)[0]
    shared[1]["value"] = json.dumps([call])
    assert encode(shared, TOOL_TEMPLATE)[0] == example


def test_a_system_text_beside_the_messages_is_their_first_turn():
    assert encode(sharegpt(TURNS[1:]), system="Be brief.")[0] == encode(TURNS)[0]
    assert encode(TURNS, system="Be brief.")[0] == encode(TURNS)[0]
    assert encode(TURNS[1:], system="")[0] == encode(TURNS[1:])[0]
    with pytest.raises(BadRow, match="'system' is set, and the messages start with another system"):
        encode(TURNS, system="Be long.")
    with pytest.raises(BadRow, match="'system' is a list"):
        encode(TURNS[1:], system=["Be brief."])


@pytest.mark.parametrize("task", [Chat, Completion])
def test_a_blank_input_of_alpacas_rows_is_none(task):
    row = {"instruction": "Add.", "output": "3"}
    reader = task(tiny_tokenizer(), max_length=1000)
    (expected,) = reader.rows(row)
    for blank in ("", " ", "\n"):
        (fields,) = reader.rows({**row, "input": blank})
        assert reader.encode(fields) == reader.encode(expected)


def test_the_history_of_alpacas_rows_comes_before_the_question():
    task = Chat(tiny_tokenizer(), max_length=1000)
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be brief."}
    (fields,) = task.rows(row)
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("Be brief.", "a", "b", "c", "d")
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    assert task.encode(fields) == encode(messages)[0]
    for history in ("a", [["a"]], [["a", 1]]):
        with pytest.raises(BadRow, match="'history' is not a list of"):
            list(task.rows({**row, "history": history}))


def test_thoughts_that_the_template_writes_are_targets():
    template = CHAT_TEMPLATE.replace(
        "message['content']", "message.get('reasoning_content', '') + message['content']"
    )
    thinking = TURNS[2] | {"reasoning_content": "A park! "}
    example, tokenizer = encode([TURNS[1], thinking], template)
    assert target_text(example, tokenizer) == ["A park! Near the park.<|im_end|>"]
    # Blank thoughts are no loss. A mode of the template is no key of a message.
    blank, mode = TURNS[2] | {"reasoning": "\n"}, "{% if enable_thinking %}{% endif %}"
    assert encode([TURNS[1], blank])[0] == encode(TURNS[1:3])[0]
    with pytest.raises(BadRow, match="does not write reasoning_content"):
        encode([TURNS[1], thinking], mode + CHAT_TEMPLATE)


THOUGHTS_OF_CALLS = "(message.reasoning_content or '' if message.tool_calls else '') + "


@pytest.mark.parametrize(
    ("written", "answer", "dropped"),
    [
        (  # as Gemma 4
            THOUGHTS_OF_CALLS + "message['content']",
            {"content": "4", "reasoning_content": "Two and two."},
            "Two and two.",
        ),
        (  # as the first template of DeepSeek-R1-Distill
            "message['content'].split('</think>')[-1]",
            {"content": "<think>\nTwo and two.\n</think>\n\n4"},
            "Two and two.",
        ),
        # as SmolVLM, which reads contents as parts only
        ("(message['content'][0].text or '')", {"content": "4"}, "4"),
    ],
)
def test_an_answer_that_the_template_does_not_write_whole_is_rejected(written, answer, dropped):
    template = CHAT_TEMPLATE.replace("message['content']", written)
    with pytest.raises(BadRow, match=f"has '{dropped}' in assistant turn 1, but .* leaves this te"):
        encode([USER, {"role": "assistant"} | answer], template)


def test_thoughts_that_the_template_leaves_out_of_earlier_turns_are_rejected():
    written = "(m['content'] if loop.last else m['content'].split('</think>')[-1])"
    template = TAGGED.replace("m['content']", written)  # as LFM2.5
    first, last = ({"role": "assistant", "content": f"<think>{t}</think>{t}."} for t in "ab")
    with pytest.raises(BadRow, match="has 'a' in assistant turn 1"):
        encode([USER, first, USER, last], template)
    example, tokenizer = encode([USER, first | {"weight": 0}, USER, last], template)
    assert target_text(example, tokenizer) == ["<think>b</think>b.<|im_end|>"]


def test_a_template_may_drop_old_thoughts_beside_a_call():
    """As Qwen 3, which writes the thoughts of the last turn only."""
    written = (
        "message['content'].split('</think>')[-1] + (message.tool_calls | default('') | string)"
    )
    template = CHAT_TEMPLATE.replace("message['content']", written)
    call = CALL | {"content": "<think>I must search.</think>", "weight": 0}
    example, tokenizer = encode([USER, call, TURNS[2]], template)
    assert target_text(example, tokenizer) == ["Near the park.<|im_end|>"]


def test_a_template_may_write_thoughts_once_and_with_other_white_space():
    written = "(message.reasoning_content or '').strip() + '</think>' + message.content.strip()"
    template = CHAT_TEMPLATE.replace("message['content']", written)
    thoughts = dict.fromkeys(("reasoning_content", "reasoning"), "\nTwo\n")
    answer = {"role": "assistant", "content": " 4 < 5\n"} | thoughts
    example, tokenizer = encode([USER, answer], template)
    assert target_text(example, tokenizer) == ["Two</think>4 < 5<|im_end|>"]


def test_tools_may_be_json_text():
    tools = [{"name": "search"}]
    text, tokenizer = encode(TURNS, TOOL_TEMPLATE, tools=json.dumps(tools))
    assert text == encode(TURNS, TOOL_TEMPLATE, tools=tools)[0]
    assert tokenizer.decode(text.input_ids).startswith('[{"name": "search"}]')


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"name": "search"}], "the tokenizer's chat template does not write tools"),
        ("search", "'tools' is text but not JSON"),
        ({"name": "search"}, "'tools' is an object, expected a list of JSON schemas"),
    ],
)
def test_tools_that_the_model_would_not_see_are_rejected(tools, message):
    with pytest.raises(BadRow, match=message):
        encode(TURNS, tools=tools)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "'messages' is missing"),
        ([], "'messages' is empty"),
        ("hi", "'messages' is text, expected a list"),
        (["hi"], "has text as message 1"),
        ([USER], "has no assistant turn"),
        ([TURNS[2]], "has no message before the assistant's turn"),
        ([TURNS[2], USER, TURNS[2]], "starts with an assistant turn; set its weight to 0"),
        ([USER, {"role": "asistant", "content": "y"}], "role 'asistant' .* mean 'assistant'"),
        ([USER, {"speaker": "gpt", "text": "y"}], r"'role' \(message 2 has: speaker, text\)"),
        ([USER, {"from": "gtp", "value": "y"}], "sender 'gtp' in message 2; .* mean 'gpt'"),
        ([USER, {"from": ["gpt"], "value": "y"}], r"unknown sender \['gpt'\] in message 2"),
        ([USER, {"from": "function_call", "value": "search"}], "message 2 that is not JSON of"),
        ([USER, {"from": "function_call", "value": "[]"}], "message 2 that is not JSON of"),
        ([USER, {"from": "function_call"}], "message 2 that is not JSON of"),
        ([USER, {"from": "gpt"}], r"no 'content' in message 2 \(assistant\)"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TURNS[2]],
            "a part of type 'image' in message 1; .* Remove the part",
        ),
        ([USER, CALL | {"tool_calls": "search"}], "has text as 'tool_calls' of message 2"),
        ([USER, calling("Paris")], "message 2 whose 'arguments' is not JSON"),
        ([USER, calling("[1]")], "whose 'arguments' is a list as JSON; write an object"),
        ([USER, CALL], "does not write tool_calls, so the model would not see them"),
        ([USER, TURNS[2] | {"reasoning_content": "t"}], "has reasoning_content, but .* not write"),
        ([USER, TURNS[2] | {"thinking": "t"}], "has thinking, but .* model trained with thoughts"),
        (
            [USER, TURNS[2] | {"function_call": {"name": "f"}}],
            "message 2, .* write it as tool_calls",
        ),
        ([USER, {"role": "assistant"}], r"no 'content' in message 2 \(assistant\)"),
        ([USER, {"role": "assistant", "content": "  "}], r"empty assistant turn \(message 2\)"),
        ([USER, {"role": "assistant", "content": 7}], r"a number \(7\) as 'content' of message 2"),
        ([USER, {"role": "assistant", "content": "\udc80"}], "not UTF-8"),
        (
            [USER, TURNS[2] | {"reasoning": ["t"]}],
            "has a list as 'reasoning' of message 2, expected text",
        ),
        ([USER, TURNS[2] | {"weight": 0.5}], "has 0.5 as 'weight' of message 2; write 1 or true"),
        ([USER, TURNS[2] | {"train": "no"}], "has 'no' as 'train' of message 2; write 1 or true"),
        ([USER, TURNS[2] | {"weight": 0}], "has weight 0 or train false in every assistant turn"),
    ],
)
def test_bad_conversations_are_named(messages, message):
    with pytest.raises(BadRow, match=message):
        encode(messages)


def test_text_beside_the_content_must_be_unicode_too():
    messages = [USER, {"role": "assistant", "content": "a", "thought": "\ud800"}]
    with pytest.raises(BadRow, match="'messages' contains half of a surrogate pair"):
        encode(messages, CHAT_TEMPLATE + "{{ messages[1].thought }}")


def test_a_rejection_by_the_template_is_reported():
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no question') }}{% endif %}"
    with pytest.raises(BadRow, match="rejected by the chat template: no question"):
        encode(TURNS[3:], template + CHAT_TEMPLATE)


FOR = "{% for message in messages %}"
# Qwen 2.5's loop writes these roles only, and its own system text without a system turn.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE.replace(
        FOR, FOR[:-3] + " if message.role in ('system', 'user', 'assistant') %}"
    )
)
DROPPING = CHAT_TEMPLATE.replace(FOR, FOR[:-3] + " if message.role in ('user', 'assistant') %}")
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + DROPPING
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_SYSTEM, DROPPING, REFUSING])
@pytest.mark.parametrize("role", ["system", "developer", "column"])
def test_training_and_the_server_see_the_same_system_text(template, role):
    is_column = role == "column"
    turns = [] if is_column else [{"role": role, "content": "Be brief."}]
    example, tokenizer = encode(
        [*turns, *TURNS[1:3]], template, system="Be brief." if is_column else None
    )
    turns = [Message(**m) for m in (turns or TURNS[:1]) + TURNS[1:2]]
    assert example.prompt_ids == encode_chat(tokenizer, turns, 1000)[0]
    has_role = template in (CHAT_TEMPLATE, DEFAULT_SYSTEM)
    start = "system\nBe brief.<|im_end|>\n<|im_start|>user\n" if has_role else "user\nBe brief.\n\n"
    assert example.prompt.startswith(f"<|im_start|>{start}Where is the river pub?<|im_end|>")
    assert target_text(example, tokenizer) == ["Near the park.<|im_end|>"]


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, DROPPING])
def test_turns_that_the_template_leaves_out_are_rejected(template):
    with pytest.raises(BadRow, match=r"has a 'tool' turn that .* chat template does not write"):
        encode(TURNS, template)
    # Turns after the last target are dropped anyway.
    assert encode(TURNS[:4], template)[0] == encode(TURNS[:3], template)[0]


def test_content_that_the_template_leaves_out_beside_tool_calls_is_rejected():
    call = calling({"city": "Rome"})
    assert encode([USER, call], CALLS_ONLY)
    with pytest.raises(BadRow, match=r"content beside tool_calls that .*, or remove the content"):
        encode([USER, call | {"content": "I search."}], CALLS_ONLY)


def test_a_system_text_needs_a_place():
    with pytest.raises(BadRow, match="no user message to write the system text into"):
        encode([TURNS[0], TURNS[2]], DROPPING)
    blank = TURNS[0] | {"content": ""}  # has nothing to move
    assert encode([blank, *TURNS[1:3]], DROPPING)[0] == encode(TURNS[1:3], DROPPING)[0]


def test_a_tokenizer_without_template_is_rejected():
    with pytest.raises(DataError, match="no chat template"):
        encode(TURNS, None)
