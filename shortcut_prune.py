"""Prune channels, strategy 2: in a shortcut group the first member's mask rules the others.

python shortcut_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --percent 0.6
"""

from engine.prune_flags import Strategy, add_channel_flags, add_prune_flags, start
from utils.errors import run_script
from utils.flags import Argv, parser

STRATEGY = Strategy(0.6, "first")


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_channel_flags(p, STRATEGY)
    start(p.parse_args(argv), STRATEGY)


if __name__ == "__main__":
    run_script(main)
