"""Memory for the tensors of a model: torch's own, in large pages where the kernel has them.

Fresh memory costs more than the bytes that are read into it: the kernel makes a page for every 4 KiB
when it is first written. Where it is told so it makes one for 2 MiB. That is advice, which changes
the time and nothing else: what is not followed (a kernel without large pages, none free) is no error.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

_LARGE_PAGE_BYTES = 2 << 20
_libc = ctypes.CDLL(None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor without values, whose memory nobody else has."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE_PAGE_BYTES:
        _advise(tensor)
    return tensor


def _advise(tensor: torch.Tensor) -> None:
    """Ask for large pages for all pages that a tensor touches.

    To the edges of small pages, so that mappings side by side stay one: a process may have 65,530.
    """
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first -= first % mmap.PAGESIZE
    end += -end % mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)
