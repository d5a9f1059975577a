import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """The libraries of the fixtures take seconds to import: the process that hands out the tests does without."""
    if config.getoption("dist") == "no":  # as it is in each process that runs them
        config.pluginmanager.import_plugin("helpers.fixtures")


def pytest_collection_modifyitems(items):
    """The longest file comes first, so that at the end no lane waits for it."""
    items.sort(key=lambda item: item.path.name != "test_fullsize.py")
