"""Everyday requests: what people ask an assistant, which no chunk of the default pool knows.

Facts have answers that can be checked; for the rest an answer counts as usable if it has words and
does not go round in circles. That is a low bar, and meant as one: it tells an assistant from a
calculator, not good advice from bad.

A subject belongs to one split, whatever is asked of it, so that what a router learns on some is
tested on others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from models.tasks.base import Split

_CAPITALS: Final = {
    "France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Greece": "Athens", "Egypt": "Cairo", "China": "Beijing",
    "Russia": "Moscow", "Canada": "Ottawa", "Austria": "Vienna", "Sweden": "Stockholm",
    "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw",
    "Hungary": "Budapest", "Ireland": "Dublin", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Kenya": "Nairobi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Mexico": "Mexico City",
    "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Australia": "Canberra",
}  # fmt: skip
_CAPITAL: Final = ("What is the capital of {}?", "capital of {}", "Which city is {}'s capital?")
_FACTS: Final = {
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who wrote Hamlet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo|Vinci",
    "Who discovered penicillin?": "Fleming",
    "Who was the first man on the moon?": "Armstrong",
    "Who was the first president of the United States?": "Washington",
    "Who developed the theory of relativity?": "Einstein",
    "Who invented the telephone?": "Bell",
    "Which planet is closest to the sun?": "Mercury",
    "Which planet is known as the red planet?": "Mars",
    "What is the largest planet of the solar system?": "Jupiter",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the longest river in Africa?": "Nile",
    "What is the highest mountain in the world?": "Everest",
    "What is the largest animal on Earth?": "whale",
    "What is the fastest land animal?": "cheetah",
    "How many legs does a spider have?": "8|eight",
    "How many days are in a leap year?": "366",
    "How many continents are there?": "7|seven",
    "What colour is the sky on a clear day?": "blue",
    "What colour do you get from blue and yellow?": "green",
    "What is the chemical symbol of gold?": "Au",
    "What is the chemical formula of water?": "H2O|H₂O",
    "What gas do plants take in?": "carbon dioxide|CO2|CO₂",
    "What gas do we need to breathe?": "oxygen",
    "At what temperature does water boil?": "100|212",
    "At what temperature does water freeze?": "0|32|zero",
    "What language is spoken in Brazil?": "Portuguese",
    "What language do people speak in Austria?": "German",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United Kingdom?": "pound",
    "In which country are the pyramids of Giza?": "Egypt",
    "In which city is the Eiffel Tower?": "Paris",
    "In which country is the Great Wall?": "China",
    "Which season comes after winter?": "spring",
    "What do bees make?": "honey",
    "What do cows drink when they are grown?": "water",
    "What is frozen water called?": "ice",
    "What is the opposite of hot?": "cold",
    "What is the opposite of day?": "night",
    "What is a baby dog called?": "puppy",
    "What is a baby cat called?": "kitten",
    "Which organ pumps blood through the body?": "heart",
    "Which metal is liquid at room temperature?": "mercury",
    "What is the nearest star to Earth?": "sun",
    "Who is the author of Harry Potter?": "Rowling",
    "Which instrument has 88 keys?": "piano",
    "What is the main ingredient of bread?": "flour",
    "What is the main ingredient of guacamole?": "avocado",
    "Which sport is played at Wimbledon?": "tennis",
}

# What is asked of a subject; the first group of topics, then those who are written to.
_EXPLAIN: Final = (
    "What is {}?", "Explain {} in simple words.", "Tell me about {}.", "Why is {} important?",
    "what is {} and how does it work", "Give me three facts about {}.",
    "Can you explain {} to a child?", "Write a short paragraph about {}.",
)  # fmt: skip
_TOPICS: Final = (
    "photosynthesis", "gravity", "electricity", "democracy", "inflation", "evolution",
    "climate change", "the immune system", "artificial intelligence", "machine learning",
    "the water cycle", "a volcano", "an earthquake", "a rainbow", "the internet", "a computer",
    "solar energy", "wind power", "recycling", "biodiversity", "a healthy diet", "sleep",
    "exercise", "meditation", "stress", "vitamin C", "the heart", "the brain", "memory",
    "music", "poetry", "chess", "football", "yoga", "the Roman Empire", "the Renaissance",
    "the French Revolution", "the Industrial Revolution", "the moon", "a black hole", "the sun",
    "a comet", "an atom", "a cell", "DNA", "a vaccine", "a battery", "an engine", "a bank",
    "a contract", "insurance", "a budget", "marketing", "a startup", "open source", "encryption",
    "coffee", "chocolate", "bread", "the ocean",
)  # fmt: skip
_MEANING: Final = (
    "What's {}?", "What does {} mean?", "What's the point of {}?",
    "What's the difference between {} and everything else?",
)  # fmt: skip
_NOTIONS: Final = (
    "irony", "karma", "GDP", "a mortgage", "RSVP", "NATO", "a leap of faith", "inertia",
    "a metaphor", "a firewall", "an API", "a deadline", "gluten", "the stock market", "jet lag",
    "osmosis", "a browser cookie", "the Big Bang", "a pronoun", "overtime", "compound interest",
    "a podcast", "tax evasion", "a palindrome",
)  # fmt: skip
_COUNTED: Final = (
    "How many {} are there in the world?", "How many {} do I need?", "how many {} can one have",
    "What is my {} called?", "What time is it in {}?", "What should I know about {}?",
)  # fmt: skip
_COUNTABLE: Final = (
    "countries", "oceans", "hours of sleep", "eggs", "friends", "languages", "moons", "teeth",
    "players", "states", "dog", "sister", "street", "New York", "Sydney", "Moscow", "my bank",
)  # fmt: skip
_HOW: Final = (
    "How do I {}?", "What is the best way to {}?", "Can you tell me how to {}?",
    "how can i {}", "I want to {}. Where do I start?", "Give me some tips to {}.",
)  # fmt: skip
_DOINGS: Final = (
    "boil an egg", "make tea", "bake bread", "learn a language", "sleep better", "save money",
    "lose weight", "get fit", "write a book", "find a job", "prepare for an interview",
    "grow tomatoes", "train a dog", "clean a window", "fix a bicycle", "learn to cook",
    "make new friends", "stay focused", "reduce stress", "plan a trip", "learn the guitar",
    "start a garden", "remove a stain", "choose a laptop", "quit smoking", "speak in public",
    "study for an exam", "get up early", "make a good coffee", "take better photos",
)  # fmt: skip
_WRITE: Final = (
    "Write two sentences to {} asking for a day off.",
    "Write a short email to {} to say thank you.",
    "Write a birthday greeting for {}.", "Help me apologise to {} for being late.",
    "Write a friendly message to {}.", "Draft an invitation for {} to a dinner on Saturday.",
    "write a note to {} saying that i am ill",
)  # fmt: skip
_PEOPLE: Final = (
    "my boss", "my friend", "my mother", "my neighbour", "my teacher", "a colleague",
    "my landlord", "a customer", "my sister", "my team", "my doctor", "my grandfather",
)  # fmt: skip
_CHAT: Final = (
    "Hello!", "Hi, how are you?", "Good morning!", "hey there", "Who are you?", "What can you do?",
    "Can you help me?", "Thank you very much!", "Tell me a joke.",
    "Tell me a story about a dragon.",
    "Tell me something interesting.", "I feel sad today.", "I am bored. What should I do?",
    "What should I cook tonight?", "Recommend a good book.", "What is your favourite colour?",
    "Do you like music?", "What is the meaning of life?", "Give me advice.", "Good night!",
    "Write a poem about the sea.", "Write a haiku about autumn.",
    "Write a short story about a cat.",
    "Suggest a name for my dog.", "What do you think about the weather?", "Surprise me.",
    "Let's talk about films.", "How was your day?", "Are you a human?", "Say something nice.",
    "Which pet should I get?", "What makes a good friend?", "Why do people dream?",
    "Is it healthy to drink coffee every day?", "What should I wear to a wedding?",
    "Should I learn Python or Java?", "Plan a weekend in Rome for me.", "Where is my phone?",
    "Summarise the story of Cinderella.", "What are the pros and cons of living in a city?",
)  # fmt: skip

_WORD: Final = re.compile(r"[^\W\d_]{2,}")
_LEAST_WORDS: Final = 4
_LOOP_WORDS: Final = 4
_MOST_REPEATED: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class Everyday:
    """One request. `accepted` are texts of which a right answer has one; none where any will do."""

    text: str
    kind: str
    split: Split
    accepted: tuple[str, ...] = ()

    def grade(self, answer: str) -> float:
        """Return 1 for a right or usable answer, else 0."""
        if self.accepted:
            return float(any(_mentions(answer, text) for text in self.accepted))
        return float(usable(answer))


def usable(answer: str) -> bool:
    """Return whether an answer has words and does not go round in circles."""
    words = _WORD.findall(answer.lower())
    runs = list(zip(*(words[i:] for i in range(_LOOP_WORDS)), strict=False))
    repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
    return len(words) >= _LEAST_WORDS and repeated <= _MOST_REPEATED


def everyday() -> Iterator[Everyday]:
    """Yield all requests, always the same in the same order."""
    for country, capital in _CAPITALS.items():
        split = _split(country)
        for form in _CAPITAL:
            yield Everyday(
                text=form.format(country), kind="facts", split=split, accepted=(capital,)
            )
    for question, answer in _FACTS.items():
        accepted = tuple(answer.split("|"))
        yield Everyday(text=question, kind="facts", split=_split(question), accepted=accepted)
    for kind, forms, subjects in (
        ("explain", _EXPLAIN, _TOPICS),
        ("meaning", _MEANING, _NOTIONS),
        ("counting", _COUNTED, _COUNTABLE),
        ("how", _HOW, _DOINGS),
        ("write", _WRITE, _PEOPLE),
        ("chat", ("{}",), _CHAT),
    ):
        for subject in subjects:
            for form in forms:
                yield Everyday(text=form.format(subject), kind=kind, split=_split(subject))


def _split(subject: str) -> Split:
    """Return where a subject belongs: a third of them to the test."""
    digest = hashlib.blake2b(subject.encode(), digest_size=8).digest()
    return Split.TEST if int.from_bytes(digest, "big") % 3 == 0 else Split.ROUTER


def _mentions(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) is not None
