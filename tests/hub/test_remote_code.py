# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from diffusers_gmem import GMemPipeline
from diffusers_gmem.hub import remote_code
from diffusers_gmem.hub.remote_code import remote_code_files, standalone_source


# Loads a pipeline twice where the package cannot be imported, and draws images from its bank with each
PROGRAM = """
import sys
sys.modules["diffusers_gmem"] = None
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipes = [DiffusionPipeline.from_pretrained(sys.argv[1], revision="remote-code", trust_remote_code=True) for _ in range(2)]
images = [
    pipe(num_images=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    for pipe in pipes
]
assert isinstance(pipes[0].scheduler, type(pipes[1].scheduler))
pipes[0].save_pretrained(sys.argv[2])
np.savez(sys.argv[3], *images)
"""
WITH_THE_PACKAGE = """
import sys
import numpy as np
import torch
from diffusers_gmem import GMemPipeline

pipe = GMemPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(0)
np.save(sys.argv[2], pipe(num_images=2, num_inference_steps=2, generator=generator, output_type="np").images)
"""


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.memory_bank = None
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_files(folder):
    files = remote_code_files(folder)
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline_gmem", "GMemPipeline"]
    library, name = index["transformer"]
    assert name == "GMemTransformer2DModel"
    assert index["scheduler"] == [library, "GMemFlowMatchScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert set(files) == {
        "pipeline_gmem.py",
        "model_index.json",
        f"transformer/{library}.py",
        f"scheduler/{library}.py",
    }
    assert remote_code_files(folder) == files


def test_the_source_stands_alone(monkeypatch):
    tree = ast.parse(standalone_source("pipelines/pipeline_gmem.py"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(names) == len(set(names))
    assert names.index("GMemMemoryBank") < names.index("GMemPipeline")
    module = ModuleType("standalone")
    monkeypatch.setitem(sys.modules, "standalone", module)  # dataclasses look there
    exec(compile(tree, "standalone.py", "exec"), vars(module))
    assert module.GMemPipeline is not GMemPipeline


def make_package(folder, monkeypatch, **modules):
    """A package diffusers_gmem of its own, of which the generator reads the source."""
    (folder / "small_package").mkdir()
    for name, source in {"__init__": '__version__ = "1"', **modules}.items():
        (folder / "small_package" / f"{name}.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(remote_code, "PACKAGE", "small_package")
    for name in [name for name in sys.modules if name.startswith("small_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_modules_are_put_in_the_order_of_their_imports(tmp_path, monkeypatch):
    make_package(
        tmp_path,
        monkeypatch,
        top="# Copyright\nfrom .a import (\n    A,\n)\nfrom .b import B\n\n\nclass Top(A, B):\n    '''Both.'''",
        a="import json\nfrom .base import Base\n\n\nclass A(Base):\n    pass  # a comment stays",
        b="import json\nfrom .base import Base\n\n\nclass B(Base):\n    def later(self):\n        from .far import far\n        return far()",
        base="class Base:\n    pass",
        far="def far():\n    return 1",
    )
    source = standalone_source("top.py")
    assert [line for line in source.splitlines() if line.startswith("class")] == [
        "class Base:",
        "class A(Base):",
        "class B(Base):",
        "class Top(A, B):",
    ]
    assert "def far" not in source
    assert 'far = importlib.import_module("small_package.far").far' in source
    assert "pass  # a comment stays" in source
    assert source.count("# Copyright") == 1
    namespace = {}
    exec(source, namespace)
    assert namespace["Top"]().later() == 1


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"top": "from .a import f\nLIMIT = 2", "a": "LIMIT = 1\ndef f(): pass"},
            "top.py and a.py both define 'LIMIT'",
        ),
        ({"top": "from .a import f\nfrom json import dump", "a": "from marshal import dump\ndef f(): pass"}, "'dump'"),
        ({"top": "from .a import f as g", "a": "def f(): pass"}, "line 1: only `from module import name`"),
        ({"top": "from .a import *", "a": "def f(): pass"}, "line 1: only `from module import name`"),
        ({"top": "from . import a", "a": ""}, "top.py, line 1: no module"),
    ],
)
def test_what_cannot_be_put_together(tmp_path, monkeypatch, modules, message):
    make_package(tmp_path, monkeypatch, **modules)
    with pytest.raises(ValueError, match=message):
        standalone_source("top.py")


def test_the_same_name_for_the_same_thing(tmp_path, monkeypatch):
    make_package(
        tmp_path,
        monkeypatch,
        top="from os import path\nfrom .a import f\nlogger = len('x')",
        a="import os.path as path\nlogger = len('x')\ndef f(): pass",
    )
    standalone_source("top.py")


def test_loads_without_the_package(hub, pipe, tmp_path):
    pipe.push_to_hub("me/gmem", include_code=True)
    arguments = ["me/gmem", tmp_path / "again", tmp_path / "images.npz"]
    process = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "might require the following packages" not in process.stderr

    # In a process of its own, too: what earlier tests leave in this one can change the last digits
    command = [sys.executable, "-c", WITH_THE_PACKAGE, "me/gmem", tmp_path / "expected.npy"]
    subprocess.run(command, check=True, capture_output=True)
    first, second = np.load(tmp_path / "images.npz").values()
    assert np.array_equal(first, second) and np.array_equal(first, np.load(tmp_path / "expected.npy"))

    # What is saved there is a pipeline like any other
    again = GMemPipeline.from_pretrained(tmp_path / "again")
    assert again.memory_bank.fingerprint == pipe.memory_bank.fingerprint
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        GMemPipeline.from_pretrained("me/gmem", revision="remote-code")
