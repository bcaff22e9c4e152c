"""The store of adapters: identity by content, leases, the byte budget, and what is refused."""

from __future__ import annotations

import builtins
import gc
import io
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.random_adapters import randomise
from tests.tiny_models import PAD, build
from tests.tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.adapters import handle_of
from lorakit.errors import (
    AdapterFileError,
    AdapterStateError,
    LorakitError,
    WrongBaseError,
)
from lorakit.methods.method import Method
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource
from lorakit.serving.errors import StoreFullError, UnknownAdapterError
from lorakit.serving.store import AdapterLease, AdapterStore

LORA = lorakit.LoRA(rank=2, alpha=4, targets="attention.qv")
LARGE = 10**9
IDS = torch.tensor([[5, 6, 7, 8]])
