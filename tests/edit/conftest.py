import pytest
from helpers.forms import write_hub
from huggingface_hub import constants


@pytest.fixture(scope="module")
def hub(here, tmp_path_factory):
    """The hub's cache with the model of `here` as the revision "old" of someone/tiny, and nothing else in it."""
    cache = tmp_path_factory.mktemp("hub")
    write_hub(cache, here / "sd1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield cache
