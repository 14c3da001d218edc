"""Prune channels, strategy 3: a shortcut group keeps every channel that one of its members keeps.

python slim_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --global_percent 0.6 --layer_keep 0.01
"""

from engine.prune_flags import add_global_percent, add_prune_flags, shared
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_global_percent(p, 0.6)
    args = p.parse_args(argv)
    from engine.prune_run import PruneOptions, run
    from pruning.policy import PrunePolicy

    policy = PrunePolicy(args.global_percent, "union", args.layer_keep)
    run(PruneOptions(policy=policy, prefix=f"prune_{args.global_percent:g}_keep_{args.layer_keep:g}_", **shared(args)))


if __name__ == "__main__":
    run_script(main)
