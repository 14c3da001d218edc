"""Memory of a training run: the main process's peak, epoch by epoch, and its workers apart. Linux only (/proc).

    python benchmarks/memory.py                    # YOLOv5n, 320 px, batch 16, the digits in --cache ram; two cores: about four minutes
    python benchmarks/memory.py --data my.yaml --cache none

Runs train.py, reads VmHWM and VmRSS of its processes twenty times a second, and tells the epochs apart by the rows of results.csv.
Bound: the main process stays under 1.8 GB (10^9 bytes), and flat from the second epoch on: no later epoch's peak is more than 3 %
above the second's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, report

BOUND_GB = 1.8
FLAT = 1.03


def status(pid: int) -> dict[str, float]:
    """VmHWM and VmRSS of a process in GB; empty once it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        key: int(value.split()[0]) * 1024 / 1e9 for key, _, value in (line.partition(":") for line in lines) if key in ("VmHWM", "VmRSS")
    }


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def rows(csv: Path) -> int:
    """Finished epochs."""
    return max(len(csv.read_text().splitlines()) - 1, 0) if csv.exists() else 0


def watch(process: subprocess.Popen, csv: Path, epochs: int) -> tuple[float, list[float], dict[int, float]]:
    """Follow a run to its end; return the main process's peak, its highest RSS in each epoch, and each worker's peak."""
    peak, by_epoch, workers = 0.0, [0.0] * epochs, {}
    while process.poll() is None:
        main = status(process.pid)
        peak = max(peak, main.get("VmHWM", 0.0))
        epoch = rows(csv)
        if epoch < epochs:
            by_epoch[epoch] = max(by_epoch[epoch], main.get("VmRSS", 0.0))
        for child in children(process.pid):
            workers[child] = max(workers.get(child, 0.0), status(child).get("VmRSS", 0.0))
        time.sleep(0.05)
    return peak, by_epoch, workers


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cfg", default="models/yolov5n.yaml")
    p.add_argument("--data", default="data/digits.yaml")
    p.add_argument("--cache", choices=["ram", "disk", "none"], default="ram")
    p.add_argument("--img", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--workers", type=int, default=8)
    args = p.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("memory: needs /proc, so Linux")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--weights", "", "--project", folder, "--name", "run", "--exist-ok"]
        for flag in ("cfg", "data", "img", "batch", "epochs", "workers"):
            command += [f"--{flag}", str(getattr(args, flag))]
        command += [] if args.cache == "none" else ["--cache", args.cache]
        with open(Path(folder) / "log.txt", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            peak, by_epoch, workers = watch(process, Path(folder) / "run" / "results.csv", args.epochs)
        if process.returncode:
            sys.exit("memory: train.py failed:\n" + (Path(folder) / "log.txt").read_text()[-2000:])
    growth = max(by_epoch[2:], default=0.0) / by_epoch[1] if args.epochs > 1 else 1.0
    report(
        "memory",
        f"main process peak {peak:.3f} GB, bound {BOUND_GB}; by epoch {' '.join(f'{gb:.3f}' for gb in by_epoch)} GB, later epochs over the "
        f"second {growth:.3f}, bound {FLAT}; workers {' '.join(f'{gb:.2f}' for gb in workers.values())} GB, shared pages included",
        peak_gb=peak, bound_gb=BOUND_GB, by_epoch_gb=by_epoch, growth=growth, growth_bound=FLAT, workers_gb=list(workers.values()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
