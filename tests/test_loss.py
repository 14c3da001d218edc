"""The loss reads a head map in one pass; the gradient must be the one that plain indexing gives. (Its values: test_training.py.)"""

from __future__ import annotations

import pytest
import torch

from utils.decode import split_anchors
from utils.loss import _Pick


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("matches", [0, 40])
def test_picked_parts_and_their_gradient_equal_plain_indexing(matches, layout, dtype):
    generator = torch.Generator().manual_seed(matches)
    raw = torch.randn(2, 3 * 7, 4, 5, generator=generator).to(dtype).to(memory_format=layout).requires_grad_()
    # 40 draws from 120 cells: some cells are matched more than once, and their gradients add up.
    index = tuple(torch.randint(n, (matches,), generator=generator) for n in (2, 3, 4, 5))
    weights = torch.randn(matches, 7, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)

    p = split_anchors(raw, 3)
    plain = p[index], p[..., 4]
    picked = _Pick.apply(raw, 3, *index)
    for one, two in zip(plain, picked, strict=True):
        assert torch.equal(one, two)
    gradients = [torch.autograd.grad(sum((part.float() * w).sum() for part, w in zip(parts, weights)), raw)[0] for parts in (plain, picked)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0 and gradients[1].stride() == raw.stride()
