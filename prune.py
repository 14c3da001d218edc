"""Prune channels, strategy 1: shortcut groups stay whole, the rest is ranked together.

python prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --percent 0.5
"""

from engine.prune_flags import add_percent, add_prune_flags, shared
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_percent(p, 0.5)
    args = p.parse_args(argv)
    from engine.prune_run import PruneOptions, run
    from pruning.policy import PrunePolicy

    policy = PrunePolicy(args.percent, shortcuts="keep")
    run(PruneOptions(policy=policy, prefix=f"prune_{args.percent:g}_", **shared(args)))


if __name__ == "__main__":
    run_script(main)
