"""How long `--help` takes, start of Python included. Bound: 1 s for train.py and detect.py.

python benchmarks/help_time.py                 # every script; a few seconds
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from common import ROOT, in_turns, report

BOUND = 1.0


def help_seconds(script: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, script, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("scripts", nargs="*", default=sorted(path.name for path in ROOT.glob("*.py")), help="default: all in the root")
    args = p.parse_args()
    seconds = in_turns({script: (lambda s=script: help_seconds(s)) for script in args.scripts}, args.repeats)
    medians = {script: round(statistics.median(values), 3) for script, values in seconds.items()}
    slowest = max(medians, key=medians.get)
    report(
        "help_time", f"slowest median {medians[slowest]:.2f} s ({slowest}), bound {BOUND:g} s",
        seconds=medians, bound=BOUND, repeats=args.repeats,
    )  # fmt: skip


if __name__ == "__main__":
    main()
