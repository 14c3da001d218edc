"""Reading data sets, labels and images, and batching them."""

from __future__ import annotations

import os
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils import data_config
from utils.augment import AugmentOptions
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, EpochBatchSampler, collate, drawn_size, make_loader, rescaled
from utils.errors import InputError
from utils.labels import label_path, list_images, load_image, parse_labels, scan_labels
from utils.world import World


def write_image(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(pixels, (width, height)))
    return path


def write_label(image: Path, text: str) -> Path:
    path = label_path(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def split(tmp_path) -> Path:
    """A folder `images/train` of 12 images of several aspects, with labels; image 3 has an empty file, image 5 none."""
    sizes = [(40, 60), (60, 40), (50, 50), (30, 60), (60, 30), (48, 64)]
    for number in range(12):
        image = write_image(tmp_path / "images" / "train" / f"{number:02}.png", *sizes[number % 6], seed=number)
        rows = "".join(f"{(number + k) % 4} 0.{3 + k} 0.5 0.4 0.3\n" for k in range(1 + number % 3))
        if number != 5:
            write_label(image, "" if number == 3 else rows)
    return tmp_path / "images" / "train"


# Dataset files --------------------------------------------------------------------------------------------------------


def yaml_file(folder: Path, text: str, name: str = "set.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_yaml_with_a_list_of_names(split):
    root = split.parents[1]
    text = f"path: {root}\ntrain: images/train\nval: [images/train, images]\nnc: 2\nnames: [no, 01]\n"
    data = read_data(yaml_file(root, text))
    assert data.train == (split,) and data.val == (split, root / "images") and data.test == ()
    assert data.names == ("no", "01") and data.nc == 2 and data.source == root / "set.yaml"


def test_yaml_with_numbered_names_and_a_path_beside_it(split):
    root = split.parents[1]
    data = read_data(yaml_file(root, "path: .\ntrain: images/train\nval: images/train\nnames:\n  1: b\n  0: a\n"))
    assert data.train == (split,) and data.names == ("a", "b")


def test_yaml_without_names_or_path(split, monkeypatch):
    root = split.parents[1]
    monkeypatch.chdir(root)
    data = read_data(yaml_file(root, "train: images/train\nval: images/train\ntest:\nnc: 3\n"))
    assert data.names == ("class0", "class1", "class2") and data.train == (split,)


def test_path_is_looked_for_in_the_working_folder_first(split, tmp_path, monkeypatch):
    source = yaml_file(tmp_path, "path: here\ntrain: pics\nval: pics\nnames: [a]\n")
    write_image(tmp_path / "here" / "pics" / "1.png")
    assert read_data(source).val == (tmp_path / "here" / "pics",)
    other = tmp_path / "other"
    write_image(other / "here" / "pics" / "1.png")
    monkeypatch.chdir(other)
    assert read_data(source).val == (other / "here" / "pics",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\nval: images/train\nnc: 3\nnames: [a, b]\n", "`nc` is 3 but `names` has 2"),
        ("train: images/train\nval: images/train\nnc: x\nnames: [a, b]\n", "`nc` must be a whole number"),
        ("train: images/train\nval: images/train\nname: [a, b]\n", "`names` is missing.*did you mean name"),
        ("train: images/train\nval: images/train\nnames: {0: a, 2: b}\n", "must run from 0 to 1"),
        ("train: images/train\nval: images/train\nnames: []\n", "no class"),
        ("train: images/train\nnames: [a]\n", "`val` is missing"),
        ("train: {a: b}\nval: images/train\nnames: [a]\n", "`train` must be one value"),
        ("- a\n- b\n", "expected keys"),
        ("train: [a\n", "not a valid yaml"),
    ],
)
def test_bad_yaml(split, text, message):
    source = yaml_file(split.parents[1], text)
    with pytest.raises(InputError, match=message) as error:
        read_data(source)
    assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_missing_data_file_names_its_neighbours(tmp_path):
    yaml_file(tmp_path, "", "hands.yaml")
    with pytest.raises(InputError, match="no such file; did you mean hands.yaml"):
        read_data(tmp_path / "hand.yaml")
    with pytest.raises(InputError, match="did you mean coco128.yaml"):
        read_data("coco12.yaml")
    with pytest.raises(InputError, match="is a folder; a detector's data is a .yaml or .data"):
        read_data(tmp_path)
    (tmp_path / "set.json").write_text("{}")
    with pytest.raises(InputError, match="expected a dataset .yaml"):
        read_data(tmp_path / "set.json")


def test_missing_images_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("ran a command"))
    source = yaml_file(tmp_path, "path: gone\ntrain: a\nval: b\nnames: [x]\ndownload: bash get.sh\n")
    with pytest.raises(InputError, match=r"(?s)images are missing.*bash get\.sh\n.*Nothing is downloaded") as error:
        read_data(source)
    assert str(tmp_path / "gone" / "a") in str(error.value)
    assert read_data(source, splits=()).names == ("x",)


