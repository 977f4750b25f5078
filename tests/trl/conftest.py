import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from guardrails_trl import toy


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A model that was never trained: its completions are noise, so rewards and costs differ within a group."""
    return toy.build(tmp_path_factory.mktemp("random_model"), steps=0, layers=1, width=32)


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory):
    """A model that answers sums, with a filler word now and then."""
    return toy.build(tmp_path_factory.mktemp("speaking_model"), steps=250)


@pytest.fixture(scope="session")
def repairing_model(tmp_path_factory):
    """A model that answers sums, and corrects answers where it is asked to by `toy.REPAIR`."""
    return toy.build(tmp_path_factory.mktemp("repairing_model"), steps=350, repairs=True)
