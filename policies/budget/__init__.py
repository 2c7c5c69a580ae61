"""The budget controller: how much quality a request deserves at today's price.

`targets` what may be spent, `pace` how much of it falls to the next request, `prices` the dual
prices that meet it, `candidates` the plans to choose from, `controller` the choice.
"""

from policies.budget.controller import Controller
from policies.budget.targets import Target

__all__ = ["Controller", "Target"]
