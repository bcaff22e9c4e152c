"""A tokenizer's chat template: the text of a conversation, and where the assistant's turns are in it."""

from __future__ import annotations

import itertools
import re
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.tasks.language_modelling import common_length, encode_text
from lorakit.tasks.messages import THOUGHTS, Message, bad_messages, is_trained
from lorakit.tasks.task import BadRow, checked_text, json_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Token positions `start <= i < stop` of one assistant turn."""
Turns = tuple[list[int], list[Span]]
"""Token ids of a conversation, and the span of each assistant turn in the loss."""

PROBE = "lorakit-probe"
"""A text that no template contains or changes. It shows whether the template writes a turn."""
_PROBE = re.compile(rf"{PROBE}-\d+-")
_READS_THOUGHTS = re.compile(rf"[.'\"](?:{'|'.join(THOUGHTS)})\b")
_TAG = re.compile(r"(<[^<>\s]+>)")
_PROMPT_THOUGHT = re.compile(r"<(/?)think>\s*$")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template. Renders conversations and locates the assistant's turns in them.

    Args:
        tokenizer: The tokenizer.
        variables: More variables of the template, such as Qwen 3's `enable_thinking` (`check_template_kwargs`).

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.variables = tokenizer, variables or {}
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
        """Return the token ids of the conversation and the span of each assistant turn in the loss.

        The last message must be such a turn.
        """
        has_tags = GENERATION_TAG.search(self._source(tools)) and self.tokenizer.is_fast
        return (self._turns_by_tag if has_tags else self._turns_by_prefix)(messages, tools)

    def prepared(self, messages: list[Message], tools: list | None = None) -> list[Message]:
        """Return the messages with the roles that the template writes.

        `developer` becomes `system`, as OpenAI's newer files and clients call it. Without a system role, the text of a
        first system turn moves to the start of the first user message.

        Raises:
            BadRow: The template would leave out a turn, tools, tool calls or thoughts without a word.
        """
        self._require_keys(messages, tools)
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        if messages[0]["role"] == "system" and not self.has_system_role:
            messages = _merge_system(messages)
        self._require_turns(messages, tools)
        return messages

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template writes a system turn. Others reject it (Gemma 2) or drop it."""
        turns = [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}]
        try:
            return PROBE in self.text(turns, answer=True)
        except BadRow:
            return False

    def _require_turns(self, messages: list[Message], tools: list | None) -> None:
        """Reject contents that the template leaves out. `has_system_role` has tested a first system turn.

        Templates write those of a user and an assistant, but some none beside tool calls.
        """
        start = int(messages[0]["role"] == "system")
        keys = {
            i: ("content",)
            for i, message in enumerate(messages[start:], start)
            if message["role"] not in ("user", "assistant") or message.get("tool_calls")
        }
        # Whole: a template may drop old thoughts beside a call, which are before a tag.
        for i, _ in self._dropped(messages, tools, keys, divides=False):
            role = messages[i]["role"]
            is_call = role == "assistant"
            found = "content beside tool_calls" if is_call else f"a {role!r} turn"
            raise bad_messages(
                f"has {found} that the tokenizer's chat template does not write, so the model would not see it. "
                "Use the tokenizer of a model trained with such turns, or remove the "
                f"{'content' if is_call else 'turn'}"
            )

    def require_answers(self, messages: list[Message], tools: list | None) -> None:
        """Reject texts of the turns in the loss that the template leaves out.

        Many templates write the thoughts of the last turn only, or only those beside tool calls (Gemma 4).

        Raises:
            BadRow: It leaves one out.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        keys = dict.fromkeys((i for i in turns if is_trained(messages[i])), ("content", *THOUGHTS))
        for i, text in self._dropped(messages, tools, keys):
            raise bad_messages(
                f"has {text!r:.60} in assistant turn {turns.index(i) + 1}, but the tokenizer's chat template leaves "
                "this text out there, so the model would not learn it. Set weight 0 on the turn, remove the text, or "
                "set the variable that keeps it (preserve_thinking in some templates) in data.chat_template_kwargs"
            )

    def _dropped(
        self,
        messages: list[Message],
        tools: list | None,
        keys: Mapping[int, Sequence[str]],
        *,
        divides: bool = True,
    ) -> Iterator[tuple[int, str]]:
        """Yield the texts under `keys` of each message that the template does not write, and the message's index.

        Renders a copy with a probe after each text. Tags, such as those of thoughts, divide a text by default, because
        templates do so and may keep one part.
        """
        probes: dict[tuple[int, str], str] = {}
        probed = list(messages)

        def with_probe(i: int, part: str) -> str:
            text = part.strip()
            if not text or _TAG.fullmatch(part):
                return part
            # Two keys may hold the same thoughts; the template writes one of them.
            probe = probes.setdefault((i, text), f"{PROBE}-{len(probes)}-")
            end = len(part.rstrip())
            return f"{part[:end]} {probe}{part[end:]}"

        for i, names in keys.items():
            for name in names:
                if text := messages[i].get(name):
                    parts = _TAG.split(text) if divides else [text]
                    probed[i] = probed[i] | {name: "".join(with_probe(i, part) for part in parts)}
        if probes:
            text = self.text(probed, tools, answer=messages[-1]["role"] != "assistant")
            written = set(_PROBE.findall(text))
            yield from (where for where, probe in probes.items() if probe not in written)

    def _require_keys(self, messages: list[Message], tools: list | None) -> None:
        """Reject tools, tool calls and thoughts that the template would leave out without a word."""
        template = self._source(tools)
        written = {name: name in template for name in ("tools", "tool_calls")}
        written |= dict.fromkeys(THOUGHTS, _READS_THOUGHTS.search(template) is not None)
        keys = ("tool_calls", *THOUGHTS)
        used = [key for m in messages for key in keys if str(m.get(key) or "").strip()]
        for name in ["tools", *used] if tools else used:
            if not written[name]:
                raise BadRow(
                    f"{'is set' if name == 'tools' else f'has {name}'}, but the tokenizer's chat template does "
                    f"not write {name}, so the model would not see them. Use the tokenizer of a model trained with "
                    f"{'thoughts' if name in THOUGHTS else 'tools'}, or remove {name} from the row",
                    "tools" if name == "tools" else "messages",
                )

    def text(
        self, messages: list[Message], tools: list | None = None, *, answer: bool = False
    ) -> str:
        """Return the rendered conversation; with `answer`, followed by the generation prompt."""
        # A thought or an argument of a tool call may hold text that the tokenizer cannot encode.
        return checked_text(self._apply(messages, tools, answer, tokenize=False), "messages")

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
        turns = [m for m in messages if m["role"] == "assistant"]
        if len(spans) != len(turns):
            raise bad_messages(
                f"has {len(turns)} assistant turns, but the chat template marks {len(spans)} with {{% generation %}}"
            )
        ids = list(out["input_ids"])
        # Some templates write the end-of-turn token outside the tags. It is the special token after the last turn.
        end = ids[spans[-1][1] :][:1]
        if end and end[0] in self.special_ids and ids[spans[-1][1] - 1] not in self.special_ids:
            spans = [
                (start, stop + 1) if ids[stop : stop + 1] == end else (start, stop)
                for start, stop in spans
            ]
        return ids, [s for s, m in zip(spans, turns, strict=True) if is_trained(m)]

    def _turns_by_prefix(self, messages: list[Message], tools: list | None) -> Turns:
        """Locate each turn by rendering the conversation with it and, as a generation prompt, without it."""
        if messages[0]["role"] == "assistant" and is_trained(messages[0]):
            raise bad_messages(
                "starts with an assistant turn; set its weight to 0, or start with a system or user message"
            )
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
            if message["role"] != "assistant" or not is_trained(message):
                continue
            before = start_of(self.text(messages[:turn], tools, answer=True))
            is_last = turn + 1 == len(messages)
            upto = ids if is_last else start_of(self.text(messages[: turn + 1], tools))
            start = common_length(ids, before)
            has_before = start == len(before)
            # The end of the last turn does not depend on its start, which the caller compares with generation's.
            stop = self._stop(ids, upto, start) if has_before or is_last else None
            # A template may render a turn differently when others follow (Qwen 3 drops earlier thoughts). Or the
            # turn's first token merges with the prompt's last. Then the spans are unreliable.
            if stop is None:
                raise self._turn_error(
                    messages[: turn + 1],
                    ids,
                    upto if has_before else before,
                    "Set weight 0 on the assistant's turns before the last, end each row with its first assistant "
                    "turn, or use a chat template with {% generation %} around the assistant's turns",
                )
            spans.append((start, stop))
        return ids, spans

    def start_error(self, messages: list[Message], ids: list[int], prompt: list[int]) -> BadRow:
        """Return the error of a conversation whose last turn does not start where generation does, after `prompt`."""
        advice = "Remove white space at the start of the turn, or use another chat template"
        if thought := _PROMPT_THOUGHT.search(str(self.tokenizer.decode(prompt[-16:]))):
            change, on, value = (
                ("Remove the turn's thoughts", "on", "true")
                if thought[1]
                else ("Write the turn's thoughts as reasoning_content", "off", "false")
            )
            advice = (
                f"The prompt for generation ends with {thought[0]!r}. {change}, or turn thinking {on}: "
                f"data.chat_template_kwargs: {{enable_thinking: {value}}}"
            )
        return self._turn_error(messages, ids, prompt, advice)

    def _turn_error(
        self, messages: list[Message], ids: list[int], part: list[int], advice: str
    ) -> BadRow:
        number, at = sum(m["role"] == "assistant" for m in messages), common_length(ids, part)
        actual, expected = (str(self.tokenizer.decode(x[at : at + 8])) for x in (part, ids))
        return bad_messages(
            f"cannot be split into turns: the chat template renders the conversation up to assistant turn {number} "
            f"differently from the same part of the whole conversation, {actual!r} instead of {expected!r}. {advice}"
        )

    def _stop(self, ids: list[int], upto: list[int], start: int) -> int | None:
        """Return where the turn that ends `upto` stops in `ids`; None if they write it differently.

        They may end it differently. Phi writes eos after the last turn only, gpt-oss another end-of-turn token there.
        """
        if ids[: len(upto)] == upto:
            return len(upto) if len(upto) > start else None
        common = common_length(ids, upto)
        if not all(i in self.special_ids or self.is_blank(i) for i in upto[common:]):
            return None
        turn = [i for i in ids[start:common] if not self.is_blank(i)]
        if not turn or turn[-1] in self.special_ids:
            return common if turn else None
        # `ids` has an end-of-turn token here if the next turn opens with a special token after it.
        following = itertools.dropwhile(self.is_blank, ids[common + 1 :])
        end = [*ids[common : common + 1], *itertools.islice(following, 1)]
        return common + 1 if len(end) == 2 and self.special_ids.issuperset(end) else None

    def is_blank(self, token: int) -> bool:
        """Return whether a token is white space."""
        return not str(self.tokenizer.decode([token])).strip()

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

        with bounded_rendering(self.name, messages, tools, self.variables):
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=answer, **options, **self.variables
            )


def _merge_system(messages: list[Message]) -> list[Message]:
    """Return the messages with the text of the first, a system turn, at the start of the first user message."""
    system, *rest = messages
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        raise bad_messages("has no user message to write the system text into")
    if not system["content"].strip():
        return rest
    content = f"{system['content']}\n\n{rest[first]['content']}"
    return [*rest[:first], rest[first] | {"content": content}, *rest[first + 1 :]]