def test_a_generator_runs_by_name_and_only_once(tmp_path, monkeypatch):
    calls = []

    def generate(root: Path) -> None:
        calls.append(root)
        write_image(root / "images" / "1.png")

    monkeypatch.setattr(data_config, "GENERATORS", {"shapes": generate})
    (tmp_path / "made").mkdir()
    source = yaml_file(tmp_path, "path: made\ntrain: images\nval: images\nnames: [x]\ndownload: shapes\n")
    assert read_data(source, splits=()).nc == 1 and not calls
    assert read_data(source).train == (tmp_path / "made" / "images",)
    read_data(source)
    assert calls == [tmp_path / "made"]
    source.write_text(source.read_text().replace("shapes", "shape").replace(": images", ": absent"))
    with pytest.raises(InputError, match="did you mean shapes"):
        read_data(source)


def test_shipped_coco128_yaml():
    data = read_data("coco128.yaml", splits=())
    assert data.nc == 80 and [data.names[i] for i in (0, 15, 79)] == ["person", "cat", "toothbrush"]
    assert data.train[0].parts[-3:] == ("coco128", "images", "train2017")


def test_darknet_data(split, monkeypatch):
    root = split.parents[1]
    (root / "train.txt").write_text("./images/train/00.png\n\nimages/train/01.png\n")
    (root / "x.names").write_text("hand\nface\n")
    text = "# a comment\nclasses = 2\ntrain=train.txt\nvalid=images/train\nnames=x.names\nbackup=backup/\n\n"
    source = yaml_file(root, text, "x.data")
    data = read_data(source)
    assert data.train == (root / "train.txt",) and data.val == (split,) and data.names == ("hand", "face")
    assert [path.name for path in list_images(data.train)] == ["00.png", "01.png"]

    # The working folder comes before the file's own.
    other = root / "other"
    other.mkdir()
    (other / "x.names").write_text("one\ntwo\n")
    monkeypatch.chdir(other)
    assert read_data(source).names == ("one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes=3\ntrain=images\nvalid=images\nnames=x.names\n", "`classes` is 3 but `names` has 2"),
        ("classes=2\ntrain=images\nvalid=images\nnames=y.names\n", "names file is missing: .*y.names"),
        ("classes=2\ntrain=images\n", "`val` is missing"),
        ("classes=2\ntrain=images\nvalid=nowhere\n", "images are missing: looked for .*nowhere"),
        ("classes 2\n", "line 1: expected `key=value`"),
    ],
)
def test_bad_darknet_data(split, text, message):
    root = split.parents[1]
    (root / "x.names").write_text("hand\nface\n")
    with pytest.raises(InputError, match=message):
        read_data(yaml_file(root, text, "x.data"))


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_are_found_in_folders_and_lists(tmp_path, monkeypatch):
    names = ["b/2.JPG", "a.webp", "b/c/3.tif", "note.txt", ".hidden.png", "._x/4.png", "z.gif"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    os.symlink(tmp_path / "images", tmp_path / "images" / "b" / "loop")
    found = [str(path.relative_to(tmp_path / "images")) for path in list_images([tmp_path / "images"])]
    assert found == ["a.webp", "b/2.JPG", "b/c/3.tif"]
    with pytest.raises(InputError, match="no such folder or list: .*did you mean images"):
        list_images([tmp_path / "image"])


def test_label_path_replaces_the_last_images_folder():
    here = os.sep.join
    assert label_path(Path(here(["", "images", "x", "images", "t", "1.a.jpg"]))) == Path(
        here(["", "images", "x", "labels", "t", "1.a.txt"])
    )
    assert label_path(Path(here(["", "pics", "images2", "1.png"]))) == Path(here(["", "pics", "images2", "1.txt"]))


def exif_jpeg(path: Path, image: np.ndarray, orientation: int) -> None:
    """Write a JPEG whose EXIF header holds nothing but an orientation."""
    coded = cv2.imencode(".jpg", image)[1].tobytes()
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    payload = b"Exif\0\0" + tiff
    path.write_bytes(coded[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + coded[2:])


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = 255  # left half white; turned clockwise it is the top half
    exif_jpeg(tmp_path / "turned.jpg", image, 6)
    upright = load_image(tmp_path / "turned.jpg")
    assert upright.shape == (60, 40, 3) and upright[:28].min() > 200 and upright[32:].max() < 50
    assert scan_labels(tmp_path).sizes.tolist() == [[40, 60]]


def test_every_kind_of_image_becomes_bgr_uint8(tmp_path):
    name = tmp_path / "Größe 猫.png"
    bgr = np.zeros((20, 20, 3), np.uint8)
    bgr[...] = (10, 100, 200)
    kinds = {
        "colour": (bgr, (10, 100, 200)),
        "gray": (np.full((20, 20), 77, np.uint8), (77, 77, 77)),
        "deep": (np.full((20, 20), 128 * 257, np.uint16), (128, 128, 128)),
        "alpha": (np.dstack([bgr, np.zeros((20, 20), np.uint8)]), (10, 100, 200)),
    }
    for pixels, expected in kinds.values():
        name.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        image = load_image(name)
        assert image.dtype == np.uint8 and image.shape == (20, 20, 3)
        np.testing.assert_array_equal(image[3, 4], expected)


def test_cmyk_jpeg(tmp_path):
    pil = pytest.importorskip("PIL.Image", reason="writes a CMYK file with Pillow")
    pil.new("RGB", (20, 20), (200, 30, 60)).convert("CMYK").save(tmp_path / "c.jpg")
    np.testing.assert_allclose(load_image(tmp_path / "c.jpg")[5, 5], (60, 30, 200), atol=4)


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="x.jpg: cannot be read as an image"):
        load_image(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="gone.jpg: No such file.*deleted"):
        load_image(tmp_path / "gone.jpg")


def test_jpeg_without_its_end_is_read_and_left_as_it_is(tmp_path):
    content = cv2.imencode(".jpg", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()[:-2]
    (tmp_path / "cut.jpg").write_bytes(content)
    assert abs(int(load_image(tmp_path / "cut.jpg")[16, 16, 0]) - 90) < 3
    labels = scan_labels(tmp_path)
    assert len(labels) == 1 and "without its end marker" in labels.messages[0]
    assert (tmp_path / "cut.jpg").read_bytes() == content


# Labels ---------------------------------------------------------------------------------------------------------------


def test_boxes_are_parsed_as_they_are():
    rows, note = parse_labels("3 0.5 0.5 1 1\n\n0 .25 0.75 0.1 0.2\n")
    assert rows.dtype == np.float32 and note == ""
    np.testing.assert_array_equal(rows, np.array([[3, 0.5, 0.5, 1, 1], [0, 0.25, 0.75, 0.1, 0.2]], np.float32))
    assert parse_labels(" \n")[0].shape == (0, 5)


def test_duplicates_are_removed_and_the_rest_sorted():
    rows, note = parse_labels("2 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1\n")
    assert rows[:, 0].tolist() == [1, 2] and note == "1 duplicate labels removed"


def test_polygons_become_their_bounding_boxes():
    rows, note = parse_labels("1 0.1 0.2 0.5 0.3 0.2 0.8\n4 0.2 0.2 0.4 0.2 0.4 0.6 0.2 0.6\n")
    np.testing.assert_allclose(rows, [[1, 0.3, 0.5, 0.4, 0.6], [4, 0.3, 0.4, 0.2, 0.4]], atol=1e-6)
    assert note == ""


def test_a_box_among_polygons_is_read_as_two_points_and_noted():
    rows, note = parse_labels("1 0.1 0.2 0.5 0.3 0.2 0.8\n4 0.2 0.2 0.4 0.6\n")
    np.testing.assert_allclose(rows[1], [4, 0.3, 0.4, 0.2, 0.4], atol=1e-6)
    assert "read as two points" in note


BAD_LABELS = [
    ("0 0.5 0.5 0.1\n", "row 1 has 4 columns"),
    ("0 0.5 0.5 0.1 0.1 0.9\n", "row 1 has 6 columns; a box has 5"),
    ("0 0.5 0.5 0.1 nan\n", "not a finite number"),
    ("0 0.5 -0.5 0.1 0.1\n", "negative value -0.5"),
    ("-1 0.5 0.5 0.1 0.1\n", "negative value -1"),
    ("0 1.5 0.5 0.1 0.1\n", "coordinate 1.5 is above 1"),
    ("1.5 0.5 0.5 0.1 0.1\n", "class is not a whole number"),
    ("cat 0.5 0.5 0.1 0.1\n", "could not convert string to float"),
    ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4\n", "row 1 has 8 columns; a polygon"),
    ("0 0.1 0.1 0.2 0.2 0.3 0.3\n1\n", "row 2 has 1 columns; a polygon"),
]


@pytest.mark.parametrize(("text", "reason"), BAD_LABELS)
def test_bad_labels_are_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_labels(text)


def test_scan_counts_and_keeps_order(split):
    labels = scan_labels(split, nc=4)
    assert [path.name for path in labels.images] == [f"{number:02}.png" for number in range(12)]
    assert (labels.found, labels.missing, labels.empty, labels.corrupt) == (11, 1, 1, 0)
    assert [len(rows) for rows in labels.labels] == [1, 2, 3, 0, 2, 0, 1, 2, 3, 1, 2, 3]
    assert labels.instances == 20 and labels.messages == ()
    assert labels.sizes[:3].tolist() == [[60, 40], [40, 60], [50, 50]]


def test_bad_files_are_counted_named_and_skipped(split, capsys):
    write_image(split / "tiny.png", 9, 60)
    (split / "broken.jpg").write_bytes(b"\xff\xd8 no")
    (split / "blank.png").touch()
    for number, (text, _) in enumerate(BAD_LABELS):
        write_label(write_image(split / f"bad{number}.png"), text)
    (split.parents[1] / "labels" / "train" / "bad0.txt").write_bytes(b"\xff\xfe\x00")
    labels = scan_labels(split, nc=4)
    assert len(labels) == 12 and labels.corrupt == 3 + len(BAD_LABELS)
    output = capsys.readouterr().out
    assert "tiny.png: image ignored: 60x9 pixels" in output
    assert "broken.jpg: image ignored: cannot be read" in output
    assert "blank.png: image ignored: cannot be read" in output
    for number, (_, reason) in enumerate(BAD_LABELS[1:], start=1):
        assert any(f"bad{number}.txt: image ignored: " in line and reason in line for line in output.splitlines())
    assert "12 images, 2 backgrounds, 13 corrupt" in output


def test_a_class_beyond_nc_names_file_class_and_nc(split):
    for _ in range(2):  # scanned, then from the cache
        with pytest.raises(InputError, match=r"labels.train.01.txt: class 2, but the data set has nc = 2"):
            scan_labels(split, nc=2)


def test_no_usable_image_says_where_it_looked(tmp_path):
    with pytest.raises(InputError, match=f"no images in {tmp_path}"):
        scan_labels(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"?")
    with pytest.raises(InputError, match=f"no usable image in {tmp_path}: all 1 are corrupt, e.g. .*x.jpg"):
        scan_labels(tmp_path)


def test_images_without_any_label_are_warned_about(tmp_path, capsys):
    write_image(tmp_path / "images" / "a" / "1.png")
    assert scan_labels(tmp_path / "images" / "a").instances == 0
    assert f"should have its in {tmp_path}/labels/a/1.txt" in capsys.readouterr().out


# Cache ----------------------------------------------------------------------------------------------------------------


def test_cache_is_used_until_a_file_changes(split, monkeypatch):
    first = scan_labels(split)
    cache = split.parents[1] / "labels" / "train.cache.npz"
    assert cache.is_file()
    with monkeypatch.context() as patch:
        patch.setattr("utils.labels._scan", lambda *_: pytest.fail("scanned although nothing changed"))
        second = scan_labels(split)
    assert second.images == first.images and second.found == first.found and second.messages == first.messages
    np.testing.assert_array_equal(second.sizes, first.sizes)
    for one, two in zip(first.labels, second.labels, strict=True):
        assert two.dtype == np.float32
        np.testing.assert_array_equal(one, two)

    label = label_path(first.images[0])
    time.sleep(0.01)
    label.write_text(label.read_text().replace("0", "1", 1))  # the same size, a new time
    assert scan_labels(split).labels[0][0, 0] == 1
    first.images[4].unlink()
    assert len(scan_labels(split)) == 11


def test_cache_holds_no_pickle_and_remembers_bad_files(split):
    write_label(write_image(split / "bad.png"), "0 2 2 2 2\n")
    first = scan_labels(split)
    with zipfile.ZipFile(split.parents[1] / "labels" / "train.cache.npz") as archive:
        for name in archive.namelist():
            assert b"|O" not in archive.read(name)[:128]
    again = scan_labels(split)
    assert again.corrupt == 1 and again.messages == first.messages and len(again) == 12


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 junk", b"\x80\x04junk"])
def test_a_damaged_cache_is_rebuilt(split, damage):
    scan_labels(split)
    cache = split.parents[1] / "labels" / "train.cache.npz"
    cache.write_bytes(damage)
    assert len(scan_labels(split)) == 12
    with np.load(cache, allow_pickle=False) as content:
        assert len(content["kept"]) == 12


def test_a_cache_that_cannot_be_written_is_a_warning(split, capsys):
    (split.parents[1] / "labels" / "train.cache.npz").mkdir()
    assert len(scan_labels(split)) == 12
    assert "the label cache was not written" in capsys.readouterr().out
    assert sorted(path.name for path in (split.parents[1] / "labels").iterdir()) == ["train", "train.cache.npz"]


def test_a_list_has_its_cache_beside_it(split):
    (split.parents[1] / "some.txt").write_text("./images/train/00.png\n./images/train/07.png\n")
    assert len(scan_labels(split.parents[1] / "some.txt")) == 2
    assert (split.parents[1] / "some.cache.npz").is_file()


# Samples and batches --------------------------------------------------------------------------------------------------


def test_evaluation_sample_maps_back_to_the_original(split):
    labels = scan_labels(split)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=96))
    for position in range(len(dataset)):
        sample = dataset[0, position]
        assert sample.image.shape == (3, 96, 96) and sample.image.dtype == torch.uint8
        assert sample.index == position and sample.path == labels.images[position]
        (height, width), (gain, pad_x, pad_y) = sample.shape
        assert [width, height] == labels.sizes[position].tolist()
        centres = sample.labels[:, 2:].numpy() * 96
        back = (centres - [pad_x, pad_y, 0, 0]) / gain / [width, height, width, height]
        np.testing.assert_allclose(back, labels.labels[position][:, 1:], atol=0.01)


