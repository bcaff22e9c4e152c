"""What a run will take, from its configuration alone."""

from lorakit.planning.planner import Memory, Plan, Prediction, plan

__all__ = ["Memory", "Plan", "Prediction", "plan"]
