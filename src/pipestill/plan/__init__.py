"""Which blocks form which stage, and the plan that a run follows."""

from pipestill.plan.balance import balance
from pipestill.plan.plan import Plan, make_plan

__all__ = ["Plan", "balance", "make_plan"]
