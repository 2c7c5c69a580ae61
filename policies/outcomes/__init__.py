"""What every model answered to real queries: the format that routers and cascades learn from.

`base` the record, its file format and its table; `importers` published data sets in that format.
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

__all__ = [
    "AnswerLogprobs",
    "Outcome",
    "ScoreTable",
    "content_sha256",
    "read_outcomes",
    "score_table",
    "write_outcomes",
]
