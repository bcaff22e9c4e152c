"""Language modelling on conversations. The targets are the assistant's turns and their end-of-turn tokens."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.tasks import conversion
from lorakit.tasks.chat_template import ChatTemplate, Turns
from lorakit.tasks.language_modelling import TextTask, encode_text, end_id, fit
from lorakit.tasks.messages import Message, bad_messages, checked_messages, is_trained, key_of
from lorakit.tasks.task import Fields, LanguageExample, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat(TextTask):
    """`messages`: a list of `{role, content}`, rendered by the tokenizer's chat template.

    A row may also have `system`, the text of a first turn, and `tools`, a list of JSON schemas that is passed to the
    template. Messages of ShareGPT (`{from, value}`), Alpaca's rows (`instruction`, `input`, `output`, `history`), and
    a `prompt` with a `completion`, each text or a list of messages (TRL), are converted.
    """

    name = "chat"
    layouts = (("messages",), conversion.ALPACA, conversion.PROMPT_COMPLETION)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        self.template = ChatTemplate(tokenizer)
        self.end = end_id(tokenizer)

    @classmethod
    def stop_ids(cls, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token that ends the assistant's turns in training. It need not be eos."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            chat = cls(tokenizer, max_length=sys.maxsize)
            # Without the checks of `encode`: the turn may start elsewhere than generation.
            messages = chat.template.prepared(turns, None)
            return chat._turns(messages, None)[0][-1:]
        except DataError:  # the template can format prompts but not training examples
            return []

    @classmethod
    def reads(cls, columns: Collection[str], rows: Iterable[Fields]) -> bool:
        """Return whether there are messages. Texts, such as Alpaca's, are chat only if the configuration says so."""
        return "messages" in columns or conversion.is_conversational(next(iter(rows), {}))

    @classmethod
    def source_format(cls, columns: Collection[str], rows: Iterable[Fields]) -> str:
        """Return how the rows write conversations: whose keys, with contents as parts, with tools."""
        if "messages" not in columns:
            if set(conversion.PROMPT_COMPLETION) <= set(columns):
                return "prompt and completion as messages"
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
        """Yield the row, with messages where it has other fields."""
        if "messages" not in fields:
            if conversion.is_alpaca(fields):
                answer = {"role": "assistant", "content": text_field(fields, "output")}
                fields = {**fields, "messages": [*conversion.alpaca_messages(fields), answer]}
            elif set(conversion.PROMPT_COMPLETION) <= fields.keys():
                fields = {**fields, "messages": conversion.joined_messages(fields)}
        yield fields

    def encode(self, fields: Fields) -> LanguageExample:
        """Return the conversation up to its last target: each assistant turn without weight 0 or train false.

        Messages after the last target are dropped: no target depends on them.
        """
        messages, tools = checked_messages(fields), conversion.tools(fields.get("tools"))
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise bad_messages("has no assistant turn, so the example has no target")
        trained = [i for i in turns if is_trained(messages[i])]
        if not trained:
            raise bad_messages(
                "has weight 0 or train false in every assistant turn, so the example has no target. Remove the row, or "
                "the key from one turn"
            )
        messages = messages[: trained[-1] + 1]
        if len(messages) == 1:
            raise bad_messages("has no message before the assistant's turn")
        key = key_of(messages[:-1], tools)
        messages = self.template.prepared(messages, tools)
        ids, spans = self._turns(messages, tools)
        self.template.require_answers(messages, tools)
        mask = [False] * len(ids)
        for start, stop in spans:
            mask[start:stop] = [True] * (stop - start)
        mask[0] = False
        # Some templates mark the header of a turn as generated (SmolLM3). The generation prompt includes it.
        prompt = self.template.text(messages[:-1], tools, answer=True)
        prompt_ids = encode_text(self.tokenizer, prompt)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise self.template.start_error(messages, ids, prompt_ids)
        example = LanguageExample(
            input_ids=ids,
            loss_mask=mask,
            prompt_length=len(prompt_ids),
            prompt=prompt,
            completion=self._reference(messages[-1], ids[len(prompt_ids) :]),
            key=key,
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

    def _turns(self, messages: list[Message], tools: list | None) -> Turns:
        """Return the assistant's turns, each cut after its end-of-turn token, and the tokens up to the last turn's.

        Templates write a line feed after the end-of-turn token, where generation has already stopped. If the template
        writes no end-of-turn token, eos is appended to the last turn, so that the model learns to stop.
        """
        ids, spans = self.template.assistant_turns(messages, tools)
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
        while end > start + 1 and self.template.is_blank(ids[end - 1]):
            end -= 1
        return end if ids[end - 1] in self.template.special_ids else stop
