"""Who may send a request, and how much: API keys, and caps that hold however many replicas serve.

`keys` makes and changes keys and teams, `audit` remembers who did, `authentication` tells who sends
a request. `limits` names what is counted and capped, `book` is the arithmetic of budgets (pure, no
clock, no database), `store` keeps it in the ledger's database, `budgets` is what the ingress calls.

ValueError
├── KeysError           a key or a team that cannot be made or changed as asked
└── CapError            a cap that cannot be read
Exception
├── KeyRejected         a request that may not pass (401, 403)
├── BudgetExhausted     a request that would exceed a cap (429)
└── BudgetUnavailable   the database that holds the budgets does not answer (503)

All carry only positional strings and numbers, so that they survive pickling between processes.
"""
