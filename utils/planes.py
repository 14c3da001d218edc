"""Images as networks read them, (C, H, W), and as OpenCV has them, (H, W, 3) BGR: colour (C = 3) or grey (C = 1)."""

from __future__ import annotations

import cv2
import numpy as np


def to_planes(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 3) BGR uint8 -> contiguous (channels, H, W) uint8: RGB, or with one channel OpenCV's grey (BT.601)."""
    if channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[None]
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, [planes[2], planes[1], planes[0]])  # twice as fast as numpy's transposed copy
    return planes


def to_bgr(planes: np.ndarray) -> np.ndarray:
    """(3, H, W) RGB or (1, H, W) grey -> (H, W, 3) BGR."""
    return np.ascontiguousarray(np.broadcast_to(planes, (3, *planes.shape[1:]))[::-1].transpose(1, 2, 0))
