import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest


# Before torch is imported, here and in the processes that tests start. The tensors are tiny: more threads only get in
# each other's way, all the more with several test processes.
os.environ["OMP_NUM_THREADS"] = "1"

# Nothing in the tests may reach for the real Hub. Theirs is a server of our own (`hub_server.py`), of which libraries
# have to know the address before they are imported; until the fixture `hub` starts it, connections are refused.
_folder = tempfile.TemporaryDirectory(prefix="diffusers_gmem_tests_")
_listener = socket.socket()
_listener.bind(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = "http://{}:{}".format(*_listener.getsockname())
os.environ["HF_HOME"] = f"{_folder.name}/hf_home"
os.environ["HF_TOKEN"] = "hf_me"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def _hub_server():
    from hub_server import HubServer

    storage = Path(_folder.name, "storage")
    storage.mkdir()
    server = HubServer(storage, _listener)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def hub(_hub_server):
    """The stand-in for the Hub, empty, and an empty cache of downloads. Its user is "me", of the organization "org"."""
    _hub_server.reset()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    return _hub_server
