"""Run the benchmarks: `python -m tests.bench [--quick] [--threads N] [NAME ...]`.

Prints a table, and at the end one JSON line that is also kept under results/ (complete runs only).
"""

from __future__ import annotations

import argparse
from importlib import import_module

import torch

from tests.bench.harness import Row, print_row, save

MODULES = ("engine", "overhead", "routing", "budget", "experiments", "metrics")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(MODULES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, small sizes")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides")
    parser.add_argument("--save", action="store_true", help="keep the record of a partial run too")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(MODULES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed are {', '.join(MODULES)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in arguments.names or MODULES:
        try:
            for row in import_module(f"tests.bench.{name}").run(arguments.quick):
                print_row(row)
                rows.append({"bench": name, **row})
        except Exception as error:
            failed[name] = repr(error)
            print(f"FAIL {name}: {error!r}", flush=True)
    if arguments.save or not (arguments.names or arguments.quick):
        save(rows, quick=arguments.quick, **({"failed": failed} if failed else {}))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