def test_evaluation_pixels_are_the_resized_rgb_image(split):
    labels = scan_labels(split)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=36))  # 40x60 shrinks to 24x36
    image = dataset[0, 0].image.numpy()
    expected = cv2.resize(load_image(labels.images[0]), (36, 24), interpolation=cv2.INTER_AREA)[..., ::-1]
    np.testing.assert_array_equal(image[:, 6:30], expected.transpose(2, 0, 1))
    assert (image[:, :6] == 114).all() and (image[:, 30:] == 114).all()


def test_rectangular_batches(split):
    labels = scan_labels(split)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=64, rect=True, stride=16, pad=0.5, batch_size=4))
    batches = list(make_loader(dataset, shuffle=True).epoch(0))
    # Heights over widths: 2 x 0.5, 2 x 2/3 | 2 x 0.75, 2 x 1 | 2 x 1.5, 2 x 2; a full side of 4 strides becomes 5.
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [(64, 80), (80, 80), (80, 64)]
    ratios = [height / width for batch in batches for (height, width), _ in batch.shapes]
    assert ratios == sorted(ratios)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(12))
    for batch in batches:
        for (height, width), (gain, _, _) in batch.shapes:
            assert gain == pytest.approx(64 / max(height, width), rel=0.03)


def test_single_class_leaves_the_label_set_alone(split):
    labels = scan_labels(split)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=64, single_cls=True))
    assert all((dataset[0, i].labels[:, 1] == 0).all() for i in range(12))
    assert max(rows[:, 0].max() for rows in labels.labels if len(rows)) == 3


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_augmented_labels_are_normalised_boxes_inside_the_image(split, mosaic):
    options = DatasetOptions(imgsz=64, augment=AugmentOptions(mosaic=mosaic, mixup=0.5, degrees=10, flipud=0.5))
    dataset = DetectionDataset(scan_labels(split), options)
    seen = 0
    for epoch in range(4):
        for position in range(12):
            sample = dataset[epoch, position]
            assert sample.image.shape == (3, 64, 64)
            centres, sides = sample.labels[:, 2:4], sample.labels[:, 4:]
            assert (centres - sides / 2 >= -1e-6).all() and (centres + sides / 2 <= 1 + 1e-6).all()
            assert (sides * 64 > 1.99).all()
            seen += len(sample.labels)
    assert seen > 40


