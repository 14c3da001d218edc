"""The table of docs/architectures.md: size, cost, the pruning oracle at full size, and the Darknet form of every stock yaml.

    python benchmarks/architectures.py                      # all, some minutes; the largest needs 2.4 GB
    python benchmarks/architectures.py yolov3 yolov5s6      # these

Oracle: 40% of the prunable channels, chosen at random, are removed from a network with random gamma and beta and running statistics
estimated on data. `difference` is the largest between the raw float32 logits of the masked and of the pruned network, with constants
folded and not; `bound` is 1e-4 * max(1, largest |logit|); `moved` is how far the mask moved a logit (less than 0.1 would prove nothing).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from models.blocks import Blocks, flops, image_multiple, parameters  # noqa: E402
from models.checkpoint import shapes_of  # noqa: E402
from models.darknet import darknet_obstacles  # noqa: E402
from models.network import Network  # noqa: E402
from models.yaml_reader import read_yaml  # noqa: E402
from pruning.masked import largest_difference, masked_network  # noqa: E402
from pruning.spaces import find_spaces  # noqa: E402
from pruning.surgery import fold_constants, prune  # noqa: E402
from tests.helpers import alive  # noqa: E402
from tests.test_pruning import random_mask  # noqa: E402


def oracle(blocks: Blocks) -> tuple[float, float, float]:
    """(largest difference, its bound, how far the mask moved a logit) of a random mask, folded and not; the worse of the two."""
    side = image_multiple(blocks)
    network, spaces = alive(blocks, size=2 * side), find_spaces(blocks)
    mask, state = random_mask(spaces, 1), network.state_dict()
    images = torch.rand(1, 3, side, 2 * side, generator=torch.Generator().manual_seed(1))
    results = []
    for tensors in (fold_constants(blocks, state, spaces, mask), state):
        masked = masked_network(blocks, tensors, spaces, mask)
        small, small_state = prune(blocks, tensors, spaces, mask)
        pruned = Network(small).eval()
        pruned.load_state_dict(small_state)
        results.append((*largest_difference(masked, pruned, images), largest_difference(network, masked, images)[0]))
    worst = max(results, key=lambda r: r[0] / r[1])
    return worst[0], worst[1], min(moved for *_, moved in results)


def row(path: Path) -> str:
    """One line of the table."""
    blocks = read_yaml(path)
    difference, bound, moved = oracle(blocks)
    if not difference <= bound or moved <= 0.1:
        raise SystemExit(f"{path}: the oracle fails: difference {difference}, bound {bound}, moved {moved}")
    obstacles = darknet_obstacles(blocks)
    darknet = f"no: {obstacles[0].partition(': ')[2]} ({len(obstacles)} blocks)" if obstacles else "yes"
    cells = (f"`{path.relative_to(ROOT)}`", f"{sum(parameters(blocks)):,}", len(shapes_of(blocks)), f"{sum(flops(blocks)) / 1e9:.1f}",
             f"{difference:.1e}", f"{bound:.1e}", f"{moved:.1f}", darknet)  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="stems of yaml files under models/ (default: all)")
    names = parser.parse_args().names
    print("| yaml | parameters | keys | GFLOPs | difference | bound | moved | exact Darknet form |\n|---|--:|--:|--:|--:|--:|--:|---|")
    for folder in (ROOT / "models", ROOT / "models" / "hub"):
        for path in sorted(folder.glob("*.yaml"), key=lambda p: sum(parameters(read_yaml(p)))):
            if not names or path.stem in names:
                print(row(path), flush=True)


if __name__ == "__main__":
    main()
