"""Host memory costs what is written to it, and gives it back."""

import mmap
import os

import psutil
import pytest
import torch

from malora_server.adapters.memory import HostMemory

MIB = 2**20


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("shared", [False, True])
def test_pages_are_taken_when_written_and_given_back_when_discarded(shared):
    before = resident()
    memory = HostMemory(512 * MIB, shared=shared)
    assert resident() - before < 8 * MIB
    memory.tensor[: 64 * MIB] = 7
    assert resident() - before > 60 * MIB
    memory.discard(1, 64 * MIB - 2)
    assert resident() - before < 8 * MIB
    # The pages at the ends are not wholly in the range.
    assert memory.tensor[[0, 1, mmap.PAGESIZE - 1]].tolist() == [7, 7, 7]
    assert not memory.tensor[mmap.PAGESIZE : 63 * MIB].any()
    memory.tensor[:MIB] = 3
    assert memory.tensor[:MIB].eq(3).all()


def test_another_mapping_of_the_file_sees_the_bytes():
    memory = HostMemory(MIB, shared=True)
    other = torch.frombuffer(mmap.mmap(memory.fd, MIB), dtype=torch.uint8)
    other[5] = 9
    assert memory.tensor[5] == 9


def test_none_is_fine_and_too_much_is_one_sentence():
    assert len(HostMemory(0, shared=True).tensor) == 0
    with pytest.raises(OSError, match=r"bytes for adapters can't be had: \w+"):
        HostMemory(2**62, shared=False)


def test_the_file_is_closed_with_the_memory():
    memory = HostMemory(MIB, shared=True)
    fd = memory.fd
    del memory
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_was_pinned_can_be_mapped_and_pinned_again():
    places = set()
    for value in range(4):
        memory = HostMemory(64 * MIB, shared=True)
        places.add(memory.tensor.data_ptr())
        memory.pin()
        memory.tensor.fill_(value)
        assert memory.tensor.cuda().eq(value).all()
        del memory
    assert len(places) < 4
