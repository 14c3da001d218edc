"""Prune channels, strategy 2: in a shortcut group the first member's mask rules the others.

python shortcut_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --percent 0.6
"""

from engine.prune_flags import add_percent, add_prune_flags, shared
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_percent(p, 0.6)
    args = p.parse_args(argv)
    from engine.prune_run import PruneOptions, run
    from pruning.policy import PrunePolicy

    policy = PrunePolicy(args.percent, shortcuts="first")
    run(PruneOptions(policy=policy, prefix=f"prune_{args.percent:g}_", **shared(args)))


if __name__ == "__main__":
    run_script(main)
