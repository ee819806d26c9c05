import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Products are tiny: a second thread gains nothing, and beside other work costs much."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
