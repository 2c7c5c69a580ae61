"""What people say around a question, which changes nothing about who should answer it.

A router that learned from a field's bare questions, and from everyday requests outside it, takes
"Hello" and "please" for signs of the latter. Copies of both kinds with phrases around them teach it
that they are signs of nothing; the phrases alone, and the clauses of the field's questions that are
unlike it by themselves, tell it small talk from requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Final

_BEFORE: Final = (
    "Hello. ", "Hello, ", "Hello! ", "Hi, ", "Hi! ", "Hi there, ", "Hey, ", "Good morning! ",
    "Good evening, ", "Dear assistant, ", "Excuse me, ", "Sorry to bother you, but ",
    "Quick question. ", "I have a question: ", "One more: ", "OK, and now: ", "Next: ",
    "Can you help me with this? ", "Can you tell me ", "Could you please answer this: ",
    "Please answer: ", "Please tell me: ", "Please help. ", "Help me out here: ", "Please, ",
    "My teacher asked me this: ", "My boss wants to know: ", "I was wondering: ",
    "I would like to know: ", "I need to know this: ", "Here is my question. ",
    "This is the task: ", "Question: ", "Q: ", "Tell me, ", "So, ", "Well, ", "For my homework: ",
    "We had this in class: ", "Let us try this: ", "A small problem: ", "Thanks for before. ",
    "Greetings. ", "Good day! ", "Would you mind telling me: ", "Kindly answer: ",
    "If you do not mind: ", "I would appreciate an answer: ", "It would be nice to know: ",
    "Could I ask you something? ", "My question is this: ", "Here goes: ",
)  # fmt: skip
_AFTER: Final = (
    " Thanks!", " Thanks.", " Thank you!", " Thank you in advance.", " Please.",
    " Please be quick.", " I need this for school.", " I need it today.",
    " This is for my homework.",
    " It is for class.", " My friend wants to know.", " I am not sure about it.",
    " I have to hand it in tomorrow.", " It is urgent.", " Can you help?", " Can you do that?",
    " Any idea?", " What do you think?", " I keep getting it wrong.", " Just the answer, please.",
    " Be brief.", " Do your best.", " Take your time.", " I am curious.", " That would be great.",
    " OK?", " We need it at work.", " Somebody asked me that today.", " Would you know?",
    " Cheers!", " Much obliged.", " It is for my exam.", " There is a test tomorrow.",
    " I would appreciate it.", " Many thanks.", " Have a nice day!", " No hurry.",
)  # fmt: skip
_SHARE_BEFORE, _SHARE_AFTER = 0.65, 0.6

SMALL_TALK: Final = tuple(phrase.strip() for phrase in (*_BEFORE, *_AFTER))
"""The phrases, each by itself."""

# After a mark, at a line's end, and where a word with a capital begins another sentence without a
# mark before; an acronym (USD, PDF) begins none. A comma between the things of a list ("Sort 65,
# 50, 72.") divides nothing: more than one of them must follow, and among them a word.
_BETWEEN_CLAUSES: Final = re.compile(
    r"(?<=[.!?:;])\s+|(?<=,)\s+(?=[^\s,.!?:;]+\s+[^\s,.!?:;])(?=[^,.!?:;]*[^\W\d_])|\n+"
    r"|(?<=[\w'\")])\s+(?=[A-Z][a-z']* [a-z0-9\"'(])"
)


def clauses(text: str) -> list[str]:
    """Return the parts of a text between its marks and lines."""
    return _BETWEEN_CLAUSES.split(text.strip())


def wrapped(texts: Sequence[str], *, seed: int) -> list[str]:
    """Return a copy of each text with phrases before it, after it, or on both sides."""
    rng = random.Random(seed)
    copies = []
    for text in texts:
        place = rng.random()
        before = rng.choice(_BEFORE) if place < _SHARE_BEFORE else ""
        after = rng.choice(_AFTER) if place > 1 - _SHARE_AFTER else ""
        copies.append(before + text + after)
    return copies
