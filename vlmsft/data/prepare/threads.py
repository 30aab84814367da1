"""Work spread over threads: reading, writing, hashing and decoding images all release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> Iterator[Result]:
    """work(item) of each item, in their order. The first error ends it: what is under way is finished, not the rest."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
