"""Language modelling on conversations. The targets are the assistant's turns and their end-of-turn tokens."""

from __future__ import annotations

import re
import sys
from bisect import bisect
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, nearest
from lorakit.tasks import conversion
from lorakit.tasks.language_modelling import TextTask, encode_text, end_id, fit
from lorakit.tasks.task import (
    BadRow,
    Fields,
    LanguageExample,
    checked_text,
    json_type,
    text_field,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""Token positions `start <= i < stop` of one assistant turn."""
Turns = tuple[list[int], list[Span]]
"""Token ids of a conversation, and the span of each assistant turn."""

ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(TextTask):
    """`messages`: a list of `{role, content}`, rendered by the tokenizer's chat template.

    A row may also have `system`, the text of a first turn, and `tools`, a list of JSON schemas that is passed to the
    template. Messages of ShareGPT (`{from, value}`) and Alpaca's rows (`instruction`, `input`, `output`, `history`) are
    converted.
    """

    name = "chat"
    layouts = (("messages",), conversion.ALPACA)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.template = ChatTemplate(tokenizer)
        self.end = end_id(tokenizer)

    @classmethod
    def stop_ids(cls, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token that ends the assistant's turns in training. It need not be eos."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return cls(tokenizer, max_length=sys.maxsize).encode({"messages": turns}).input_ids[-1:]
        except DataError:  # the template can format prompts but not training examples
            return []

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether there are messages. Alpaca's rows are chat only if the configuration says so."""
        del rows
        return "messages" in columns

    @classmethod
    def source_format(cls, columns: Collection[str], rows: Iterable[Fields]) -> str:
        """Return how the rows write conversations: whose keys, with contents as parts, with tools."""
        if "messages" not in columns:
            return "Alpaca's instruction, input and output as a user's and an assistant's message"
        first = [row["messages"] for row in rows if isinstance(row.get("messages"), list)]
        messages = [m for conversation in first for m in conversation if isinstance(m, dict)]
        keys = "messages of role and content"
        if any(map(conversion.is_sharegpt, messages)):
            keys = "ShareGPT's conversations of from and value"
        extras = {
            "contents as lists of parts": any(
                isinstance(m.get("content", m.get("value")), list) for m in messages
            ),
            "tools": "tools" in columns,
            "tool calls": any(
                m.get("tool_calls") or m.get("from") == "function_call" for m in messages
            ),
        }
        return ", ".join([keys, *(name for name, present in extras.items() if present)])

    def rows(self, fields: Fields) -> Iterable[Fields]:
        """Yield the row, with messages where it is one of Alpaca's."""
        if "messages" not in fields and conversion.is_alpaca(fields):
            answer = {"role": "assistant", "content": text_field(fields, "output")}
            fields = {**fields, "messages": [*conversion.alpaca_messages(fields), answer]}
        yield fields

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the conversation up to its last target: each assistant turn without weight 0 or train false.

        Messages after the last target are dropped: no target depends on them.
        """
        messages, tools = checked_messages(fields), conversion.tools(fields.get("tools"))
        self.template.check_tools(messages, tools)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise _bad("has no assistant turn, so the example has no target")
        trained = [i for i in turns if _is_trained(messages[i])]
        if not trained:
            raise _bad(
                "has weight 0 or train false in every assistant turn, so the example has no target. Remove the row, or "
                "the key from one turn"
            )
        messages = messages[: trained[-1] + 1]
        if len(messages) == 1:
            raise _bad("has no message before the assistant's turn")
        ids, spans = self.template.assistant_turns(messages, tools)
        ids, spans = self._with_ends(ids, spans)
        mask = [False] * len(ids)
        # Turns after the last target have no span.
        for turn, (start, stop) in zip(turns, spans, strict=False):
            if turn in trained:
                mask[start:stop] = [True] * (stop - start)
        mask[0] = False
        # Some templates mark the header of a turn as generated (SmolLM3). The generation prompt includes it.
        prompt = self.template.text(messages[:-1], tools, answer=True)
        prompt_ids = encode_text(self.tokenizer, prompt)
        has_prompt = ids[: len(prompt_ids)] == prompt_ids
        prompt_length = len(prompt_ids) if has_prompt else spans[-1][0]
        example = LanguageExample(
            input_ids=ids,
            loss_mask=mask,
            prompt_length=prompt_length,
            prompt=prompt,
            completion=self._reference(messages[-1], ids[prompt_length:]),
        )
        # In some tokenizers bos is the token that opens every turn (SmolLM2). Then truncation need not keep it.
        starts_with_bos = ids[0] == self.tokenizer.bos_token_id and ids.count(ids[0]) == 1
        return fit(example, self.max_length, truncate=self.truncate, keep=int(starts_with_bos))

    def _reference(self, message: Message, targets: list[int]) -> str:
        """Return the text of a turn as a model generates it: with tool calls, and thoughts that the template adds.

        Return the content alone if it is not in that text, because it contains special tokens.
        """
        text = str(self.tokenizer.decode(targets, skip_special_tokens=True)).strip()
        content = message["content"]
        return text if message.get("tool_calls") or content.strip() in text else content

    def _with_ends(self, ids: list[int], spans: list[Span]) -> Turns:
        """Cut each turn after its end-of-turn token, and the sequence after the last turn.

        Templates write a line feed after the end-of-turn token, where generation has already stopped. If the template
        writes no end-of-turn token, eos is appended to the last turn, so that the model learns to stop.
        """
        spans = [(start, self._turn_end(ids, start, stop)) for start, stop in spans]
        start, stop = spans[-1]
        ids = ids[:stop]
        if ids[-1] not in self.template.special_ids:
            ids.append(self.end)
            spans[-1] = (start, stop + 1)
        return ids, spans

    def _turn_end(self, ids: list[int], start: int, stop: int) -> int:
        """Return the position after the end-of-turn token, without the blanks that follow it; else `stop`."""
        end = stop
        while end > start + 1 and not str(self.tokenizer.decode([ids[end - 1]])).strip():
            end -= 1
        return end if ids[end - 1] in self.template.special_ids else stop


class ChatTemplate:
    """A tokenizer's chat template. Renders conversations and locates the assistant's turns in them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        self.name = f"'{name}'" if name else type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer ({type(tokenizer).__name__}) has no chat template, which 'messages' need; use the "
                "tokenizer of an instruct model, or rows with prompt and completion"
            )
        added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = {*tokenizer.all_special_ids, *added.values()}
        names = sorted(map(re.escape, added), key=len, reverse=True)  # the longest match wins
        self._special = re.compile("|".join(names) or r"(?!)")

    def assistant_turns(self, messages: list[Message], tools: list | None) -> Turns:
        """Return the token ids of the conversation and the span of each assistant turn."""
        template = self._source(tools)
        if GENERATION_TAG.search(template) and self.tokenizer.is_fast:
            return self._turns_by_tag(messages, tools)
        return self._turns_by_prefix(messages, tools)

    def check_tools(self, messages: list[Message], tools: list | None) -> None:
        """Reject tools and tool calls that the template would leave out without a word."""
        template = self._source(tools)
        used = {"tools": tools, "tool_calls": any(m.get("tool_calls") for m in messages)}
        for name, given in used.items():
            if given and name not in template:
                raise BadRow(
                    f"{'is set' if name == 'tools' else 'has tool_calls'}, but the tokenizer's chat template does "
                    f"not write {name}, so the model would not see them. Use the tokenizer of a model trained with "
                    f"tools, or remove {name} from the row",
                    "tools" if name == "tools" else "messages",
                )

    def text(
        self, messages: list[Message], tools: list | None = None, *, answer: bool = False
    ) -> str:
        """Return the rendered conversation; with `answer`, followed by the generation prompt."""
        # A thought or an argument of a tool call may hold text that the tokenizer cannot encode.
        return checked_text(self._apply(messages, tools, answer, tokenize=False), "messages")

    def has_system_role(self) -> bool:
        """Return whether the template writes a system turn. Others reject it (Gemma) or drop it."""
        probe = "lorakit-system-probe"
        turns = [{"role": "system", "content": probe}, {"role": "user", "content": "a"}]
        try:
            return probe in self.text(turns, answer=True)
        except BadRow:
            return False

    def with_system(self, messages: list[Message], system: str) -> list[Message]:
        """Return the messages with a system turn; without a system role, with its text before the first user message.

        Raises:
            BadRow: They have a system turn already, or there is neither a system role nor a user message.
        """
        if messages[0]["role"] in ("system", "developer"):
            raise _bad("has a system turn already; remove it, or set no other system text")
        if self.has_system_role():
            return [{"role": "system", "content": system}, *messages]
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            raise _bad("has no user message to write the system text into")
        content = f"{system}\n\n{messages[first]['content']}"
        return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]

    def ids(
        self, messages: list[Message], tools: list | None = None, *, answer: bool = False
    ) -> list[int]:
        """Return the token ids of `text`."""
        return encode_text(self.tokenizer, self.text(messages, tools, answer=answer))

    def _turns_by_tag(self, messages: list[Message], tools: list | None) -> Turns:
        """Locate the turns by the template's `{% generation %}` tags."""
        out = self._apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        mask = [False, *map(bool, out["assistant_masks"]), False]
        edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        turns = sum(m["role"] == "assistant" for m in messages)
        if len(spans) != turns:
            raise _bad(
                f"has {turns} assistant turns, but the chat template marks {len(spans)} with {{% generation %}}"
            )
        ids = list(out["input_ids"])
        # Some templates write the end-of-turn token outside the tags. It is the special token after the last turn.
        end = ids[spans[-1][1] :][:1]
        if end and end[0] in self.special_ids and ids[spans[-1][1] - 1] not in self.special_ids:
            spans = [
                (start, stop + 1) if ids[stop : stop + 1] == end else (start, stop)
                for start, stop in spans
            ]
        return ids, spans

    def _turns_by_prefix(self, messages: list[Message], tools: list | None) -> Turns:
        """Locate each turn by rendering the conversation with it and, as a generation prompt, without it."""
        if messages[0]["role"] == "assistant":
            raise _bad("starts with an assistant turn; start with a system or user message")
        text = self.text(messages, tools)
        ids = encode_text(self.tokenizer, text)
        special = self._special_tokens(text, ids)

        def start_of(part: str) -> list[int]:
            """Tokenise `part`. If `text` starts with it, reuse the ids before the last special token in it.

            Fast tokenizers split a text at special tokens first, so these ids do not depend on what follows.
            """
            known = bisect(special, len(part), key=lambda token: token[1])
            if not known or not text.startswith(part):
                return encode_text(self.tokenizer, part)
            position, _, index = special[known - 1]
            return ids[:index] + encode_text(self.tokenizer, part[position:])

        spans: list[Span] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = start_of(self.text(messages[:turn], tools, answer=True))
            is_last = turn + 1 == len(messages)
            upto = ids if is_last else start_of(self.text(messages[: turn + 1], tools))
            # A template may render a turn differently when others follow (Qwen 3 drops earlier thoughts). Or the
            # turn's first token merges with the prompt's last. Then the spans are unreliable.
            if ids[: len(before)] != before or ids[: len(upto)] != upto or len(upto) <= len(before):
                raise _bad(
                    f"cannot be split into turns: the chat template renders the conversation up to "
                    f"message {turn + 1} (assistant) differently from the same part of the whole conversation, "
                    f"{self._difference(ids, before if ids[: len(before)] != before else upto)}. Use a chat "
                    "template with {% generation %} around the assistant's turns, or rows that end with "
                    "their first assistant turn"
                )
            spans.append((len(before), len(upto)))
        return ids, spans

    def _special_tokens(self, text: str, ids: list[int]) -> list[tuple[int, int, int]]:
        """Return the start and end in `text` and the index in `ids` of each special token.

        Return none if text and ids disagree, or the tokenizer is slow, because slow tokenizers may add a space at the
        start of a text.
        """
        found = list(self._special.finditer(text)) if self.tokenizer.is_fast else []
        indices = [index for index, i in enumerate(ids) if i in self.special_ids]
        expected = self.tokenizer.convert_tokens_to_ids([match[0] for match in found])
        if expected != [ids[index] for index in indices]:
            return []
        return [(*match.span(), index) for match, index in zip(found, indices, strict=True)]

    def _difference(self, whole: list[int], part: list[int]) -> str:
        pairs = zip(whole, part, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(part)))
        actual, expected = (str(self.tokenizer.decode(ids[at : at + 8])) for ids in (part, whole))
        return f"{actual!r} instead of {expected!r}"

    def _source(self, tools: list | None) -> str:
        """Return the text of the template; a tokenizer may have one of its own for tools."""
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise DataError(
                f"{self.name} has several chat templates and none is the default: {error}"
            ) from error
        if not isinstance(template, str):
            raise DataError(
                f"the chat template of {self.name} is {json_type(template)}, expected text. Correct "
                "chat_template in its tokenizer_config.json"
            )
        return template

    def _apply(
        self, messages: list[Message], tools: list | None, answer: bool = False, **options: Any
    ) -> Any:
        from lorakit.tasks.rendering import bounded_rendering  # imports jinja2

        with bounded_rendering(self.name, messages, tools):
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=answer, **options
            )


