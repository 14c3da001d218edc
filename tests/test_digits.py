"""The shipped digits dataset: reproducible, honest in its split, tight in its boxes, never half written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data import digits
from data.digits import DigitsOptions, Scans, generate, load_scans, render_scene, split_scans
from utils.errors import InputError

TINY = DigitsOptions(train=3, val=2)


@pytest.fixture(scope="module")
def scans() -> Scans:
    return load_scans()


@pytest.fixture(scope="module")
def scenes(scans: Scans) -> list[digits.Scene]:
    members, _ = split_scans(0, scans.classes)
    return [render_scene(np.random.default_rng(i), scans, members, DigitsOptions()) for i in range(60)]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(tmp_path / name, DigitsOptions(train=3, val=2, seed=seed))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


def test_an_image_does_not_depend_on_the_counts(tmp_path: Path) -> None:
    generate(tmp_path / "few", TINY)
    generate(tmp_path / "more", DigitsOptions(train=4, val=3))
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    del few[digits.STAMP]
    assert few.items() <= more.items()


def test_split_is_disjoint_complete_stratified_and_seeded(scans: Scans) -> None:
    train, val = split_scans(0, scans.classes, 0.2)
    assert sorted([*train, *val]) == list(range(1797))
    counts = np.bincount(scans.classes)
    assert np.abs(np.bincount(scans.classes[val]) - 0.2 * counts).max() <= 0.5
    assert np.array_equal(train, split_scans(0, scans.classes, 0.2)[0])
    assert not np.array_equal(train, split_scans(1, scans.classes, 0.2)[0])


def test_each_split_draws_from_its_own_scans_alone(scans: Scans, tmp_path: Path, monkeypatch) -> None:
    train, val = split_scans(0, scans.classes)
    generate(tmp_path / "plain", TINY)
    plain = contents(tmp_path / "plain")
    for split, others in (("train", val), ("val", train)):
        # Were one scan of the other split drawn, the images would change.
        pixels = scans.pixels.copy()
        pixels[others] = 1 - pixels[others]
        monkeypatch.setattr(digits, "load_scans", lambda pixels=pixels: Scans(pixels, scans.classes))
        generate(tmp_path / split, TINY)
        mixed = contents(tmp_path / split)
        changed = {name for name in plain if plain[name] != mixed[name]}
        assert changed
        assert not any(f"/{split}/" in name for name in changed)


def test_scene_reports_the_scans_it_drew(scans: Scans, scenes: list[digits.Scene]) -> None:
    train, _ = split_scans(0, scans.classes)
    for scene in scenes:
        assert set(scene.scans) <= set(train)
        assert np.array_equal(scans.classes[scene.scans], scene.classes)


def test_layout_and_labels_are_valid(tmp_path: Path) -> None:
    generate(tmp_path / "set", TINY)
    for split, count in (("train", 3), ("val", 2)):
        images = sorted((tmp_path / "set" / "images" / split).iterdir())
        labels = sorted((tmp_path / "set" / "labels" / split).iterdir())
        assert [path.name for path in images] == [f"{i:06d}.jpg" for i in range(count)]
        assert [path.stem for path in labels] == [path.stem for path in images]
        for image, label in zip(images, labels, strict=True):
            assert cv2.imread(str(image)).shape == (TINY.size, TINY.size, 3)
            rows = np.loadtxt(label, ndmin=2)
            assert rows.shape[1] == 5 and 1 <= len(rows) <= 7
            assert set(rows[:, 0]) <= set(range(10))
            assert (rows[:, 3:] > 0).all()
            assert (rows[:, 1:3] - rows[:, 3:] / 2 >= 0).all() and (rows[:, 1:3] + rows[:, 3:] / 2 <= 1).all()


def test_label_rows_round_trip_to_the_boxes(scenes: list[digits.Scene]) -> None:
    for scene in scenes:
        rows = np.array([line.split() for line in digits.label_rows(scene).splitlines()], float)
        centre, extent = rows[:, 1:3] * len(scene.image), rows[:, 3:] * len(scene.image)
        np.testing.assert_allclose(np.hstack([centre - extent / 2, centre + extent / 2]), scene.boxes, atol=1e-3)
        assert np.array_equal(rows[:, 0], scene.classes)


def test_sizes_spread_fourfold_and_stay_legible(scenes: list[digits.Scene]) -> None:
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) for scene in scenes])
    assert sides.max() / sides.min() >= 4
    assert sides.min() >= 14
    assert 2 <= np.mean([len(scene.boxes) for scene in scenes]) <= 7


def test_digits_hardly_overlap(scenes: list[digits.Scene]) -> None:
    for scene in scenes:
        boxes = [tuple(box) for box in scene.boxes.tolist()]
        assert all(digits.overlap(box, boxes[:i]) <= digits.MOST_OVERLAP for i, box in enumerate(boxes))


def test_overlap_is_over_the_smaller_box() -> None:
    assert digits.overlap((0, 0, 10, 10), [(2, 2, 4, 4)]) == 1
    assert digits.overlap((0, 0, 10, 10), [(9, 0, 19, 10), (50, 50, 60, 60)]) == pytest.approx(0.1)
    assert digits.overlap((0, 0, 10, 10), [(10, 0, 20, 10)]) == 0


@pytest.mark.parametrize("side", [16.0, 30.0, 64.0])
def test_box_is_tight_on_a_plain_background(scans: Scans, side: float) -> None:
    for index in range(20):
        rng = np.random.default_rng(index)
        canvas = np.full((160, 160, 3), 128, np.float32)
        box = digits.paste(rng, canvas, digits.warp_glyph(digits.scan_field(scans.pixels[index]), side, rng), [])
        visible = np.abs(canvas - 128).max(axis=2) > 8
        assert np.abs(np.subtract(box, digits.ink_bounds(visible, 0))).max() <= 2
        assert 0.8 * side <= max(box[2] - box[0], box[3] - box[1]) <= 1.4 * side


def test_every_edge_of_a_glyph_touches_ink(scans: Scans) -> None:
    for index in range(20):
        alpha = digits.warp_glyph(digits.scan_field(scans.pixels[index]), 40, np.random.default_rng(index))
        assert min(edge.max() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])) > digits.INK_LEVEL


def test_ink_stands_out_or_is_refused() -> None:
    rng = np.random.default_rng(0)
    for level in range(0, 150, 10):
        ink = digits.pick_ink(rng, np.full((8, 8, 3), level, np.float32))
        assert ink is not None and abs(float(ink @ digits.LUMA) - level) >= digits.CONTRAST_FLOOR - 1e-3
    checker = np.indices((8, 8)).sum(axis=0) % 2 * 255.0
    assert digits.pick_ink(rng, np.repeat(checker[..., None], 3, axis=2).astype(np.float32)) is None


@pytest.mark.parametrize("background", digits.BACKGROUNDS)
def test_backgrounds_are_finite_images(background: Callable) -> None:
    for seed in range(5):
        canvas = background(np.random.default_rng(seed), 97)
        assert canvas.shape == (97, 97, 3)
        assert np.isfinite(canvas).all()


def test_second_call_touches_nothing(tmp_path: Path) -> None:
    root = tmp_path / "set"
    generate(root, TINY)
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    generate(root, TINY)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


def test_other_options_or_a_lost_image_generate_again(tmp_path: Path) -> None:
    root = tmp_path / "set"
    generate(root, TINY)
    first = contents(root)
    (root / "images" / "val" / "000001.jpg").unlink()
    generate(root, TINY)
    assert contents(root) == first
    generate(root, DigitsOptions(train=2, val=1))
    assert len(list((root / "images" / "train").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_midway_leaves_nothing_half_written(tmp_path: Path, monkeypatch, existing: bool) -> None:
    root = tmp_path / "parent" / "set"
    if existing:
        generate(root, TINY)
    before = contents(tmp_path)
    calls = iter(range(3))

    def fail_at_the_third(*args: object) -> str:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(digits, "label_rows", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(root, DigitsOptions(train=3, val=2, seed=5))
    assert contents(tmp_path) == before
    assert root.exists() == existing
    assert [path.name for path in root.parent.iterdir()] == (["set"] if existing else [])


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a generated digits dataset"):
        generate(tmp_path, TINY)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": -1}, {"size": 32}, {"seed": -1}])
def test_wrong_options_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        DigitsOptions(**wrong)


def test_command_line_generates(tmp_path: Path, monkeypatch) -> None:
    arguments = ["digits", "--root", str(tmp_path / "set"), "--train", "2", "--val", "1", "--size", "96", "--seed", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    digits.main()
    assert digits.is_complete(tmp_path / "set", DigitsOptions(train=2, val=1, size=96, seed=3))


def test_yaml_describes_what_is_generated() -> None:
    path = Path(digits.__file__).with_suffix(".yaml")
    text = path.read_text()
    description = yaml.safe_load(text)
    assert text.startswith("#")
    assert description["names"] == {i: str(i) for i in range(10)} and description["nc"] == 10
    assert (description["train"], description["val"]) == ("images/train", "images/val")
    assert description["download"] == "digits"