def test_training_with_rect_keeps_the_batch_shape(split):
    options = DatasetOptions(imgsz=64, augment=AugmentOptions(), rect=True, stride=16, batch_size=4)
    loader = make_loader(DetectionDataset(scan_labels(split), options))
    shapes = [tuple(batch.images.shape) for batch in loader.epoch(0)]
    assert shapes == [(4, 3, 48, 64), (4, 3, 64, 64), (4, 3, 64, 48)]


def test_collate_numbers_the_images(split):
    dataset = DetectionDataset(scan_labels(split), DatasetOptions(imgsz=32))
    batch = collate([dataset[0, position] for position in (2, 3, 1)])  # three boxes, none, two
    assert batch.images.shape == (3, 3, 32, 32) and len(batch) == 3
    assert batch.targets[:, 0].tolist() == [0, 0, 0, 2, 2] and batch.indices == (2, 3, 1)
    assert batch.targets.dtype == torch.float32
    empty = collate([dataset[0, 3]])
    assert empty.targets.shape == (0, 6)


def equal(one, two) -> bool:
    return one.indices == two.indices and torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets)


def test_batches_depend_on_seed_and_epoch_but_not_on_workers(split):
    labels = scan_labels(split)
    options = DatasetOptions(imgsz=64, augment=AugmentOptions(mixup=0.5), batch_size=5, seed=3)
    alone = make_loader(DetectionDataset(labels, options), 0, shuffle=True)
    helped = make_loader(DetectionDataset(labels, replace(options, cache="ram")), 2, shuffle=True)
    assert len(alone) == len(helped) == 3
    torch.manual_seed(0)
    by_epoch = []
    for epoch in (0, 1, 0):
        mine, theirs = list(alone.epoch(epoch)), list(helped.epoch(epoch))
        assert [len(batch) for batch in mine] == [5, 5, 2]
        assert all(equal(one, two) for one, two in zip(mine, theirs, strict=True))
        assert sorted(index for batch in mine for index in batch.indices) == list(range(12))
        by_epoch.append(mine)
    drawn = torch.rand(1)
    assert all(equal(one, two) for one, two in zip(by_epoch[0], by_epoch[2], strict=True))
    assert not any(equal(one, two) for one, two in zip(by_epoch[0], by_epoch[1], strict=True))
    assert not torch.equal(alone.dataset[0, 0].image, alone.dataset[1, 0].image)
    other = list(make_loader(DetectionDataset(labels, replace(options, seed=4)), 0, shuffle=True).epoch(0))
    assert not equal(other[0], by_epoch[0][0])
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # loading has not touched torch's global generator


