# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from diffusers.utils import logging


@pytest.fixture
def warnings(caplog):
    """What diffusers' loggers say, at warning level or above, from here on."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
