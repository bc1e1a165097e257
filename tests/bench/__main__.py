"""
How long Docker's commands take on pynet, beside Docker's own drivers; how fast traffic is.

All is measured in labs of its own, on dockerd's API. A number is a median, with the
quartiles beside it; what is compared takes turns. Nothing here passes or fails by a
time: a person reads the ratios. All samples are kept as JSON.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.bench import calls, scale, traffic  # noqa: F401  they register rows
from tests.bench.labs import Context
from tests.bench.measure import ROWS, play

ROUNDS, QUICK_ROUNDS = 20, 5


def main() -> int:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the short rows, few times"
    )
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--dockerd", default="dockerd", help="another dockerd's path")
    parser.add_argument("--rows", default="", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="where all samples are kept")
    given = parser.parse_args()
    names = given.rows.replace(",", " ").split()
    unknown = set(names) - ROWS.keys()
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    if names:
        rows = [ROWS[name] for name in names]
    else:
        rows = [one for one in ROWS.values() if one.quick or not given.quick]
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    file = given.json or Path("build/bench", f"{stamp}.json")
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    with Context(dockerd=given.dockerd, rounds=rounds, quick=given.quick) as context:
        return 1 if play(rows, context, file) == len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