def test_an_abandoned_epoch_does_not_leak_into_the_next(split):
    dataset = DetectionDataset(scan_labels(split), DatasetOptions(imgsz=32, augment=AugmentOptions(), batch_size=2))
    helped, alone = make_loader(dataset, 2, shuffle=True), make_loader(dataset, 0, shuffle=True)
    next(helped.epoch(0))
    assert all(equal(one, two) for one, two in zip(helped.epoch(1), alone.epoch(1), strict=True))


def test_sampler_keeps_order_without_shuffle_and_binds_its_epoch():
    sampler = EpochBatchSampler(5, 2, shuffle=False, seed=0)
    first = iter(sampler)
    sampler.epoch = 1
    assert [batch.keys for batch in first] == [((0, 0), (0, 1)), ((0, 2), (0, 3)), ((0, 4),)]
    assert [(batch.number, batch.total) for batch in sampler] == [(0, 2), (1, 2), (2, 1)]
    assert next(iter(sampler)).keys == ((1, 0), (1, 1)) and len(sampler) == 3


@pytest.mark.parametrize("training", [True, False])
def test_the_slices_of_several_processes_make_up_the_batches_of_one(training):
    whole = list(EpochBatchSampler(10, 4, shuffle=True, seed=3))
    parts = [list(EpochBatchSampler(10, 4, True, 3, 1, World(rank, 3), training)) for rank in range(3)]
    for batch in whole:
        slices = [next((p.keys for p in part if p.number == batch.number), ()) for part in parts]
        if training and batch.total < 3:
            assert slices == [batch.keys] * 3, "a batch too small to share is trained on whole by all"
        else:
            assert sum(slices, ()) == batch.keys
    assert whole[-1].total == 2 and all(len(part) == len(whole) for part in parts if training)
    assert [len(part) for part in parts] == ([3, 3, 3] if training else [3, 3, 2])


