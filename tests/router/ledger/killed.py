"""A process that records until it is killed; run as a script, it writes out each id it recorded."""

import logging
import sys
import time

from router.ledger.database import open_database
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from tests.router.ledger.records import record

if __name__ == "__main__":
    ledger = Ledger(
        open_database(sys.argv[1]),
        flush_interval_s=float(sys.argv[2]),
        count=count_rows,
        logger=logging.getLogger("killed"),
    )
    number = 0
    while True:
        ledger.record(record(number))
        sys.stdout.write(f"req-{number}\n")
        sys.stdout.flush()
        number += 1
        time.sleep(0.001)
