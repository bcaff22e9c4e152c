"""Values for the variables of a chat template, such as `enable_thinking`.

A tokenizer keeps them at the start of its template. They are saved with it, beside the adapter or in a merged model, so
whatever renders the template later asks the model as it was trained. A value that a caller passes is used instead.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import keyword
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYWORDS = frozenset(keyword.kwlist)


@functools.cache
def _reserved() -> set[str]:
    """Return the names that cannot be set, because transformers sets them when it renders a conversation."""
    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return {"messages", *arguments, *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}


def check_template_kwargs(
    values: Mapping[str, Any], setting: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Validate values for a chat template.

    Args:
        values: A value for each variable.
        setting: Name of the setting with the values, for messages.
        tokenizer: The tokenizer, if its template is known. It must then read each variable.

    Raises:
        ConfigurationError: A name is no variable, transformers sets it, or the template does not read it, so the value
            would change nothing. Or a value is not JSON.
        DataError: The template is invalid.
    """
    for name, value in values.items():
        if name in _reserved():
            raise ConfigurationError(
                f"{setting} has {name!r}, which is set for each conversation. Remove it."
            )
        if not name.isidentifier() or not _KEYWORDS.isdisjoint({name, name.capitalize()}):
            raise ConfigurationError(
                f"{setting} has {name!r}, which is not a variable of a template. Write a name such as enable_thinking."
            )
        is_json = False
        with suppress(TypeError, ValueError, RecursionError):
            is_json = json.loads(json.dumps(value, allow_nan=False)) == value
        if not is_json:
            raise ConfigurationError(
                f"{setting}.{name} is {value!r:.60}; it must be text, a finite number, true, false, null, or lists "
                "and objects of these."
            )
    if not values or tokenizer is None:
        return
    from lorakit.tasks.rendering import variables_of  # imports jinja2

    read = {name for template in _templates(tokenizer).values() for name in variables_of(template)}
    known = sorted(read - _reserved() - tokenizer.special_tokens_map.keys())
    for name in values:
        if name not in known:
            raise ConfigurationError(
                f"{setting} has {name!r}, which the tokenizer's chat template does not read; it reads "
                f"{', '.join(known) or 'no such variable'}.{nearest(name, known)}"
            )


def with_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template has the values of data.chat_template_kwargs as defaults.

    It is a copy, unless the template starts with them already.

    Raises:
        LorakitError: As for `check_template_kwargs`.
    """
    templates = _templates(tokenizer)
    if not values or not templates:  # the task rejects a tokenizer without a template
        return tokenizer
    check_template_kwargs(values, "data.chat_template_kwargs", tokenizer)
    # Jinja reads Python's literals.
    first = "".join(
        f"{{% set {name} = {name} if {name} is defined else {value!a} %}}\n"
        for name, value in values.items()
    )
    if all(template.startswith(first) for template in templates.values()):
        return tokenizer
    own = copy.copy(tokenizer)
    ours = {name: first + template for name, template in templates.items()}
    own.chat_template = ours if isinstance(tokenizer.chat_template, dict) else ours["default"]
    return own


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the chat templates of a tokenizer by name; the only one is "default"."""
    templates = tokenizer.chat_template or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    return {name: str(template) for name, template in named.items()}
