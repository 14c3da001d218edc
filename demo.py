"""The whole path on the shipped digits, by the commands that a user would type: train, sparsify, prune four ways, fine-tune, detect.

    python demo.py            (or `make demo`)

Results go to `runs/demo/`: a folder per step, `table.md`, `results.json` and `demo.png`. A step that is done is not repeated;
delete its folder (or all of `runs/demo`) to run it again.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, run_script
from utils.files import make_folder, write_text
from utils.flags import Argv, parser
from utils.log import LOGGER

ROOT = Path(__file__).resolve().parent
RUNS = Path("runs/demo")
DATA = "--data data/digits.yaml --img 128"
TRAIN = f"{DATA} --batch 16 --cache ram --workers 1 --optimizer AdamW --project {RUNS}"
EPOCHS = {"base": 13, "sparse": 11, "finetune": 5, "distill": 5, "scratch": 10}
MARKERS = ("<!-- demo table: written by `python demo.py --publish` -->", "<!-- end of demo table -->")
AMOUNT = {
    "prune": "--percent 0.6",
    "shortcut_prune": "--percent 0.6",
    "slim_prune": "--global_percent 0.7",
    "slim_prune_8x": "--target-flops 0.5",
}


@dataclass(frozen=True)
class Step:
    """One command, and the folder in `runs/demo` that it writes; a file there shows that it has finished."""

    name: str
    what: str
    command: str

    @property
    def done(self) -> Path:
        return RUNS / self.name / ".done"


def steps() -> list[Step]:
    """Every step of the demo, in order."""
    base, sparse = RUNS / "base/weights/best.pt", RUNS / "sparse/weights/last.pt"
    pair = RUNS / "slim_prune_8x/prune_flops_0.5_keep_0.01_8x_last"
    tuned = f"finetune_pruned.py --weights {pair}.pt --hyp hyp.digits-finetune.yaml"
    penalty = "--hyp hyp.digits-sparse.yaml --sr 0.015 --sr-decay --prune 1"
    return [
        _train("base", "train", "train.py --cfg models/yolov5n.yaml --weights '' --hyp hyp.digits.yaml"),
        _train("sparse", "train sparsely", f"train_sparsity.py --weights {base} {penalty}"),
        *(_prune(name, amount, sparse) for name, amount in AMOUNT.items()),
        _train("finetune", "fine-tune", tuned),
        _train("distill", "fine-tune with distillation", f"{tuned} --distill --t_weight {sparse}"),
        _train("scratch", "train the pruned cfg from scratch", f"train.py --cfg {pair}.cfg --weights '' --hyp hyp.digits.yaml"),
        _detect(RUNS / "distill/weights/best.pt"),
    ]


def _train(name: str, what: str, command: str) -> Step:
    whole = f"{command} --epochs {EPOCHS[name]} --cos-lr {TRAIN} --name {name} --exist-ok"
    return Step(name, what, whole)


def _detect(weights: Path) -> Step:
    source = "--source data/generated/digits/images/val --conf 0.4 --line-thickness 1 --save-txt"
    return Step("detect", "detect", f"prune_detect.py --weights {weights} {source} --project {RUNS} --name detect --exist-ok")


def _prune(name: str, amount: str, weights: Path) -> Step:
    command = f"{name}.py --weights {weights} {amount} {DATA} --project {RUNS} --name {name} --exist-ok"
    return Step(name, f"prune: {name}.py", command)


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    p.add_argument("--publish", action="store_true", help="copy a finished demo's figures and picture into docs/demo and the README")
    if p.parse_args(argv).publish:
        publish()
        return
    started = time.time()
    todo = steps()
    for number, step in enumerate(todo, start=1):
        LOGGER.info(f"\n=== {number}/{len(todo)} {step.what} [{time.time() - started:.0f} s] ===")
        if (ROOT / step.done).exists():
            LOGGER.info(f"done before ({step.done}); delete {step.done.parent} to run it again")
            continue
        LOGGER.info(f"$ python {step.command}")
        code = subprocess.run([sys.executable, *shlex.split(step.command)], cwd=ROOT, check=False).returncode
        if code:
            raise InputError(f"the step {step.name!r} failed with exit code {code}; run it again with: python {step.command}")
        (ROOT / step.done).touch()
    from engine.demo_report import report

    report(ROOT / RUNS, EPOCHS)
    LOGGER.info(f"\nfinished in {time.time() - started:.0f} s; table, pictures and every run are in {RUNS}")


def publish() -> None:
    """Put the table of `runs/demo` into the README, and its results and picture into docs/demo."""
    source, target, readme = ROOT / RUNS, ROOT / "docs" / "demo", ROOT / "README.md"
    if not (source / "results.json").exists():
        raise InputError(f"{RUNS}/results.json is not there; run `make demo` first")
    make_folder(target)
    for name in ("results.json", "demo.png"):
        shutil.copyfile(source / name, target / name)
    before, rest = readme.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    table = (source / "table.md").read_text(encoding="utf-8")
    write_text(readme, f"{before}{MARKERS[0]}\n{table}{MARKERS[1]}{after}")


if __name__ == "__main__":
    run_script(main)
