"""Images as networks read them, planes (C, H, W), and as OpenCV has them, (H, W, 3) BGR: colour (C = 3) or grey (C = 1).

Planes are views of (H, W, C) arrays: the memory layout that torch calls channels last, and that networks here compute in.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch


def to_planes(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 3) BGR uint8 -> (channels, H, W) uint8: RGB, or with one channel OpenCV's grey (BT.601)."""
    pixels = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if channels == 3 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None]
    return pixels.transpose(2, 0, 1)


def to_bgr(planes: np.ndarray) -> np.ndarray:
    """(3, H, W) RGB or (1, H, W) grey -> (H, W, 3) BGR."""
    return np.ascontiguousarray(np.broadcast_to(planes, (3, *planes.shape[1:]))[::-1].transpose(1, 2, 0))


def resize_planes(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, H, W) -> (C, height, width) for `size` = (width, height), bilinear."""
    resized = cv2.resize(planes.transpose(1, 2, 0), size, interpolation=cv2.INTER_LINEAR)
    return resized.reshape(size[1], size[0], -1).transpose(2, 0, 1)  # of one channel OpenCV gives no axis


def stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Planes (C, H, W) of one size -> a batch (B, C, H, W), channels last in memory."""
    return torch.from_numpy(np.stack([planes.transpose(1, 2, 0) for planes in images])).permute(0, 3, 1, 2)
