"""A detector in three lines of Python; docs/python.md shows more.

from hub import load
results = load("runs/train/exp/weights/best.pt")("street.jpg")
print(results)
"""

from typing import Any


def load(weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Load any checkpoint as a `Detector`; `engine.detector.load` lists what else can be given. (torch is imported only now.)"""
    from engine.detector import load as load_detector

    return load_detector(weights, *args, **kwargs)
