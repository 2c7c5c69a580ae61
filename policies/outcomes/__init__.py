"""What every model answered to real queries: the format that routers and cascades learn from.

`base` the record, its file format and its table; `importers` reads that or a published data set.
"""

from policies.outcomes.base import (
    AnswerLogprobs,
    Outcome,
    ScoreTable,
    content_sha256,
    read_outcomes,
    score_table,
    write_outcomes,
)
from policies.outcomes.importers import load_outcomes

__all__ = [
    "AnswerLogprobs",
    "Outcome",
    "ScoreTable",
    "content_sha256",
    "load_outcomes",
    "read_outcomes",
    "score_table",
    "write_outcomes",
]
