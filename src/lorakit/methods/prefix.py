"""Prefix methods: train the vectors of virtual tokens around the prompt (Hu et al. 2021, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError
from lorakit.methods.method import as_names
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualTokens

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@dataclass(frozen=True, kw_only=True)
class _Prefix:
    """What the two methods share: how many virtual tokens there are, and what is trained beside them."""

    prefix_length: int = 8
    """Virtual tokens before the prompt, after a bos or [CLS]."""
    infix_length: int = 0
    """Virtual tokens after the prompt: before a completion, or at the end of what a classifier reads."""
    train_modules: tuple[str, ...] | str = ()
    """Modules trained in full beside them (name suffixes), such as a new classification head."""

    def __post_init__(self) -> None:
        conform(self)
        object.__setattr__(self, "train_modules", as_names("train_modules", self.train_modules))
        _check_lengths(self.prefix_length, self.infix_length)

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that each sequence takes."""
        return VirtualTokens(prefix=self.prefix_length, infix=self.infix_length)

    def trained_parameters(self, model: nn.Module) -> list[str]:
        """Names of the parameters in ``train_modules`` (see `Method`)."""
        from lorakit.methods.trained import modules_named, parameters_below

        return parameters_below(model, modules_named(model, self.train_modules))


@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(_Prefix):
    """Train the embeddings of virtual tokens: the prefix before the prompt, the infix after it (PreEmbed).

    Of width d they are ``d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """The vectors, on the input embedding (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, or reads two sequences.
        """
        from lorakit.methods.prefix_modules import embedding_vectors

        return embedding_vectors(model, self.virtual_tokens, dtype, method=type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class PrefixLayer(_Prefix):
    """Train the vectors with which virtual tokens enter every block, the embedding included (PreLayer).

    What a block made of them is replaced before the next: they depend on no input. What leaves the last block is
    read by no other token and stays. So L blocks of width d take ``L d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """The vectors, on the input embedding and on every block but the first (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, reads two sequences, or its blocks
                cannot be told.
        """
        from lorakit.methods.prefix_modules import block_vectors, embedding_vectors

        tokens, name = self.virtual_tokens, type(self).__name__
        return {
            **embedding_vectors(model, tokens, dtype, method=name),
            **block_vectors(model, tokens, dtype),
        }


def _check_lengths(prefix: int, infix: int) -> None:
    for name, length in (("prefix_length", prefix), ("infix_length", infix)):
        if length < 0:
            raise ConfigurationError(f"{name} is {length}; it must be 0 or more.")
        if length >= INFIX_START - PREFIX_START:
            raise ConfigurationError(f"{name} is {length}; no model takes so many tokens.")
    if not prefix + infix:
        raise ConfigurationError(
            "prefix_length and infix_length are 0, so that there is nothing to train. Set one, for example "
            "prefix_length=8."
        )
