"""Whether an answer equals a label, for servers that keep no text.

The ledger keeps a short keyed hash of the normalised answer instead. It is not a secret: who has
the ledger can test guesses against it, and short answers are easily guessed.
"""

from __future__ import annotations

from hashlib import blake2b

from policies.cascade.base import normalise


def answer_digest(request_id: str, text: str) -> str:
    """Return 16 hexadecimal digits that stand for `text`, but for case, spacing and closing marks.

    Keyed by the request, so that equal answers to different requests do not look equal.
    """
    key = blake2b(request_id.encode(), digest_size=32).digest()
    return blake2b(normalise(text).encode(), key=key, digest_size=8).hexdigest()
