"""Prune channels as slim_prune.py does, with every convolution's filters a multiple of 8, which hardware likes best.

python slim_prune_8x.py --weights runs/train/exp/weights/last.pt --data data/mine.yaml --global_percent 0.6 --layer_keep 0.01
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
    p.add_argument("--divisor", type=int, default=8, help="kept filters are a multiple of this, or the whole width")
    args = p.parse_args(argv)
    start(args, STRATEGY, args.layer_keep, args.divisor)


if __name__ == "__main__":
    run_script(main)
