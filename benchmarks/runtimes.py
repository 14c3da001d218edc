"""A detector in each runtime that people run it in: a function that takes one batch from images to boxes. For `benchmarks/latency.py`.

Every runtime computes in float32, or a quantised model in int8, with the same number of threads, decodes the boxes, and leaves out suppression, which
does not depend on the network.
Missing packages leave a runtime out, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from common import ROOT  # noqa: F401 - puts the project on the path

import cv2  # isort: skip
import numpy as np
import torch
from torch import Tensor

from models.checkpoint import Model
from models.darknet import write_pair
from models.metadata import Metadata
from models.network import fuse
from models.onnx_writer import onnx_model
from utils.decode import decode

Run = Callable[[], object]


def torch_run(model: Model, images: np.ndarray, threads: int, folder: Path) -> Run:
    """The fused network, channels last."""
    torch.set_num_threads(threads)
    network = fuse(model.network()).to(memory_format=torch.channels_last)
    batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> Tensor:
        return decode(network(batch), network.levels)

    return run


def onnxruntime_run(model: Model, images: np.ndarray, threads: int, folder: Path) -> Run:
    """ONNX Runtime's CPU provider on the exported graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not wait busily while others are measured
    session = onnxruntime.InferenceSession(onnx_bytes(model, images.shape, "onnxruntime"), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def openvino_run(model: Model, images: np.ndarray, threads: int, folder: Path) -> Run:
    """OpenVINO's CPU device on the same graph, for the least latency; what is not int8 in float32."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(onnx_bytes(model, images.shape, "openvino")), "CPU", settings).create_infer_request()
    return lambda: request.infer([images])


def opencv_run(model: Model, images: np.ndarray, threads: int, folder: Path) -> Run:
    """OpenCV's own reader and kernels on the Darknet pair."""
    cv2.setNumThreads(threads)
    cfg = folder / "pair.cfg"
    weights = write_pair(model, cfg, *images.shape[2:])
    network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    network.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    outputs = network.getUnconnectedOutLayersNames()

    def run() -> object:
        network.setInput(images)
        return network.forward(outputs)

    return run


RUNTIMES: Mapping[str, Callable[[Model, np.ndarray, int, Path], Run]] = {
    "torch": torch_run, "ONNX Runtime": onnxruntime_run, "OpenVINO": openvino_run, "OpenCV": opencv_run,
}  # fmt: skip


def onnx_bytes(model: Model, shape: tuple[int, ...], form: str) -> bytes:
    """A static graph for images of `shape` (B, C, H, W), as export.py writes it; of a quantised model in the `form` of a runtime."""
    batch, channels, height, width = shape
    network = model.network()
    return onnx_model(network, Metadata(model.names, network.max_stride, (height, width), channels, batch), form=form)
