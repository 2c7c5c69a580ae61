"""What can go wrong while deciding.

ValueError
└── PolicyError          anything a user can get wrong here
    ├── PlanError        a plan that cannot be read or makes no sense
    └── OutcomesError    a data file with a bad line (names file and line)
"""


class PolicyError(ValueError):
    """A policy, router file or setting that cannot be used; the message says which and why."""


class PlanError(PolicyError):
    """A plan that cannot be read: names the key, the value and what is allowed."""


class OutcomesError(PolicyError):
    """An outcomes file with a bad line: names the file, the line and the key."""