def test_slices_keep_the_groups_that_become_one_image_together():
    whole = list(EpochBatchSampler(27, 16, shuffle=True, seed=3, group=4))
    assert [(len(b.keys), b.total) for b in whole] == [(16, 4), (8, 2)], "the three that make no group are left out"
    parts = [list(EpochBatchSampler(27, 16, True, 3, 4, World(rank, 2), True)) for rank in range(2)]
    assert [[len(b.keys) for b in part] for part in parts] == [[8, 4], [8, 4]]
    assert parts[0][0].keys + parts[1][0].keys == whole[0].keys


def test_drawn_positions_take_the_place_of_each_one_once():
    sampler = EpochBatchSampler(4, 4, shuffle=False, seed=0)
    sampler.drawn = np.array([2, 2, 0, 1])
    assert next(iter(sampler)).keys == ((0, 2), (0, 2, 1), (0, 0), (0, 1)), "what comes again is another copy"


def test_copies_of_an_image_are_augmented_in_other_ways(split):
    dataset = DetectionDataset(scan_labels(split), DatasetOptions(imgsz=64, augment=AugmentOptions()))
    first, again, copy, other = (dataset[key].image for key in ((3, 1), (3, 1), (3, 1, 1), (3, 1, 2)))
    assert torch.equal(first, again) and torch.equal(copy, dataset[3, 1, 1].image)
    assert not torch.equal(first, copy) and not torch.equal(copy, other)


