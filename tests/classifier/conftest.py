import pytest
from helpers.pictures import write_idx


@pytest.fixture(scope="session")
def idx(tmp_path_factory):
    """A folder of idx files: 80 images to train on, 40 to test with, of four classes."""
    return write_idx(tmp_path_factory.mktemp("pictures") / "idx")
