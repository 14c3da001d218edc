"""The Python API: `load`, pictures of every kind, results; and every example of docs/python.md, executed."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from engine.predictor import Limits, build_predictor
from hub import load
from models.cfg import write_cfg
from models.checkpoint import Model, load_model, save_model
from models.network import Network
from models.yaml_reader import from_spec
from tests.helpers import ROOT, SMALL_YAML, alive, small
from tests.test_sources import clip
from utils.errors import InputError

NAMES = ("car", "person", "dog")


def checkpoint(path: Path, spec: dict = SMALL_YAML) -> Path:
    """A checkpoint that finds things: its head is shifted so that several boxes pass a confidence of 0.25."""
    if spec.get("ch", 3) == 3:
        network = alive(from_spec(spec, "test"))
    else:
        torch.manual_seed(0)
        network = Network(from_spec(spec, "test")).eval()
    with torch.no_grad():
        for index in network.heads:
            conv = network.get_submodule(network.blocks[network.blocks[index].inputs[0]].conv_path)
            conv.bias.view(3, -1)[:, 4] += 1.0
    save_model(path, Model(network.blocks, network.state_dict(), NAMES, imgsz=64))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    checkpoint(root / "best.pt")
    rng = np.random.default_rng(0)
    cv2.imwrite(str(root / "street.png"), rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    cv2.imwrite(str(root / "street.jpg"), rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    cv2.imwrite(str(root / "tall.png"), rng.integers(0, 256, (90, 40, 3), dtype=np.uint8))
    clip(root / "clip.mp4", 3)
    return root


def test_path_array_pil_and_list_agree(folder: Path) -> None:
    model = load(folder / "best.pt", device="cpu")
    image = cv2.imread(str(folder / "street.png"))
    one = model(str(folder / "street.png"))[0]
    assert one.boxes.shape[1] == 6 and len(one) == len(one.boxes) > 0 and (np.diff(one.boxes[:, 4]) <= 0).all()
    assert (one.boxes[:, :4] >= 0).all() and (one.boxes[:, [0, 2]] <= 96).all() and (one.boxes[:, [1, 3]] <= 48).all()
    rgb = image[..., ::-1]
    every = model([folder / "street.png", rgb, Image.open(folder / "street.png"), Image.fromarray(rgb)])
    assert len(every) == 4 and all(np.array_equal(r.boxes, every[0].boxes) for r in every)
    assert [r.path.name for r in every] == ["street.png", "image1.jpg", "street.png", "image3.jpg"]
    np.testing.assert_allclose(every[0].boxes, one.boxes, atol=1e-3)
    assert not np.array_equal(model(image)[0].boxes, one.boxes), "an array's channels are RGB"


def test_a_list_of_other_shapes_keeps_its_order(folder: Path) -> None:
    """Grouped and batched, each picture's boxes are those that it has alone."""
    model = load(folder / "best.pt", device="cpu", conf=0.1)
    paths = [folder / name for name in ("tall.png", "street.png", "tall.png", "street.jpg")]
    together = model(paths)
    for path, result in zip(paths, together):
        np.testing.assert_allclose(result.boxes, model(path)[0].boxes, atol=1e-3)
    assert {r.detections.input_shape for r in together} == {(64, 32), (32, 64)}
    assert len(model([])) == 0


def test_results_name_draw_list_and_save(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = load(folder / "best.pt", device="cpu")
    assert model.names == dict(enumerate(NAMES)) and model.imgsz == (64, 64)
    results = model([folder / "street.png", folder / "street.jpg"])
    result = results[0]
    picture = result.plot()
    assert picture.shape == (48, 96, 3) and picture.dtype == np.uint8
    assert not np.array_equal(picture[..., ::-1], result.image) and np.array_equal(result.image, cv2.imread(str(folder / "street.png")))
    row = result.to_dicts()[0]
    assert row["name"] == NAMES[row["class"]] and row["confidence"] == pytest.approx(float(result.boxes[0, 4]))
    assert [row[k] for k in ("xmin", "ymin", "xmax", "ymax")] == pytest.approx(result.boxes[0, :4].tolist())
    frame = results.pandas().xyxy[1]
    assert list(frame.columns) == list(row) and len(frame) == len(results.xyxy[1])
    counts = {name: int((result.boxes[:, 5] == c).sum()) for c, name in enumerate(NAMES)}
    for name, n in counts.items():
        assert n == 0 or f"{n} {name}{'s' if n > 1 else ''}" in str(result)
    lines = str(results).splitlines()
    assert re.fullmatch(rf"image 1/2 {re.escape(str(folder))}/street\.png: 32x64 .*, \d+\.\dms", lines[0]) and len(lines) == 2
    results.print()
    assert lines[1] in capsys.readouterr().out
    assert results.save(tmp_path / "out") == tmp_path / "out"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"street.png", "street_2.jpg"}
    assert np.array_equal(cv2.imread(str(tmp_path / "out/street.png"))[..., ::-1], picture)


