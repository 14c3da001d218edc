"""How long the cut itself takes: spaces, selection, surgery and saving of the pair, for YOLOv5l at 80 classes. Bound: 3 s.

    python benchmarks/prune_time.py                      # a few seconds
    python benchmarks/prune_time.py --cfg yolov5x --repeats 3

Half of the channels go, by the policy of `slim_prune_8x.py`, with random gammas. Building the network and evaluating it are not part of it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import in_turns, report

import torch  # isort: skip

from models.blocks import Blocks, parameters
from models.cfg import write_cfg
from models.checkpoint import Model, read_structure, save_model
from models.network import Network
from pruning.criteria import gamma_scores
from pruning.policy import PrunePolicy, select_masks
from pruning.spaces import find_spaces
from pruning.surgery import State, fold_constants, prune
from utils.files import write_text

BOUND = 3.0
PARTS = ("spaces", "selection", "surgery", "saving")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cfg", default="yolov5l", help="a model yaml of models/, by its stem")
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    blocks = read_structure(f"{args.cfg}.yaml", 80)
    state = with_random_gammas(blocks)
    with tempfile.TemporaryDirectory() as folder:
        runs = in_turns({"run": lambda: seconds_of_parts(blocks, state, Path(folder))}, args.repeats)["run"]
    parts = {part: round(statistics.median(run[part] for run in runs), 3) for part in PARTS}
    total = statistics.median(sum(run.values()) for run in runs)
    listed = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
    report(
        "prune_time", f"{args.cfg}, {sum(parameters(blocks)):,} parameters: {total:.2f} s ({listed}), bound {BOUND:g} s",
        total=round(total, 3), parts=parts, bound=BOUND, repeats=args.repeats,
    )  # fmt: skip


def with_random_gammas(blocks: Blocks) -> State:
    """The tensors of a fresh network whose gammas differ, so that there is something to rank."""
    torch.manual_seed(0)
    network = Network(blocks)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    return network.state_dict()


def seconds_of_parts(blocks: Blocks, state: State, folder: Path) -> dict[str, float]:
    """Prune once; the seconds that each of `PARTS` took."""
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[part] = time.perf_counter() - start
        return result

    def saved() -> None:
        write_text(folder / "pair.cfg", write_cfg(small))
        save_model(folder / "pair.pt", Model(small, small_state, tuple(f"class{i}" for i in range(80))))

    spaces = timed("spaces", lambda: find_spaces(blocks))
    policy = PrunePolicy(0.5, "union", 0.01, 8)
    mask = timed("selection", lambda: select_masks(spaces, gamma_scores(blocks, state), policy)).mask
    small, small_state = timed("surgery", lambda: prune(blocks, fold_constants(blocks, state, spaces, mask), spaces, mask))
    timed("saving", saved)
    return seconds


if __name__ == "__main__":
    main()
