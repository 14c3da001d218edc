"""Prune in depth: remove whole bottlenecks, those whose last convolution (the one whose batch norm feeds the add) has the lowest mean |gamma|.

python layer_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --shortcuts 2
python layer_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --shortcuts 3 --exclude model.2 --recalibrate 16

x + f(x) becomes x plus the constant that f gives once its last gammas are zero, folded into what reads it. Bottlenecks without a shortcut stay.
It goes together with channel pruning, in either order.
"""

from engine.prune_flags import add_prune_flags, shared
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    p.add_argument("--shortcuts", type=int, default=2, metavar="K", help="number of bottlenecks with a shortcut to remove")
    args = p.parse_args(argv)
    from engine.depth_run import run
    from engine.prune_run import PruneOptions

    run(PruneOptions(prefix=f"prune_{args.shortcuts}_shortcut_", **shared(args)), args.shortcuts)


if __name__ == "__main__":
    run_script(main)
