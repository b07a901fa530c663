"""One thread: tiny models gain nothing from more, and sums then come in one order."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
