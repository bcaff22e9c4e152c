"""Prefix methods: train vectors of virtual tokens before and after the prompt (Hu et al. 2021, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorakit.configuration import strict
from lorakit.errors import ConfigurationError, require_at_least
from lorakit.methods.method import TrainsModules
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualTokens

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.methods.module import AdapterModule


@dataclass(frozen=True, kw_only=True)
class _Prefix(TrainsModules):
    """Settings of both prefix methods: numbers of virtual tokens, and modules trained in full."""

    main_settings: ClassVar[tuple[str, ...]] = ("prefix_length", "infix_length")
    """Settings that are shown even if they have their defaults."""

    prefix_length: int = 8
    """Virtual tokens before the prompt, after a bos or [CLS]."""
    infix_length: int = 0
    """Virtual tokens after the prompt: before a completion, or at the end of a classifier's input."""
    train_modules: tuple[str, ...] | list[str] | str = ()
    """Modules trained in full in addition (name suffixes), such as a new classification head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefix_length", "infix_length"):
            require_at_least(name, getattr(self, name), 0, below=INFIX_START - PREFIX_START)
        if not self.virtual_tokens.total:
            raise ConfigurationError(
                "prefix_length and infix_length are 0, so there is nothing to train. Set one, for example "
                "prefix_length=8."
            )

    @property
    def virtual_tokens(self) -> VirtualTokens:
        """The virtual tokens that each sequence needs."""
        return VirtualTokens(prefix=self.prefix_length, infix=self.infix_length)


@strict
@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(_Prefix):
    """Train the embeddings of virtual tokens: the prefix before the prompt, the infix after it (PreEmbed).

    A model of width d gets ``d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    default_rate: ClassVar[float] = 1e-3
    """Peak learning rate. The vectors start small and random. The paper uses 5e-4 (section D.4), with many more
    steps."""

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return the vectors on the input embedding (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, or reads two sequences.
        """
        from lorakit.methods.prefix_modules import embedding_vectors

        return embedding_vectors(model, self.virtual_tokens, dtype, method=type(self).__name__)


@strict
@dataclass(frozen=True, kw_only=True)
class PrefixLayer(_Prefix):
    """Train the hidden states of virtual tokens at the input of every block, including the embeddings (PreLayer).

    Each block's output at the virtual tokens is replaced by trained vectors before the next block. The output of
    the last block is kept, because no other token reads it. So L blocks of width d get
    ``L d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    default_rate: ClassVar[float] = 5e-4
    """Peak learning rate. The paper uses 1e-4 (section D.4), with many more steps."""

    def modules(
        self, model: nn.Module, dtype: torch.dtype | None = None
    ) -> dict[str, AdapterModule]:
        """Return the vectors on the input embedding and on every block but the first (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, reads two sequences, or its blocks
                cannot be identified.
        """
        from lorakit.methods.prefix_modules import block_vectors, embedding_vectors

        tokens, name = self.virtual_tokens, type(self).__name__
        return {
            **embedding_vectors(model, tokens, dtype, method=name),
            **block_vectors(model, tokens, dtype),
        }
