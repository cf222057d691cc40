"""What a run would be: sizes, traffic, memory and files, counted without its weights."""

from pfl_lm.plan.plan import ClientPlan, Plan, make_plan

__all__ = ["ClientPlan", "Plan", "make_plan"]
