"""Detect with a pruned model: the .pt alone, or the cfg + weights pair.

python prune_detect.py --weights pruned.pt --cfg pruned.cfg --img 640 --conf 0.7 --source images/
"""

from engine.detect_flags import add_detect_flags, start
from utils.errors import run_script
from utils.flags import Argv, parser


def main(argv: Argv = None) -> None:
    p = parser(__doc__)
    add_detect_flags(p)
    start(p.parse_args(argv))


if __name__ == "__main__":
    run_script(main)
