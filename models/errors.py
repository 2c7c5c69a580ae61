"""What can go wrong with pools, checkpoints, training and engines.

ValueError
├── PoolError             a pool file or checkpoint that cannot be used
├── TrainingDiverged      a loss that is not finite
├── DownscaleError        anything that the user of `shoal downscale` can put right
│   ├── RecipeError       a recipe with a bad key or value
│   ├── CorpusError       a corpus that is missing, empty, too small or of another shape
│   ├── BaseError         a base checkpoint that cannot be cut (architecture, tokenizer, size)
│   ├── OutputError       an output folder that is in use, or a disk with too little room
│   └── DivergedError     training whose loss is no longer a number
└── RequestError          a request that this engine cannot run as asked (the client's fault)
    └── ContextOverflow   prompt plus answer do not fit the model's context
RuntimeError
└── EngineError           the engine's fault, another engine may do better
    ├── EngineOverloaded  the queue is full; carries when to come back
    └── EngineFailed      the engine died or could not run the step

All carry only positional strings and numbers, so that they survive pickling between processes.
What somebody else said is `quoted` in them: it may repeat a prompt, so that it is for who asked.
"""

from __future__ import annotations

import re


def quoted(text: str) -> str:
    """Return what somebody else said, as part of a message."""
    return "“" + text.replace("”", '"') + "”"


def without_quotes(message: str) -> str:
    """Return a message as it may be logged and kept."""
    return re.sub("“[^”]*”", "“...”", message)


class PoolError(ValueError):
    """A pool file that cannot be used: names the key, the value and what is allowed."""


class TrainingDiverged(ValueError):
    """The loss of a training step is not finite."""

    def __init__(self, step: int, loss: float, learning_rate: float) -> None:
        super().__init__(step, loss, learning_rate)
        self.step = step

    def __str__(self) -> str:
        step, loss, rate = self.args
        return (
            f"the loss is {loss} at step {step}: nothing was updated and the last checkpoint "
            f"stays; try a learning_rate below {rate:g}, or look for broken examples"
        )


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


class RequestError(ValueError):
    """A request the engine refuses; `param` names the OpenAI field that is at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class ContextOverflow(RequestError):
    """Prompt plus requested output exceed the context length."""


class EngineError(RuntimeError):
    """An engine could not answer; not the client's fault."""


class EngineOverloaded(EngineError):
    """The engine's queue is full. `retry_after_s` is a guess at when it won't be."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class EngineFailed(EngineError):
    """The engine died, or a step failed."""
