"""Predict the memory and time of a training run from its configuration."""

from lorakit.planning.planner import Memory, Plan, Prediction, plan

__all__ = ["Memory", "Plan", "Prediction", "plan"]
