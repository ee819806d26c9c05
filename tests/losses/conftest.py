"""What tests of contrastive losses share."""

import os

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def make_groups():
    """Groups of texts, shape ``(num_rows, num_texts, dim)``, without a length of 1."""

    def make(num_rows=6, num_texts=3, dim=5, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        groups = torch.randn(num_rows, num_texts, dim, dtype=torch.float64, generator=generator)
        return groups.to(dtype)

    return make


@pytest.fixture
def join():
    """Make this process one of several ranks, and return its share of the rows of tensors."""

    def start(*tensors):
        rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", rank=rank, world_size=size)
        return [tensor.chunk(size)[rank] for tensor in tensors]

    return start
