"""Whether an exported file gives what torch gives: each format run by the program it is meant for, on the same images.

Boxes are compared in pixels, scores as objectness and objectness x probability of each class, which is what every program reports.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from engine.opencv import ordered
from models.blocks import Blocks, heads, is_classifier
from models.network import Network, fuse
from models.torchscript import Decoded
from utils.errors import InputError
from utils.extras import require

# Most that boxes (pixels) and scores may differ from torch.
LIMITS = {"onnx": (0.01, 1e-4), "openvino": (0.01, 1e-4), "torchscript": (0.01, 1e-4), "darknet": (0.05, 1e-3)}
ROUNDING = 10  # times what torch differs from itself when it computes in another order


@dataclass(frozen=True)
class Gap:
    """Largest difference of boxes, in pixels, and of scores."""

    boxes: float
    scores: float

    def __str__(self) -> str:
        return f"boxes within {self.boxes:.2g} px, scores within {self.scores:.2g}"


def gap(got: np.ndarray, want: np.ndarray, classifier: bool = False) -> Gap:
    """Of rows as `reported` gives them, (B, N, 5 + nc), or of a classifier's probabilities (B, nc). Other shapes differ infinitely."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return Gap(math.inf, math.inf)
    apart = np.abs(got - want)
    boxes = 0 if classifier else 4
    return Gap(float(apart[..., :boxes].max(initial=0)), float(apart[..., boxes:].max(initial=0)))


def reported(rows: np.ndarray) -> np.ndarray:
    """Predictions (B, N, 5 + nc) as `decode` gives them, with objectness x probability in the place of the probabilities."""
    return np.concatenate((rows[..., :5], rows[..., 5:] * rows[..., 4:5]), -1)


@dataclass(frozen=True, eq=False)
class Reference:
    """What torch gives for `images` (B, C, H, W), and how far it is from itself with its batch norms folded: rounding alone."""

    images: np.ndarray
    rows: np.ndarray
    noise: Gap
    classifier: bool

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, images: torch.Tensor) -> Reference:
        classifier = is_classifier(network.blocks)
        rows, folded = (Decoded(n)(images).numpy() for n in (network, fuse(network)))
        if not classifier:
            rows, folded = reported(rows), reported(folded)
        return cls(images.numpy(), rows, gap(folded, rows, classifier), classifier)

    def check(self, kind: str, rows: np.ndarray, what: str) -> Gap:
        """The gap of `rows`, which a program computed from a file of format `kind`; raise `InputError`, which begins with `what`, beyond the limits.

        A network whose float32 rounding alone is larger is held to `ROUNDING` times that.
        """
        if kind != "darknet" and not self.classifier:
            rows = reported(rows)
        found = gap(rows, self.rows[:1] if kind == "darknet" else self.rows, self.classifier)
        limits = [max(limit, ROUNDING * own) for limit, own in zip(LIMITS[kind], (self.noise.boxes, self.noise.scores))]
        if found.boxes > limits[0] or found.scores > limits[1]:
            raise InputError(
                f"{what}: computes something else than torch ({found}; allowed are {limits[0]:.2g} px and {limits[1]:.2g}), so it was not written"
            )
        return found


# ---- the programs --------------------------------------------------------------------------------------------------------------


def run_onnx(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    """ONNX Runtime on the CPU: its outputs by name."""
    ort = require("onnxruntime", "checking an ONNX file")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, {"images": images})))


def run_openvino(xml: bytes, weights: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    """OpenVINO on the CPU, in float32: its outputs by name."""
    openvino = require("openvino", "checking an OpenVINO file")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(xml, weights), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(images)
    return {output.any_name: results[output] for output in compiled.outputs}


@torch.no_grad()
def run_torchscript(model: bytes, images: np.ndarray) -> np.ndarray:
    """torch's own loader."""
    return torch.jit.load(io.BytesIO(model), map_location="cpu")(torch.from_numpy(images)).numpy()


def run_opencv(cfg: bytes, weights: bytes, images: np.ndarray, blocks: Blocks) -> np.ndarray:
    """OpenCV's Darknet reader on the first image: rows in the order and the units of `decode`, scores as `reported`.

    `blocks`: the network's, which say where OpenCV's rows belong: a section after another, in each (y, x, anchor).
    """
    net = cv2.dnn.readNetFromDarknet(bytearray(cfg), bytearray(weights))
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    net.setInput(images[:1])
    outputs = net.forward(net.getUnconnectedOutLayersNames())
    return outputs[0].reshape(1, -1) if is_classifier(blocks) else opencv_rows(outputs, blocks, images.shape[2], images.shape[3])


def opencv_rows(outputs: Sequence[np.ndarray], blocks: Blocks, height: int, width: int) -> np.ndarray:
    """(1, N, 5 + nc) as `reported`: OpenCV's outputs, one (ny*nx*na, 5 + nc) per section, for an image of that size."""
    sections = [i for i, block in enumerate(blocks) if block.kind == "yolo"]
    levels = {i: ordered(torch.from_numpy(rows.copy()), 1, len(blocks[i].anchors), height, width) for i, rows in zip(sections, outputs)}
    return torch.cat([levels[i] for i in heads(blocks)], 1).numpy()
