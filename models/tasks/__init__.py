"""Task domains with exactly checkable short answers: data for training, routing and evaluation."""

from models.tasks.base import Domain, Draft, Skill, Split, Task, check, normalise, split_of
from models.tasks.registry import DOMAINS, domain

__all__ = [
    "DOMAINS",
    "Domain",
    "Draft",
    "Skill",
    "Split",
    "Task",
    "check",
    "domain",
    "normalise",
    "split_of",
]
