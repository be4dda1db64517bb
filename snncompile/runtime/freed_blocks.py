"""Memory that a call frees stays with the process for the next call.

glibc takes a block above a threshold fresh from the system, page by page, and gives it back when it is freed; so it
does with the free end of its heap above twice that. The threshold follows the largest block that a program has freed so
far, up to 32 MiB. A network's first calls would raise it bit by bit, or leave it low where all blocks are of a middling
size; one block of the largest size that counts, which nobody writes to, raises it at once. What a user has set
(`MALLOC_…`, `mallopt`) stays as it is, and other C libraries take no notice.
"""

from __future__ import annotations

from functools import cache

import torch

_LARGEST_BYTES = 32 * 2**20 - 64 * 2**10  # that counts, with what the allocator adds


@cache
def keep_freed_blocks() -> None:
    """Once in a process, for tensors on the CPU."""
    torch.empty(_LARGEST_BYTES, dtype=torch.uint8)