def test_thresholds_are_those_of_the_moment(folder: Path) -> None:
    model = load(folder / "best.pt", device="cpu", conf=0.05, iou=0.9, max_det=7)
    assert len(model(folder / "street.png")[0]) == 7
    model.classes, model.max_det = [1], 1000
    only = model(folder / "street.png")[0].boxes
    assert len(only) and (only[:, 5] == 1).all() and (only[:, 4] > 0.05).all()
    model.conf = 0.999
    empty = model(folder / "street.png")[0]
    assert empty.boxes.shape == (0, 6) and empty.to_dicts() == [] and "(no detections)" in str(empty) and empty.plot().shape == (48, 96, 3)


def test_height_and_width(folder: Path) -> None:
    model = load(folder / "best.pt", device="cpu", imgsz=(40, 100))
    assert model.imgsz == (48, 112), "raised to multiples of the stride 16"
    assert model(np.zeros((48, 112, 3), np.uint8))[0].detections.input_shape == (48, 112)
    assert load(folder / "best.pt", device="cpu", imgsz=96).imgsz == (96, 96)


def test_more_pictures_than_a_batch_holds(folder: Path) -> None:
    predictor = build_predictor(load_model(folder / "best.pt"), None, "cpu", False)
    images = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(18)]
    together, limits = predictor(images, Limits(conf=0.1)), Limits(conf=0.1)
    for i in (0, 15, 16, 17):
        np.testing.assert_allclose(together[i].boxes, predictor([images[i]], limits)[0].boxes, atol=1e-3)


def test_a_pair_and_a_grey_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pair.cfg").write_text(write_cfg(small()))
    pair = load(folder / "best.pt", cfg=tmp_path / "pair.cfg", device="cpu")
    assert np.array_equal(pair(folder / "street.png")[0].boxes, load(folder / "best.pt", device="cpu")(folder / "street.png")[0].boxes)
    grey = load(checkpoint(tmp_path / "grey.pt", SMALL_YAML | {"ch": 1}), device="cpu", conf=0.001)
    image = cv2.imread(str(folder / "street.png"), cv2.IMREAD_GRAYSCALE)
    results = grey([image, np.repeat(image[..., None], 3, 2)])
    assert len(results[0]) and np.array_equal(results[0].boxes, results[1].boxes) and results[0].plot().shape == (48, 96, 3)


@pytest.mark.parametrize(("picture", "message"), [
    ("none.png", r"none\.png: No such file"), (np.zeros((4, 4, 4), np.uint8), r"picture 0: an array \(4, 4, 4\) of uint8"),
    (np.zeros((4, 4, 3), np.float32), "of float32; it must be"), (3.5, "picture 0: a float; give a path"), (ROOT / "docs", "is a folder; give its"),
    (ROOT / "README.md", "cannot be read as an image"), (np.zeros((0, 4, 3), np.uint8), "an array"),
])  # fmt: skip
def test_what_is_no_picture_is_one_error(picture: object, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(folder / "best.pt", device="cpu")(picture)


@pytest.mark.parametrize(("given", "message"), [
    ({"weights": "none.pt"}, r"none\.pt"), ({"classes": [3]}, r"classes 3: this model has the classes 0\.\.2"), ({"conf": 2}, "between 0 and 1"),
    ({"imgsz": (1, 2, 3)}, "height and width"), ({"imgsz": 0}, "height and width"), ({"device": "99"}, "--device 99"), ({"max_det": 0}, "at least 1"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_error(given: dict, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(**{"weights": folder / "best.pt", "device": "cpu"} | given)


def test_the_documentations_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # our own documentation
    assert (folder / "found/street.jpg").exists() and names["picture"].shape == (48, 96, 3)
    assert names["found"].shape[1] == 6 and names["model"].imgsz == (64, 128)
