"""Its presence makes pytest put this folder on the path, so that tests in all subfolders can import ``toy``."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # toy sizes gain nothing from more, and other sessions share the machine
