"""The names that pruning knows. Light, so that scripts can parse their flags before torch is imported."""

CRITERIA = ("gamma", "l1", "l2", "fpgm", "taylor", "random")
NORMALIZE = ("none", "mean", "max", "standard")
EQUALIZE = ("first", "union", "intersection", "arithmetic_mean", "geometric_mean")  # as NVIDIA TAO names them
