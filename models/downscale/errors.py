"""What can go wrong while downscaling.

ValueError
└── DownscaleError       anything that the user can put right; the message says what and how
    ├── RecipeError      a recipe with a bad key or value
    ├── CorpusError      a corpus that is missing, empty, too small or of another shape
    ├── BaseError        a base checkpoint that cannot be cut (architecture, tokenizer, size)
    ├── OutputError      an output folder that is in use, or a disk with too little room
    └── DivergedError    training whose loss is no longer a number
"""


class DownscaleError(ValueError):
    """A downscaling run that cannot go on as asked."""


class RecipeError(DownscaleError):
    """A recipe that cannot be used: names the file, the key, the value and what is allowed."""


class CorpusError(DownscaleError):
    """A corpus that cannot be used: names the file and, where there is one, the line."""


class BaseError(DownscaleError):
    """A base checkpoint that cannot be cut, or a size that it cannot be cut to."""


class OutputError(DownscaleError):
    """An output folder that already holds a run, or a disk with too little room."""


class DivergedError(DownscaleError):
    """Training stopped because the loss was not finite; the last good checkpoint is kept."""
