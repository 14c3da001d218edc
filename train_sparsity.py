"""Train with L1 on the batch norm gammas, so that channels can be pruned afterwards.

    python train_sparsity.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml -sr --scale 0.001 --prune 1
    python train_sparsity.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --st --sr 0.0002 --sr-decay

    python train_sparsity.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --sr 1 --optimizer AdamW --sparsity-method proximal

`--prune 0` leaves shortcut groups alone (for prune.py), `--prune 1` penalises every prunable batch norm (for the other scripts).
"""

import argparse

from engine.options import SPARSITY_METHODS
from engine.train_flags import add_train_flags, start, train_options
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_train_flags(p, epochs=100)
    p.add_argument(
        "--sr", "--scale", "--s", type=float, default=0.001, help="strength, applied to each gamma once per optimizer step; 0: off"
    )
    p.add_argument(
        "--sparsity-method", default=SPARSITY_METHODS[0], choices=SPARSITY_METHODS,
        help="subgradient: the strength goes into the gradient; proximal: soft-thresholding by rate x strength after the step, for true zeros",
    )  # fmt: skip
    p.add_argument("-sr", "--st", "--sparsity-regularization", action="store_true", help=argparse.SUPPRESS)  # always on here
    p.add_argument("--sr-decay", action="store_true", help="let the strength fall linearly to a tenth over the run")
    p.add_argument("--beta-sr", type=float, default=0.0, help="strength of L1 on beta")
    p.add_argument(
        "--prune", type=int, default=1, choices=[0, 1], help="0: leave shortcut groups alone; 1: penalise all prunable batch norms"
    )
    args = p.parse_args(argv)
    same = ("sr", "sr_decay", "beta_sr", "prune", "sparsity_method")
    start(args, train_options(args, strict=True, **{name: getattr(args, name) for name in same}))


if __name__ == "__main__":
    run_script(main)
