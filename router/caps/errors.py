"""What can go wrong with budgets.

ValueError
└── CapError            a cap that cannot be read
RuntimeError
├── BudgetExhausted     a request that would exceed a cap (429)
└── BudgetUnavailable   the database that holds the budgets does not answer (503)

All carry only positional strings and numbers, so that they survive pickling between processes.
"""


class CapError(ValueError):
    """A cap that cannot be read: names the key, the value and what is allowed."""


class BudgetExhausted(RuntimeError):
    """A request that does not fit a budget.

    `final` is True when the budget is spent, so that asking again before `reset_s` (Unix time)
    is useless: 429 with `x-should-retry: false`. False when requests in flight hold what is
    left: asking again in a moment is right. `headers` are the x-ratelimit headers.
    """

    def __init__(
        self, message: str, cap: str, reset_s: float, final: bool, headers: dict[str, str]
    ) -> None:
        super().__init__(message, cap, reset_s, final, headers)
        self.message = message
        self.cap = cap
        self.reset_s = reset_s
        self.final = final
        self.headers = headers

    def __str__(self) -> str:
        return self.message


class BudgetUnavailable(RuntimeError):
    """Budgets cannot be checked now; a capped request is refused rather than left uncounted."""
