"""Moves the clock that the Python processes of a server under test read.

Python imports this by itself where its folder is on the path. `time.time` is ahead of the machine's
clock by as many seconds as the file says that SHOAL_FAULTS_CLOCK names; it is read again now and
then.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_READ_AGAIN_S = 0.1


class _Clock:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._machine = time.time
        self._ahead_s = 0.0
        self._read_s = -_READ_AGAIN_S

    def time(self) -> float:
        now_s = time.monotonic()
        if now_s - self._read_s > _READ_AGAIN_S:
            self._ahead_s, self._read_s = float(self._file.read_text()), now_s
        return self._machine() + self._ahead_s


if "SHOAL_FAULTS_CLOCK" in os.environ:
    time.time = _Clock(Path(os.environ["SHOAL_FAULTS_CLOCK"])).time
