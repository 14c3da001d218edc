"""Prune channels, strategy 3: a shortcut group keeps every channel that one of its members keeps.

python slim_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --global_percent 0.6 --layer_keep 0.01
python slim_prune.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --target-flops 0.5 --criterion taylor --recalibrate 16
"""

from engine.prune_flags import Strategy, add_channel_flags, add_layer_keep, add_prune_flags, start
from utils.errors import run_script
from utils.flags import Argv, parser

STRATEGY = Strategy(0.6)


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_prune_flags(p)
    add_channel_flags(p, STRATEGY, ("--global_percent", "--percent"))
    add_layer_keep(p)
    args = p.parse_args(argv)
    start(args, STRATEGY, args.layer_keep)


if __name__ == "__main__":
    run_script(main)
