"""What an int8 export is made from: a checkpoint that is quantised already, or a float one with ranges of real images."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from engine.calibrate import CalibrationOptions, calibrated
from models.checkpoint import Model
from models.quantization import QuantScheme, Ranges
from utils.errors import InputError
from utils.log import LOGGER

FORM = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "onnxruntime"}  # format -> what is rounded where
CPU = torch.device("cpu")
LEVEL = 6  # gzip's own default


def int8_model(model: Model, calibration: CalibrationOptions, tensorrt: bool, weights: str) -> Model:
    """`model` with ranges: its own of a quantised one, otherwise those of `calibration`. `tensorrt`: activations symmetric, with the same ranges.

    Raises `InputError` for a float model without `calibration.data`.
    """
    scheme = QuantScheme(symmetric=tensorrt) if model.quantization is None else model.quantization.scheme
    if model.quantization is not None and model.quantization.ranges:
        if calibration.data:
            LOGGER.info(f"{weights}: is quantised, with ranges of its own; no images are read")
        return _symmetric(model, weights) if tensorrt and not scheme.symmetric else model
    if not calibration.data:
        why = "is not quantised" if model.quantization is None else "was saved before its quantisation saw an image"
        raise InputError(f"--int8: {weights} {why}; name the images that its ranges are found on, with --data DATA.yaml")
    return calibrated(replace(model, quantization=None), calibration, replace(scheme, symmetric=tensorrt or scheme.symmetric), CPU, weights)


def _symmetric(model: Model, weights: str) -> Model:
    LOGGER.info(
        f"--tensorrt: {weights} has zero points, which TensorRT does not have; without them the steps of what is never negative are twice as "
        "large. A recipe with tensorrt: True trains for that"
    )
    own = model.quantization
    return replace(model, quantization=Ranges(replace(own.scheme, symmetric=True), own.ranges))


def size_text(files: Iterable[bytes], floats: int | None) -> str:
    """What files weigh; of int8 ones also compressed, and beside the `floats` bytes that the same weigh in float32."""
    contents = list(files)
    plain = sum(map(len, contents))
    if floats is None:
        return f"{plain / 1e6:.1f} MB"
    packed = sum(len(zlib.compress(content, LEVEL)) for content in contents)
    return f"{plain / 1e6:.2f} MB, {packed / 1e6:.2f} MB compressed, {plain / floats:.2f} of float32's {floats / 1e6:.2f} MB"
