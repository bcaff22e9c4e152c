"""Tensor functions that do not depend on models or adapters."""