def without_answer(messages: list[Message]) -> list[Message]:
    """Return the messages that the assistant answers: without a last assistant turn, which is the answer.

    Raises:
        BadRow: No other message is left.
    """
    if messages[-1]["role"] != "assistant":
        return messages
    if len(messages) == 1:
        raise _bad("has no message before the assistant's turn")
    return messages[:-1]


def checked_messages(fields: Fields) -> list[Message]:
    """Return the messages of a row after validation, each as `{role, content, ...}` without null entries.

    A `system` text beside the messages becomes their first one.
    """
    messages = fields.get("messages", fields.get("conversations"))
    if messages is None:
        raise _bad("is missing")
    if not isinstance(messages, list | tuple):
        raise _bad(f"is {json_type(messages)}, expected a list of {{role, content}}")
    if not messages:
        raise _bad("is empty")
    checked = [
        _checked_message(message, number) for number, message in enumerate(messages, start=1)
    ]
    return conversion.with_system(checked, fields.get("system"))


def _bad(problem: str) -> BadRow:
    """Return the error of a row whose messages have this problem."""
    return BadRow(problem, "messages")


def _is_trained(message: Message) -> bool:
    """Return whether the loss includes an assistant's message: OpenAI's `weight` and axolotl's `train` exclude it."""
    return bool(message.get("weight", True) and message.get("train", True))


