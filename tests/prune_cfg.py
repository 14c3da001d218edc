"""Writes YOLOv5 models as the pruning repositories before us wrote them: cfg text in their dialect and their order of blocks.

It knows nothing of `models/`: what it writes follows from the published order (C3: cv2, cv1, bottlenecks, cv3; a head behind the layer it reads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil


@dataclass
class PruneCfg:
    """Sections of a cfg under construction; `act`: the activation of every convolution."""

    depth: float = 0.33
    width: float = 0.25
    act: str = "SiLU"
    csp: bool = False
    sections: list[str] = field(default_factory=list)

    def add(self, kind: str, *lines: str) -> int:
        self.sections.append("\n".join([f"[{kind}]", *lines]))
        return len(self.sections) - 1

    def wide(self, channels: int) -> int:
        return ceil(channels * self.width / 8) * 8

    def conv(self, filters: int, size: int = 1, stride: int = 1, pad: int = 1) -> int:
        return self.add(
            "convolutional",
            "batch_normalize=1",
            f"filters={filters}",
            f"size={size}",
            f"stride={stride}",
            f"pad={pad}",
            f"activation={self.act}",
        )

    def route(self, *layers: int) -> int:
        return self.add("route", f"layers = {', '.join(map(str, layers))}")

    def c3(self, channels: int, repeats: int, add: bool = True) -> int:
        c, n = self.wide(channels), max(round(repeats * self.depth), 1)
        bare = lambda: self.add("convolutional_nobias", f"filters={c // 2}", "size=1", "stride=1", "pad=1", "activation=linear")  # noqa: E731
        bare() if self.csp else self.conv(c // 2)
        self.route(-2)
        self.conv(c // 2)
        for _ in range(n):
            self.conv(c // 2)
            self.conv(c // 2, 3)
            if add:
                self.add("shortcut", "from=-3", "activation=linear")
        if self.csp:
            bare()
        self.route(-1, -((3 if add else 2) * n + 3 + self.csp))
        if self.csp:
            self.add("convolutional_noconv", f"filters={c}", "activation=leaky")
        return self.conv(c)

    def sppf(self, channels: int) -> int:
        self.conv(self.wide(channels) // 2)
        for _ in range(3):
            self.add("maxpool", "stride=1", "size=5")
        self.route(-4, -3, -2, -1)
        return self.conv(self.wide(channels))

    def spp(self, channels: int) -> int:
        self.conv(self.wide(channels) // 2)
        for size, back in ((5, -2), (9, -4), (13, None)):
            self.add("maxpool", "stride=1", f"size={size}")
            if back is not None:
                self.route(back)
        self.route(-6, -5, -3, -1)
        return self.conv(self.wide(channels))

    def head(self, level: int, classes: int, anchors: str, levels: int) -> None:
        self.add("convolutional", "size=1", "stride=1", "pad=1", f"filters={3 * (classes + 5)}", "activation=linear")
        mask = ",".join(str(3 * level + k) for k in range(3))
        self.add(
            "yolo", f"mask = {mask}", f"anchors = {anchors}", f"classes={classes}", f"num={3 * levels}", "jitter=.3", "ignore_thresh = .7",
            "truth_thresh = 1", "random=1",
        )  # fmt: skip

    def text(self) -> str:
        net = "[net]\n# Training\nbatch=64\nsubdivisions=16\nwidth=640\nheight=640\nchannels=3\nmomentum=0.949\nlearning_rate=0.00261\npolicy=steps\nsteps=1,2"
        return "\n\n".join([net, *self.sections]) + "\n"


P5_ANCHORS = "10,13,  16,30,  33,23,  30,61,  62,45,  59,119,  116,90,  156,198,  373,326"


def p5(depth: float = 0.33, width: float = 0.25, classes: int = 80, old: bool = False, csp: bool = False, act: str = "SiLU") -> PruneCfg:
    """YOLOv5's P5 model; `old`: of v5.0 and before, with Focus and SPP; `csp`: with BottleneckCSP for C3."""
    cfg = PruneCfg(depth, width, act, csp)
    w = cfg.wide
    if old:
        cfg.add("focus", "filters=12")
        cfg.conv(w(64), 3)
    else:
        cfg.conv(w(64), 6, 2, 2)
    cfg.conv(w(128), 3, 2)
    cfg.c3(128, 3)
    cfg.conv(w(256), 3, 2)
    p3 = cfg.c3(256, 9 if old else 6)
    cfg.conv(w(512), 3, 2)
    p4 = cfg.c3(512, 9)
    cfg.conv(w(1024), 3, 2)
    if old:
        cfg.spp(1024)
        cfg.c3(1024, 3, False)
    else:
        cfg.c3(1024, 3)
        cfg.sppf(1024)
    top = cfg.conv(w(512))
    cfg.add("upsample", "stride=2")
    cfg.route(-1, p4)
    cfg.c3(512, 3, False)
    middle = cfg.conv(w(256))
    cfg.add("upsample", "stride=2")
    cfg.route(-1, p3)
    for level, (channels, other) in enumerate(((256, None), (512, middle), (1024, top))):
        if other is not None:
            cfg.route(-3)
            cfg.conv(w(channels // 2), 3, 2)
            cfg.route(-1, other)
        cfg.c3(channels, 3, False)
        cfg.head(level, classes, P5_ANCHORS, 3)
    return cfg


P6_ANCHORS = "19,27,  44,40,  38,94,  96,68,  86,152,  180,137,  140,301,  303,264,  238,542,  436,615,  739,380,  925,792"


def p6(depth: float = 0.33, width: float = 0.25, classes: int = 80) -> PruneCfg:
    """YOLOv5 v6's P6 model."""
    cfg = PruneCfg(depth, width)
    w = cfg.wide
    cfg.conv(w(64), 6, 2, 2)
    taps = []
    for channels, repeats in ((128, 3), (256, 6), (512, 9), (768, 3), (1024, 3)):
        cfg.conv(w(channels), 3, 2)
        taps.append(cfg.c3(channels, repeats))
    cfg.sppf(1024)
    tops = []
    for channels, tap in ((768, taps[3]), (512, taps[2]), (256, taps[1])):
        tops.append(cfg.conv(w(channels)))
        cfg.add("upsample", "stride=2")
        cfg.route(-1, tap)
        cfg.c3(channels, 3, False)
    cfg.head(0, classes, P6_ANCHORS, 4)
    for level, channels in enumerate((512, 768, 1024), start=1):
        cfg.route(-3)
        cfg.conv(w((256, 512, 768)[level - 1]), 3, 2)
        cfg.route(-1, tops[3 - level])
        cfg.c3(channels, 3, False)
        cfg.head(level, classes, P6_ANCHORS, 4)
    return cfg
