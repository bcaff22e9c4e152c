"""Build the modules of a method without memory for their tensors."""

from __future__ import annotations

from torch import nn
from torch._subclasses import FakeTensorMode

from lorakit.errors import LorakitError
from lorakit.methods.method import Method
from lorakit.methods.module import AdapterModule
from lorakit.models.parameter_swaps import named_base_parameters
from lorakit.ops.seeding import seeded


def fake_modules(method: Method, model: nn.Module) -> dict[str, AdapterModule]:
    """Return the modules that a method adds to a model, with fake tensors: they have a shape and no numbers.

    No random number is drawn. A method of your own that reads the numbers of a weight gets real tensors, with random
    numbers of a seed of its own.

    Raises:
        TargetError: As `Method.modules`.
        ConfigurationError: As `Method.modules`.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return method.modules(model)
    except LorakitError:
        raise
    except Exception:  # fake tensors have no numbers to read
        with seeded(0, (parameter.device for _, _, parameter in named_base_parameters(model))):
            return method.modules(model)
