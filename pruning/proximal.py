"""Sparsity training by proximal steps: soft-thresholding of the gammas after the optimizer's step (ISTA), which gives true zeros.

Source: ISTA (Daubechies et al. 2004; Beck and Teboulle 2009), as used on the gammas of batch norms by Ye et al. 2018.

The subgradient of `pruning/sparsity.py` pushes a gamma past zero and back, step by step, and never leaves it there. The proximal step
stops at zero, and holds a gamma at zero as long as the optimizer moves it by no more than the threshold.

What decides about the size of a step:

- *Which rate.* The threshold is lr * s, with the rate that the parameter's group has at this step, warm-up included.
- *Adam and momentum.* It is the plain lr * s: neither divided by Adam's root of the second moment nor multiplied by 1 / (1 - momentum). A preconditioned
  step would need one threshold per gamma and another s for every optimizer. So with SGD and momentum m a penalty in the gradient
  travels 1 / (1 - m) times as far at equal s; and with Adam, whose steps have about the length lr whatever the gradient's size, s is in units
  of Adam's step: a gamma stays at zero while |m| / sqrt(v) <= s. There s wants to be near 1.
- *AMP, clipping, accumulation* do not touch it: once per optimizer step. (Where float16's scaler skips a step, the threshold is applied all the same.)

The EMA. It is what is evaluated and saved, and an average of gammas that arrived at zero at different times is not zero. The same
soft-thresholding on the EMA would be wrong: the EMA follows the network by a share 1 - d of their distance per step, so a threshold t
per step would hold it t / (1 - d) short of the gammas it should follow (with d = 0.9999: 10,000 thresholds). Instead the EMA takes
the zeros of the network: a gamma is zero there while it is zero in the trained network, which already works without that channel, and
is averaged afresh once it leaves zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import softshrink

from models.network import Network
from pruning.sparsity import SparsityOptions, strength_at


class ProximalStep:
    """Parameter mask of the loop: gamma <- sign(gamma) * max(|gamma| - lr * s, 0) on the trained network, and its zeros on the EMA; beta
    likewise with the strength on beta. s is `strength_at` the epoch that `before_epoch` set.

    `network` is the trained one, whose parameters `optimizer` holds. It has no state of its own: strength and zeros follow from the epoch
    and the parameters.
    """

    def __init__(self, paths: list[str], options: SparsityOptions, epochs: int, network: Network, optimizer: torch.optim.Optimizer) -> None:
        self.paths, self.options, self.epochs = paths, options, epochs
        self.network, self.optimizer = network, optimizer
        self.strength = strength_at(options, 0, epochs)
        self._group = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def before_epoch(self, loop: object, epoch: int) -> None:
        """Transition seam: follow the schedule."""
        self.strength = strength_at(self.options, epoch, self.epochs)

    @torch.no_grad()
    def apply(self, network: Network) -> None:
        """Soft-threshold the trained network's penalised parameters; in any other (its EMA) zero those that are zero in it."""
        for name, strength in self._penalised():
            mine = self.network.get_parameter(name)
            if not mine.requires_grad:  # --freeze
                continue
            if network is self.network:
                rate = self.optimizer.param_groups[self._group[id(mine)]]["lr"]
                mine.copy_(softshrink(mine, rate * strength))
            else:
                network.get_parameter(name).masked_fill_(mine == 0, 0.0)

    def _penalised(self) -> Iterator[tuple[str, float]]:
        for path in self.paths:
            yield f"{path}.weight", self.strength
            if self.options.beta:
                yield f"{path}.bias", self.options.beta


def reach(rates: Sequence[float], strengths: Sequence[float], steps: int) -> float:
    """How far a gamma without a task gradient travels in a run: the sum of lr * s over epochs of `steps` optimizer steps (warm-up apart)."""
    return steps * sum(rate * strength for rate, strength in zip(rates, strengths, strict=True))
