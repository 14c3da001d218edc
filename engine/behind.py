"""Work that runs one step behind the loop that hands it over, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """Yield `submit(work, *args)`: run `work` while the caller goes on, in the order of the calls.

    `submit` first waits for the work before it, so at most one piece is under way; an error in it comes out of the next `submit`,
    or of the end of the block, which waits for the last piece.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "behind", _one_torch_thread) as pool:
        pending: Future = pool.submit(_nothing)

        def submit(work: Callable[..., None], *args: Any) -> None:
            nonlocal pending
            pending.result()
            pending = pool.submit(work, *args)

        pending.result()
        # torch remembers the last number asked for in any thread, for threads to come; each running thread keeps its own.
        torch.set_num_threads(threads)
        yield submit
        pending.result()


def _nothing() -> None: ...


def _one_torch_thread() -> None:
    """Keep this thread's small tensors off the processors that the network computes on."""
    torch.get_num_threads()  # sets the thread up: done later, that would undo the next line
    torch.set_num_threads(1)
