# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfApi, SpaceCard


CHECKOUT = Path(__file__).parents[2]
PROGRAM = """
import sys
import torch
import diffusers_gmem
from diffusers_gmem.hub import push_memory_bank, push_space

assert diffusers_gmem.__file__.startswith(sys.argv[1]), diffusers_gmem.__file__
push_memory_bank(diffusers_gmem.GMemMemoryBank(torch.eye(3)), "me/snippets")
push_space("me/demo", "me/model", bank_id="me/snippets")
"""


@pytest.mark.slow
def test_a_wheel_brings_cards_and_the_page_along(hub, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    shutil.copytree(CHECKOUT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", tmp_path / "site", source], check=True)
    shutil.rmtree(source)

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "site"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert DatasetCard.load("me/snippets").data.viewer is False
    assert SpaceCard.load("me/demo").data.models == ["me/model"]
    files = set(HfApi().list_repo_files("me/demo", repo_type="space"))
    assert {
        "app.py",
        "requirements.txt",
        "diffusers_gmem/__init__.py",
        "diffusers_gmem/hub/templates/model_card.md",
    } <= files