def test_multi_scale_draws_sizes_by_seed_epoch_and_number_within_half_to_one_and_a_half():
    options = DatasetOptions(imgsz=128, multi_scale=True)
    sizes = [drawn_size(options, epoch, number) for epoch in range(4) for number in range(50)]
    assert sizes == [drawn_size(options, epoch, number) for epoch in range(4) for number in range(50)]
    assert set(sizes) == {64, 96, 128, 160, 192} and len(set(sizes[:20])) > 2


def test_a_rescaled_batch_keeps_its_labels_and_its_picture(split):
    dataset = DetectionDataset(scan_labels(split), DatasetOptions(imgsz=64, batch_size=2))
    batch = next(make_loader(dataset).epoch(0))
    larger = rescaled(batch, 96)
    assert larger.images.shape == (2, 3, 96, 96) and torch.equal(larger.targets, batch.targets)
    wanted = torch.nn.functional.interpolate(batch.images.float(), size=(96, 96), mode="bilinear")
    assert (larger.images.float() - wanted).abs().max() <= 1
    assert rescaled(batch, 64) is batch


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_in_one_line(split, workers):
    labels = scan_labels(split)
    loader = make_loader(DetectionDataset(labels, DatasetOptions(imgsz=32, batch_size=4)), workers)
    labels.images[6].unlink()
    message = ""
    try:  # not pytest.raises, whose record of the error would keep the workers alive
        list(loader.epoch(0))
    except InputError as error:
        message = str(error)
    assert message == f"image {labels.images[6]}: No such file or directory; was it moved or deleted?"


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_cached_images_give_the_same_samples(split, cache):
    labels = scan_labels(split)
    for augment in (None, AugmentOptions()):
        plain = DetectionDataset(labels, DatasetOptions(imgsz=48, augment=augment))
        cached = DetectionDataset(labels, DatasetOptions(imgsz=48, augment=augment, cache=cache))
        for position in range(12):
            assert torch.equal(plain[1, position].image, cached[1, position].image)
            assert torch.equal(plain[1, position].labels, cached[1, position].labels)


