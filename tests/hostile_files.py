"""A folder of files that break careless readers, each with what has to become of it. Run as a script, it writes the folder.

    python -m tests.hostile_files FOLDER

writes FOLDER/images/hostile, FOLDER/labels/hostile and FOLDER/data.yaml (three classes).
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

NC = 3
BOX = "1 0.5 0.5 0.4 0.3"  # the label of every image that is not about labels
ROW = (1, 0.5, 0.5, 0.4, 0.3)
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Case:
    """One image and its label.

    name: of the image; may have folders.  image, label: contents; a label of None is no file.  rows: the boxes expected,
    or None if the image has to be dropped.  size: (width, height) expected.  message: what the log says about it, empty
    if nothing.  in_label: whether the message names the label instead of the image.
    """

    name: str
    image: bytes
    label: bytes | None = BOX.encode()
    rows: Rows | None = (ROW,)
    size: tuple[int, int] = (60, 40)
    message: str = ""
    in_label: bool = False

    @property
    def kept(self) -> bool:
        return self.rows is not None


# Pictures -------------------------------------------------------------------------------------------------------------


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth colours, with a red box where `BOX` says."""
    coarse = np.random.default_rng(0).integers(0, 160, (5, 5, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels[round(0.35 * height) : round(0.65 * height), round(0.3 * width) : round(0.7 * width)] = (230, 20, 20)
    return Image.fromarray(pixels)


def coded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(image: Image.Image, kind: str) -> bytes:
    """A colour image with 16 bits per channel, which Pillow cannot write."""
    return cv2.imencode(kind, np.asarray(image)[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def turned(orientation: int) -> bytes:
    """A JPEG stored such that it is displayed as `picture()` once turned by its EXIF orientation."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose that undoes it
    image = picture() if orientation == 1 else picture().transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x112] = orientation
    return coded(image, "JPEG", quality=95, exif=exif)


def huge_png(width: int, height: int) -> bytes:
    """A black one-bit PNG of few bytes and many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _kinds() -> Iterator[Case]:
    """Every kind of image that is read."""
    image, gray = picture(), picture().convert("L")
    jpeg = coded(image, "JPEG", quality=95)
    cmyk = coded(image.convert("CMYK"), "JPEG", quality=95)  # inverted, with Adobe's marker
    contents = {
        "plain.jpg": jpeg,
        "progressive.jpg": coded(image, "JPEG", progressive=True),
        "upper case.JPG": jpeg,
        "long suffix.jpeg": jpeg,
        "cmyk adobe.jpg": cmyk,
        "cmyk plain.jpg": cmyk.replace(cmyk[cmyk.index(b"\xff\xee") :][:16], b"", 1),  # without the marker
        "gray.jpg": coded(gray, "JPEG"),
        "trailing junk.jpg": jpeg + b"\0" * 100,
        "really a png.jpg": coded(image),
        "really a jpeg.png": jpeg,
        "really a gif.png": coded(image, "GIF"),
        "gray.png": coded(gray),
        "gray alpha.png": coded(image.convert("LA")),
        "colour alpha.png": coded(image.convert("RGBA")),
        "palette.png": coded(image.convert("P")),
        "palette transparent.png": coded(image.convert("P"), transparency=0),
        "one bit.png": coded(image.convert("1")),
        "16 bit gray.png": coded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)),
        "16 bit colour.png": deep(image, ".png"),
        "16 bit colour.tif": deep(image, ".tif"),
        "cmyk.tif": coded(image.convert("CMYK"), "TIFF"),
        "fax.tiff": coded(image.convert("1"), "TIFF", compression="group4"),
        "pages.tif": coded(image, "TIFF", save_all=True, append_images=[image.rotate(180)]),
        "two frames.mpo": coded(image, "MPO", save_all=True, append_images=[image]),
        "animated.webp": coded(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
        "bitmap.bmp": coded(image, "BMP"),
    }
    yield from (Case(name, content) for name, content in contents.items())
    yield from (Case(f"turned {orientation}.jpg", turned(orientation)) for orientation in range(1, 9))


def _sizes() -> Iterator[Case]:
    for width, height in ((10, 10), (12000, 40), (40, 12000), (12000, 10), (10, 12000)):
        yield Case(f"{width}x{height}.png", coded(picture(width, height)), size=(width, height))
    for width, height in ((1, 1), (9, 9), (12000, 9), (1, 12000)):
        message = f"{width}x{height} pixels; each side must have at least 10"
        yield Case(f"{width}x{height}.png", coded(Image.new("RGB", (width, height))), rows=None, message=message)
    message = "14000x13000 pixels; at most 178956970 are read"
    yield Case("bomb.png", huge_png(14000, 13000), rows=None, message=message)
    # OpenCV itself refuses a header of more than 2**30 pixels, or of 0.
    header = coded(picture())
    for name, sides in (("impossible.png", (2**20, 2**20)), ("nothing.png", (0, 0))):
        ihdr = b"IHDR" + struct.pack(">II", *sides) + header[24:29]
        content = header[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + header[33:]
        yield Case(name, content, rows=None, message="cannot be read as an image")


def _broken() -> Iterator[Case]:
    """Images of which something is missing or wrong."""
    jpeg, progressive = coded(picture(), "JPEG", quality=95), coded(picture(), "JPEG", progressive=True)
    png, webp, tiff, bmp = (coded(picture(), kind) for kind in ("PNG", "WEBP", "TIFF", "BMP"))
    contents = {
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text.png": b"not an image\n",
        "zeros.jpg": bytes(5000),
        "start only.jpg": jpeg[:2],
        "header only.jpg": jpeg[:20],
        "two starts.jpg": jpeg[:2] * 2,
        "cut.png": png[: len(png) // 2],
        "cut at 99.png": png[: len(png) * 99 // 100],
        "cut.webp": webp[: len(webp) // 2],
        "cut.tif": tiff[: len(tiff) // 2],
        "cut.bmp": bmp[: len(bmp) // 2],
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"/>',
        "float.tif": coded(picture().convert("F"), "TIFF"),
    }
    yield from (Case(name, content, rows=None, message="cannot be read as an image") for name, content in contents.items())
    for name in ("zero bytes.jpg", "zero bytes.png", "zero bytes.tif"):
        yield Case(name, b"", rows=None, message="cannot be read as an image: it is empty")
    short = "the JPEG is cut short"
    yield Case("cut at 50.jpg", jpeg[: len(jpeg) // 2], rows=None, message=short)
    yield Case("cut at 90.jpg", jpeg[: len(jpeg) * 9 // 10], rows=None, message=short)
    yield Case("progressive cut.jpg", progressive[:-30], rows=None, message=short)
    yield Case("no end marker.jpg", jpeg[:-2], message="JPEG without its end marker")
    yield Case("half an end marker.jpg", jpeg[:-1], message="JPEG without its end marker")


# Names ----------------------------------------------------------------------------------------------------------------


def _names() -> Iterator[Case]:
    content = coded(picture())
    names = [
        "plain.png", "with blank.png", "  leading.png", "trailing .png", "a.b.c.png", "#1.png", "100%.png", "%d.png",
        "{0}.png", "a,b;c.png", "quote's \".png", "[x]*?.png", "-dash.png", "~home.png", "$HOME.png", "back\\slash.png", "tab\there.png",
        "line\nend.png", "Größe.png", "猫.png", "кот.png", "قط.png", "😀.png", "e\u0301.png", "\u202ertl.png", "null.png",
        f"{'long' * 62}.png", "images/nested.png", "a/images/b/deep.png", "deep/er/and/deeper.png",
    ]  # fmt: skip
    yield from (Case(f"names/{name}", content) for name in names)
    undecodable = os.fsdecode(b"names/caf\xe9.png")  # Latin-1, as unpacked from an old archive
    yield Case(undecodable, content, rows=None, message="the path is not text in UTF-8; rename it")


# Labels ---------------------------------------------------------------------------------------------------------------


def _labels() -> Iterator[Case]:
    content = coded(picture())
    polygon = (1, 0.5, 0.5, 0.4, 0.3)
    kept: dict[str, tuple[str | bytes, Rows, str]] = {
        "windows": (f"{BOX}\r\n0 0.5 0.5 0.2 0.2\r\n", (ROW, (0, 0.5, 0.5, 0.2, 0.2)), ""),
        "old mac": (f"{BOX}\r0 0.5 0.5 0.2 0.2\r", (ROW, (0, 0.5, 0.5, 0.2, 0.2)), ""),
        "bom": (b"\xef\xbb\xbf" + BOX.encode(), (ROW,), ""),
        "tabs": (BOX.replace(" ", "\t"), (ROW,), ""),
        "blanks": (f"\n\n   {BOX}   \n \t \n", (ROW,), ""),
        "zero bytes": ("", (), ""),
        "blank lines": (" \n\n\r\n", (), ""),
        "whole float class": (f"1.0{BOX[1:]}", (ROW,), ""),
        "exponents": ("1e0 5e-1 +.5 4E-1 3.0e-01", (ROW,), ""),
        "minus zero": ("0 0.5 0.5 -0.0 0.3", ((0, 0.5, 0.5, 0, 0.3),), ""),
        "no area": ("0 0.5 0.5 0 0\n2 0.5 0.5 0 0.3", ((0, 0.5, 0.5, 0, 0), (2, 0.5, 0.5, 0, 0.3)), ""),
        "tiny": ("0 0.5 0.5 1e-9 1e-30", ((0, 0.5, 0.5, 1e-9, 1e-30),), ""),
        "whole": ("0 0.5 0.5 1 1", ((0, 0.5, 0.5, 1, 1),), ""),
        "over the edge": ("0 1 1 1 1", ((0, 1, 1, 1, 1),), ""),
        "rounds to one": ("0 1.00000001 0.5 0.4 0.3", ((0, 1, 0.5, 0.4, 0.3),), ""),
        "duplicates": (f"{BOX}\n0 0.5 0.5 0.2 0.2\n{BOX}\n{BOX}\n", ((0, 0.5, 0.5, 0.2, 0.2), ROW), "2 duplicate labels removed"),
        "polygon": ("1 0.3 0.35 0.7 0.35 0.7 0.65 0.3 0.65", (polygon,), ""),
        "triangle": ("1 0.3 0.35 0.7 0.5 0.4 0.65", (polygon,), ""),
        "polygon and box": ("1 0.3 0.35 0.7 0.35 0.7 0.65\n1 0.3 0.35 0.7 0.65", (polygon,), "read as two points each"),
        "many rows": (
            "".join(f"{i % 3} 0.5 0.5 0.4 {i / 1000}\n" for i in range(1000)),
            tuple((i % 3, 0.5, 0.5, 0.4, i / 1000) for i in range(1000)),
            "",
        ),
    }
    for name, (label, rows, message) in kept.items():
        raw = label if isinstance(label, bytes) else label.encode()
        yield Case(f"labels {name}.png", content, raw, rows, message=message, in_label=True)

    dropped: dict[str, tuple[str | bytes, str]] = {
        "nan": (f"{BOX}\n0 nan 0.5 0.1 0.1", "row 2: a value is not a finite number"),
        "inf": ("0 0.5 0.5 inf 0.1", "row 1: a value is not a finite number"),
        "overflow": ("0 0.5 0.5 1e39 0.1", "row 1: a value is not a finite number"),
        "inf polygon": ("0 inf inf inf inf inf inf", "row 1: a value is not a finite number"),
        "huge polygon": ("0 3e38 0.1 3e38 0.3 3e38 0.4", "row 1: a value is not a finite number"),
        "nan class": ("nan 0.5 0.5 0.1 0.1", "row 1: a value is not a finite number"),
        "negative": ("0 0.5 -0.1 0.1 0.1", "row 1: negative value -0.1"),
        "negative class": ("-1 0.5 0.5 0.1 0.1", "row 1: negative value -1"),
        "above 1": ("0 1.5 0.5 0.1 0.1", "row 1: coordinate 1.5 is above 1"),
        "just above 1": ("0 1.0000001 0.5 0.1 0.1", "row 1: coordinate 1.00000012 is above 1"),
        "pixels": ("0 30 20 24 12", "row 1: coordinate 30 is above 1"),
        "4 columns": ("0 0.5 0.5 0.1", "row 1 has 4 columns; a box has 5"),
        "6 columns": (f"{BOX}\n0 0.5 0.5 0.1 0.1 0.9", "row 2 has 6 columns; a box has 5"),
        "8 columns": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "row 1 has 8 columns; a polygon has an odd number"),
        "1 column": ("0", "row 1 has 1 columns"),
        "commas": ("0,0.5,0.5,0.1,0.1", "row 1 has 1 columns"),
        "comma decimals": ("0 0,5 0,5 0,1 0,1", "could not convert string to float: '0,5'"),
        "names": ("cat 0.5 0.5 0.1 0.1", "could not convert string to float: 'cat'"),
        "hexadecimal": ("0x1 0.5 0.5 0.1 0.1", "could not convert string to float: '0x1'"),
        "broken class": ("0.5 0.5 0.5 0.1 0.1", "row 1: a class is not a whole number"),
        "class 3": (f"3 0.5 0.5 0.1 0.1\n{BOX}", "class 3, but the data set has nc = 3"),
        "class {0} {x}": (f"7 0.5 0.5 0.1 0.1\n{BOX}", "class 7, but the data set has nc = 3"),
        "class 80": (f"{BOX}\n80 0.5 0.5 0.1 0.1", "class 80, but the data set has nc = 3"),
        "class 1e30": ("1e30 0.5 0.5 0.1 0.1", "class 1000000015047466219876688855040, but the data set has nc = 3"),
        "polygon class 3": ("3 0.3 0.35 0.7 0.5 0.4 0.65", "class 3, but the data set has nc = 3"),
        "utf-16": (b"\xff\xfe" + BOX.encode("utf-16-le"), "is not text in UTF-8"),
        "utf-16 without bom": (BOX.encode("utf-16-le"), "could not convert string to float: '1\\x00'"),
        "nul": (f"{BOX}\n\0\0\0\0", "row 2 has 1 columns"),
        "nul in a number": (f"{BOX}\0", "could not convert string to float: '0.3\\x00'"),
        "binary": (bytes(range(256)), "is not text in UTF-8"),
        "xml": ("<annotation><object><name>cat</name></object></annotation>", "row 1 has 1 columns"),
    }
    for name, (label, message) in dropped.items():
        raw = label if isinstance(label, bytes) else label.encode()
        yield Case(f"labels {name}.png", content, raw, None, message=message, in_label=True)
    yield Case("labels missing.png", content, None, ())


# The folder -----------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [*_kinds(), *_sizes(), *_broken(), *_names(), *_labels()]


def label_of(image: Path) -> Path:
    """The label's path, worked out apart from the code under test."""
    parts = list(image.parts)
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 : -1], image.stem + ".txt")


def write_hostile(root: Path) -> tuple[Path, dict[Path, Case]]:
    """Write the folder; return its yaml and what each image (also of `special_files`) has to become."""
    folder = root / "images" / "hostile"
    expected = {}
    for case in cases():
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.image)
        label_of(path).parent.mkdir(parents=True, exist_ok=True)
        if case.label is not None:
            label_of(path).write_bytes(case.label)
        expected[path] = case
    expected |= _special_files(folder)
    yaml = root / "data.yaml"
    yaml.write_text(f"path: {root}\ntrain: images/hostile\nval: images/hostile\nnames: [a, b, c]\n")
    return yaml, expected


def _special_files(folder: Path) -> dict[Path, Case]:
    """What is no ordinary file: pipes, devices, folders with an image's name, links of every kind."""
    labels = label_of(folder / "x.png").parent

    def image(name: str, **fields: object) -> tuple[Path, Case]:
        (labels / name).with_suffix(".txt").write_text(BOX)
        return folder / name, Case(name, b"", **fields)

    def dropped(name: str, message: str, in_label: bool = False) -> tuple[Path, Case]:
        return image(name, rows=None, message=message, in_label=in_label)

    found = dict([
        dropped("pipe.jpg", "is not a file"), dropped("device.jpg", "is not a file"), dropped("dangling link.jpg", "No such file"),
        dropped("link to itself.jpg", "Too many levels of symbolic links"),
        dropped("label is a folder.png", "is not a file", True), dropped("label is a pipe.png", "is not a file", True),
        dropped("label dangles.png", "is not a file", True), image("link.png"), image("second link.png"),
    ])  # fmt: skip
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink("gone.jpg", folder / "dangling link.jpg")
    os.symlink("link to itself.jpg", folder / "link to itself.jpg")
    outside = folder.parents[1] / "outside"
    outside.mkdir()
    (outside / "original.png").write_bytes(coded(picture()))
    for name in ("link.png", "second link.png"):
        os.symlink(outside / "original.png", folder / name)
    for name in ("label is a folder", "label is a pipe", "label dangles"):
        (folder / f"{name}.png").write_bytes(coded(picture()))
        (labels / f"{name}.txt").unlink()
    (labels / "label is a folder.txt").mkdir()
    os.mkfifo(labels / "label is a pipe.txt")
    os.symlink("gone.txt", labels / "label dangles.txt")

    # Folders: an empty one, one with an image's name, hidden things, loops, and two ways to one folder.
    (folder / "empty").mkdir()
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").write_bytes(coded(picture()))
    found[folder / "folder.jpg" / "inside.png"] = Case("folder.jpg/inside.png", b"", rows=())
    (folder / ".hidden.png").write_bytes(b"junk")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"junk")
    (folder / "Thumbs.db").write_bytes(b"junk")
    (folder / "notes.txt").write_text("not a label")
    (folder.parent / "other split").mkdir()
    (folder.parent / "other split" / "not to be found.png").write_bytes(coded(picture()))
    os.symlink(folder.parent, folder / "loop to the parent")
    os.symlink(folder, folder / "loop to itself")
    os.symlink("loop", folder / "loop")
    os.symlink(folder / "folder.jpg", folder / "a way to folder")
    return found


if __name__ == "__main__":
    yaml, expected = write_hostile(Path(sys.argv[1]).resolve())
    print(f"{yaml}: {len(expected)} images, {sum(case.kept for case in expected.values())} of them usable")
