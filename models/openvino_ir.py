"""An ONNX model as OpenVINO's own files: X.xml, X.bin, and metadata.yaml, which ONNX's metadata becomes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from utils.extras import require

METADATA = "metadata.yaml"


def openvino_files(onnx: bytes, stem: str, props: Mapping[str, str]) -> dict[str, bytes]:
    """File name -> content, the weights before the .xml that needs them. Weights stay float32."""
    openvino = require("openvino", "export to OpenVINO")
    model = openvino.Core().read_model(onnx)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / f"{stem}.xml"
        openvino.save_model(model, xml, compress_to_fp16=False)
        files = {name: (Path(folder) / name).read_bytes() for name in (f"{stem}.bin", f"{stem}.xml")}
    return files | {METADATA: yaml.safe_dump(dict(props), sort_keys=False, allow_unicode=True).encode()}
