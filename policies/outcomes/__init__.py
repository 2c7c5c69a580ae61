"""What every model answered to real queries: the format that routers and cascades learn from.

`base` the record, its file format and its table; `importers` published data sets in that format,
`sources` either.
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
from policies.outcomes.sources import load_outcomes

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
