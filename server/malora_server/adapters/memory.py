"""Memory on the host whose pages are taken when written, and given back when freed."""

from __future__ import annotations

import mmap
import os
import weakref

import torch


class HostMemory:
    """`capacity` bytes that cost nothing until they are written to.

    shared: another process can map them too, through `fd`. They are a file without a name (a
    memfd), since containers limit /dev/shm.
    """

    def __init__(self, capacity: int, *, shared: bool) -> None:
        """Raises OSError, with a message for the user, where there is not as much to be had."""
        size = max(capacity, mmap.PAGESIZE)
        self.fd = -1
        try:
            if shared:
                self.fd = os.memfd_create("malora-adapters", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, size)
                self._map = mmap.mmap(self.fd, size)
            else:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise OSError(f"{capacity:,} bytes for adapters can't be had: {reason}") from None
        self._drop = mmap.MADV_REMOVE if shared else mmap.MADV_DONTNEED
        self.is_pinned = False
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:capacity]
        """(capacity,) uint8."""

    def pin(self) -> None:
        """Lock the pages in memory, so that a GPU can copy from them beside its work.

        Raises OSError, with a message for the user, where the driver refuses.
        """
        address, nbytes = self.tensor.data_ptr(), self.tensor.numel()
        runtime = torch.cuda.cudart()
        status = runtime.cudaHostRegister(address, nbytes, 0)
        if int(status) != 0:
            raise OSError(
                f"the driver can't lock {nbytes:,} bytes of host memory for adapters (CUDA error "
                f"{int(status)}): lower --adapter-host-memory, or raise the limit (ulimit -l)"
            )
        self.is_pinned = True
        # While it is mapped: what is mapped there next could not be pinned, nor copied from.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def discard(self, start: int, nbytes: int) -> None:
        """Give back the pages that lie wholly in a range nobody uses. Pinned ones stay."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < stop and not self.is_pinned:
            self._map.madvise(self._drop, first, stop - first)

    def __del__(self) -> None:
        # The map goes with its last view.
        if self.fd >= 0:
            os.close(self.fd)