def test_disk_cache_follows_its_image(split):
    labels = scan_labels(split)
    options = DatasetOptions(imgsz=60, cache="disk")
    DetectionDataset(labels, options)
    stored = split / "00.png.npy"
    np.testing.assert_array_equal(np.load(stored, allow_pickle=False), load_image(labels.images[0]))
    assert len(scan_labels(split)) == 12  # the arrays are no images
    dataset = DetectionDataset(labels, options)
    time.sleep(0.01)
    cv2.imwrite(str(labels.images[0]), np.full((40, 60, 3), 7, np.uint8))
    assert (dataset[0, 0].image[:, 10:50] == 7).all()
    stored.write_bytes(b"junk")
    assert (dataset[0, 0].image[:, 10:50] == 7).all()


def test_ram_cache_that_does_not_fit_is_a_warning(split, monkeypatch, capsys):
    monkeypatch.setattr("utils.image_cache._available_memory", lambda: 1000)
    dataset = DetectionDataset(scan_labels(split), DatasetOptions(imgsz=64, cache="ram"))
    assert "--cache ram: needs" in capsys.readouterr().out
    assert dataset[0, 0].image.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [({"cache": "tape"}, "--cache tape"), ({"seed": -1}, "--seed -1"), ({"batch_size": 0}, "--batch-size 0")],
)
def test_bad_options_name_their_flag(wrong, flag):
    with pytest.raises(InputError, match=flag):
        DatasetOptions(**wrong)


@pytest.mark.skipif("COCO128_DIR" not in os.environ, reason="COCO128_DIR (with images/{train,val}2017) is not set")
@pytest.mark.parametrize(("name", "instances", "missing"), [("val2017", 898, 0), ("train2017", 929, 2)])
def test_coco128_counts(name, instances, missing, monkeypatch):
    monkeypatch.setattr("utils.labels._write_cache", lambda *_: None)  # leave the evaluation data as it is
    labels = scan_labels(Path(os.environ["COCO128_DIR"]) / "images" / name, nc=80)
    assert len(labels) == 128 and labels.instances == instances
    assert labels.missing + labels.empty == missing and labels.corrupt == 0