def _checked_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise _bad(f"has {json_type(message)} as message {number}, expected {{role, content}}")
    # In Parquet files every message has all keys; unused ones are null.
    message = {key: value for key, value in message.items() if value is not None}
    if conversion.is_sharegpt(message):
        message = conversion.role_and_content(message, number)
    role = message.get("role")
    if role is None:
        keys = ", ".join(map(str, message)) or "nothing"
        raise _bad(f"has a message without 'role' (message {number} has: {keys})")
    if role not in ROLES:
        raise _bad(
            f"has the unknown role {role!r} in message {number}; roles are {', '.join(ROLES)}."
            + nearest(str(role), ROLES)
        )
    for key in ("weight", "train"):
        if message.get(key, 1) not in (0, 1):
            raise _bad(
                f"has {message[key]!r} as {key!r} of message {number}; write 1 or true to train on the message, 0 or "
                "false to leave it out of the loss"
            )
    if "tool_calls" in message:
        message["tool_calls"] = conversion.tool_calls(message["tool_calls"], number)
        message.setdefault("content", "")
    content = message.get("content")
    if content is None:
        raise _bad(f"has no 'content' in message {number} ({role})")
    if not isinstance(content, str | list):
        raise _bad(
            f"has {json_type(content)} as 'content' of message {number}, expected text or a list of "
            "{type: text, text: ...}"
        )
    # Templates of text models expect text. Some would write a list as Python prints it.
    text = message["content"] = _joined(content, number)
    if not text.strip() and role == "assistant" and not message.get("tool_calls"):
        raise _bad(f"has an empty assistant turn (message {number})")
    checked_text(text, "messages")
    return message


def _joined(content: str | list[Any], number: int) -> str:
    """Return the content of message `number` as text; its parts are `{type: text, text: ...}` or text."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else json_type(part)
            raise _bad(
                f"has a part of type {kind!r} in message {number}; this task reads text only. Remove the part, or "
                "write it as {type: text, text: ...}"
            )
        texts.append(text)
    return "".join(texts)
