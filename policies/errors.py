"""What can go wrong while deciding.

ValueError
└── PolicyError          anything a user can get wrong here
    ├── PlanError        a plan that cannot be read or makes no sense
    ├── LawError         measurements a law cannot be fitted to, or a value outside its range
    ├── CarbonError      an unknown zone, region or device, or a table that cannot be read
    ├── OutcomesError    a data file with a bad line (names file and line)
    ├── ArtifactError    a file of something learned that cannot be read (names the file)
    └── ExperimentError  an experiment that cannot be run, changed or estimated as asked
"""


class PolicyError(ValueError):
    """A policy, router file or setting that cannot be used; the message says which and why."""


class PlanError(PolicyError):
    """A plan that cannot be read: names the key, the value and what is allowed."""


class OutcomesError(PolicyError):
    """An outcomes file with a bad line: names the file, the line and the key."""


class ArtifactError(PolicyError):
    """A file of something learned that cannot be read: names the file and what is wrong."""


class ExperimentError(PolicyError):
    """An experiment's setting, or a question its data cannot answer: says which and why."""


class LawError(PolicyError):
    """Measurements a law cannot be fitted to, or a value outside a law's range."""


class CarbonError(PolicyError):
    """An unknown zone, region or device, or a table that cannot be read: says what is allowed."""
