"""Prefix methods: the vectors of virtual tokens around the prompt are trained (Hu et al. 2021, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.configuration import conform
from lorakit.errors import ConfigurationError, TargetError
from lorakit.methods.module import AdapterModule
from lorakit.methods.trained import as_names, modules_named, parameters_below
from lorakit.methods.virtual_tokens import (
    INFIX_START,
    PREFIX_START,
    VirtualPositions,
    VirtualTokens,
)
from lorakit.models.blocks import stacks

INIT_STD = 0.02
"""Standard deviation of the vectors at the start, as in the first release of the paper's code."""


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
        return parameters_below(model, modules_named(model, self.train_modules))


@dataclass(frozen=True, kw_only=True)
class PrefixEmbedding(_Prefix):
    """Train the embeddings of virtual tokens: the prefix before the prompt, the infix after it (PreEmbed).

    Of width d they are ``d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    def modules(
        self, model: nn.Module, dtype: torch.dtype = torch.float32
    ) -> dict[str, AdapterModule]:
        """The vectors, on the input embedding (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, or reads two sequences.
        """
        path, table = _embedding(model, type(self).__name__)
        options = {"device": table.weight.device, "dtype": dtype}
        return {path: EmbeddingVectors(self.virtual_tokens, table.embedding_dim, options)}


@dataclass(frozen=True, kw_only=True)
class PrefixLayer(_Prefix):
    """Train the vectors with which virtual tokens enter every block, the embedding included (PreLayer).

    What a block made of them is replaced before the next: they depend on no input. What leaves the last block is
    read by no other token and stays. So L blocks of width d take ``L d (prefix_length + infix_length)`` parameters.

    Raises:
        ConfigurationError: A length is below 0, or both are 0.
    """

    def modules(
        self, model: nn.Module, dtype: torch.dtype = torch.float32
    ) -> dict[str, AdapterModule]:
        """The vectors, on the input embedding and on every block but the first (see `Method`).

        Raises:
            TargetError: The model has no table of token embeddings, reads two sequences, or its blocks
                cannot be told.
        """
        path, table = _embedding(model, type(self).__name__)
        tokens, width = self.virtual_tokens, model.config.get_text_config().hidden_size  # type: ignore[union-attr]
        options = {"device": table.weight.device, "dtype": dtype}
        modules: dict[str, AdapterModule] = {
            path: EmbeddingVectors(tokens, table.embedding_dim, options)
        }
        for block in _blocks(model)[1:]:
            device = next(model.get_submodule(block).parameters()).device
            modules[block] = BlockVectors(tokens, width, {"device": device, "dtype": dtype})
        return modules


class VirtualVectors(AdapterModule):
    """The vectors of all virtual tokens at one place of the model.

    Args:
        tokens: How many there are; the prefix comes first.
        width: Width d of the hidden states, shape (B, T, d).
        options: Device and dtype of the tensor.
    """

    scales = merges = False

    def __init__(self, tokens: VirtualTokens, width: int, options: dict) -> None:
        super().__init__()
        self.tokens = tokens
        self.vectors = nn.Parameter(torch.empty(tokens.total, width, **options))
        nn.init.normal_(self.vectors, std=INIT_STD)

    def put(self, hidden: Tensor, at: VirtualPositions) -> Tensor:
        """Return `hidden` with our vectors at the virtual tokens of `at`, in the dtype of `hidden`."""
        return at.put(hidden, self.vectors, self.tokens.prefix)

    def extra_repr(self) -> str:
        return (
            f"prefix {self.tokens.prefix}, infix {self.tokens.infix}, width {self.vectors.shape[1]}"
        )


class EmbeddingVectors(VirtualVectors):
    """Vectors that take the place of what the layer gives out: on the input embedding."""


class BlockVectors(VirtualVectors):
    """Vectors that take the place of what the layer is given: on a block."""


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


def _embedding(model: nn.Module, method: str) -> tuple[str, nn.Embedding]:
    """Path and module of the table that turns ids into the vectors of the only sequence the model reads."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{name} reads one sequence and writes another, and {method} is for models with one sequence. Use an "
            "encoder, a decoder, or another method."
        )
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(table, nn.Embedding):
        raise TargetError(
            f"{name} has no table of token embeddings, beside whose rows {method} could put vectors of its own. Use "
            "a text model of transformers, or another method."
        )
    if table.num_embeddings > PREFIX_START:
        raise TargetError(
            f"The vocabulary of {name} has {table.num_embeddings:,} entries, and the ids of virtual tokens begin at "
            f"{PREFIX_START:,}."
        )
    return next(path for path, module in model.named_modules() if module is table), table


def _blocks(model: nn.Module) -> list[str]:
    """The paths of the model's blocks, in order."""
    found = list(stacks(model).values())
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr]
    if len(found) != 1 or len(found[0]) != expected:
        raise TargetError(
            f"{type(model).__name__} has no single list of its {expected} blocks, so that PrefixLayer cannot tell "
            "where to put vectors. PrefixEmbedding needs the embedding alone."
        )
    return found[0]
