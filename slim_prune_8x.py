"""Prune channels as slim_prune.py does, with every convolution's filters a multiple of 8, which hardware likes best.

python slim_prune_8x.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --global_percent 0.6 --layer_keep 0.01
"""

from engine.prune_flags import add_global_percent, add_prune_flags, shared
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_global_percent(p, 0.6)
    p.add_argument("--divisor", type=int, default=8, help="kept filters are a multiple of this, or the whole width")
    args = p.parse_args(argv)
    from engine.prune_run import PruneOptions, run
    from pruning.policy import PrunePolicy

    policy = PrunePolicy(args.global_percent, "union", args.layer_keep, args.divisor)
    run(PruneOptions(policy=policy, prefix=f"prune_{args.global_percent:g}_keep_{args.layer_keep:g}_{args.divisor}x_", **shared(args)))


if __name__ == "__main__":
    run_script(main)
