"""The ends of an ONNX model: `utils.decode.decode`, `utils.nms.non_max_suppression` and a softmax, as nodes.

Suppression is what detect.py does: per box its best class; objectness x probability above `conf`; boxes of one class suppress each other,
those of different classes do not, which ours and hence this one reaches by moving each class's boxes a class's width apart before they are compared
in float32. At most `max_det` rows, best first: x1, y1, x2, y2 in pixels of the input, confidence, class; then rows of zeros.
"""

from __future__ import annotations

import numpy as np

from models.metadata import Metadata
from models.onnx_graph import Graph
from utils.decode import Level
from utils.nms import CLASS_OFFSET

FLOAT, INT64 = 1, 7  # onnx.TensorProto


def probabilities(graph: Graph, raw: str, classes: int, output: str) -> None:
    """Logits (B, nc, 1, 1) -> `output`, (B, nc)."""
    graph.node("Softmax", graph.node("Reshape", raw, graph.ints(-1, classes), name="logits"), axis=1, output=output)


# ---- decoding ------------------------------------------------------------------------------------------------------------------


def write_level(graph: Graph, raw: str, level: Level, no: int, shape: tuple[int, int] | None) -> str:
    """One level of `decode`: the map (B, na*no, ny, nx) -> (B, na*ny*nx, no). `shape`: (ny, nx), or None where it is free."""
    anchors = level.anchors.numpy().astype(np.float32)
    na = len(anchors)
    columns = graph.node("Reshape", raw, graph.ints(0, na, no, -1), name="level.columns")  # 0: the axis as it is
    p = graph.node("Transpose", columns, perm=[0, 1, 3, 2], name="level.cells")  # (B, na, ny*nx, no)
    s = graph.node("Sigmoid", p, name="level.sigmoid")
    # (scale s - (scale - 1) / 2 + cell) stride, its constants put together: exact for strides that are powers of two
    grown = graph.node("Mul", graph.slice(s, 3, 0, 2), graph.constant(level.scale * level.stride), name="level.grown")
    xy = graph.node("Add", grown, _grid(graph, raw, level, shape), name="level.xy")
    if level.exp:
        growth, unit = graph.node("Exp", graph.slice(p, 3, 2, 4), name="level.growth"), anchors
    else:
        side = graph.slice(s, 3, 2, 4)
        growth, unit = graph.node("Mul", side, side, name="level.growth"), 4 * anchors
    wh = graph.node("Mul", growth, graph.constant(unit.reshape(1, na, 1, 2)), name="level.wh")
    rows = graph.node("Concat", xy, wh, graph.slice(s, 3, 4, no), axis=3, name="level.rows")
    return graph.node("Reshape", rows, graph.ints(0, -1, no), name="level.boxes")


def _grid(graph: Graph, raw: str, level: Level, shape: tuple[int, int] | None) -> str:
    """Where a centre whose sigmoid is 0 lies, (ny*nx, 2) in pixels: a constant, or computed from the map's shape."""
    origin = -(level.scale - 1) / 2
    if shape:
        rows, columns = np.indices(shape)
        return graph.constant((np.stack((columns, rows), -1).reshape(-1, 2) + origin) * level.stride)
    shape_of = graph.node("Shape", raw, name="grid.shape")
    ny, nx = (graph.node("Gather", shape_of, graph.constant(axis, np.int64), axis=0, name="grid.side") for axis in (2, 3))
    sides = graph.slice(shape_of, 0, 2, 4, name="grid.sides")
    axes = []
    for count, form in ((nx, (1, -1)), (ny, (-1, 1))):
        steps = graph.node("Range", graph.constant(0, np.int64), count, graph.constant(1, np.int64), name="grid.range")
        spread = graph.node("Expand", graph.node("Reshape", steps, graph.ints(*form), name="grid.axis"), sides, name="grid.spread")
        axes.append(graph.node("Reshape", spread, graph.ints(-1, 1), name="grid.column"))
    cells = graph.node("Cast", graph.node("Concat", *axes, axis=1, name="grid.cells"), to=FLOAT, name="grid.float")
    scaled = graph.node("Mul", cells, graph.constant(level.stride), name="grid.pixels")
    return graph.node("Add", scaled, graph.constant(origin * level.stride), name="grid")


# ---- suppression ---------------------------------------------------------------------------------------------------------------


def suppressed(graph: Graph, rows: str, images: str, metadata: Metadata, output: str) -> None:
    """Predictions (B, N, 5 + nc) -> `output`, the final detections (B, max_det, 6)."""
    end = np.iinfo(np.int64).max
    objectness, classes = graph.slice(rows, 2, 4, 5, name="objectness"), graph.slice(rows, 2, 5, end, name="classes")
    scores = graph.node("Mul", classes, objectness, name="scores")
    best, label = graph.node("TopK", scores, graph.ints(1), axis=2, outputs=2, name="best")  # (B, N, 1); the first of equal ones
    label = graph.node("Cast", label, to=FLOAT, name="label")
    centre = graph.slice(rows, 2, 0, 2, name="centre")
    half = graph.node("Mul", graph.slice(rows, 2, 2, 4, name="size"), graph.constant(0.5), name="half")
    boxes = graph.node(
        "Concat", graph.node("Sub", centre, half, name="low"), graph.node("Add", centre, half, name="high"), axis=2, name="corners"
    )
    apart = graph.node("Add", boxes, graph.node("Mul", label, graph.constant(CLASS_OFFSET), name="offset"), name="apart")
    kept = graph.node(
        "NonMaxSuppression",
        apart,
        graph.node("Transpose", best, perm=[0, 2, 1], name="candidates"),
        graph.ints(metadata.max_det),
        graph.constant([metadata.iou]),
        graph.constant([metadata.conf]),
        name="kept",
    )  # (M, 3): image, 0, row; per image best first
    image, row = graph.slice(kept, 1, 0, 1, name="image"), graph.slice(kept, 1, 2, 3, name="row")
    detections = graph.node("Concat", boxes, best, label, axis=2, name="detections")
    found = graph.node("GatherND", detections, graph.node("Concat", image, row, axis=1, name="where"), name="found")
    batch = graph.slice(graph.node("Shape", images, name="images.shape"), 0, 0, 1, name="images.batch")
    place = graph.node("Concat", image, _rank(graph, image, batch), axis=1, name="place")
    shape = graph.node("Concat", batch, graph.ints(metadata.max_det, 6), axis=0, name="output.shape")
    graph.node("ScatterND", graph.node("Expand", graph.constant(0), shape, name="zeros"), place, found, output=output)


def _rank(graph: Graph, image: str, batch: str) -> str:
    """The place of each of (M, 1) detections among those of its own image."""
    number = graph.node("Gather", batch, graph.constant(0, np.int64), axis=0, name="images.count")
    every = graph.node("Range", graph.constant(0, np.int64), number, graph.constant(1, np.int64), name="images.range")
    own = graph.node("Cast", graph.node("Equal", image, every, name="images.own"), to=INT64, name="images.own_count")  # (M, B)
    before = graph.node("CumSum", own, graph.constant(0, np.int64), exclusive=1, name="images.before")
    return graph.node("GatherElements", before, image, axis=1, name="images.rank")
