# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import diffusers_gmem


PUBLIC_NAMES = {
    "GMemFlowMatchScheduler",
    "GMemImageEncoder",
    "GMemImageProcessor",
    "GMemMemoryBank",
    "GMemPipeline",
    "GMemPipelineOutput",
    "GMemTransformer2DModel",
    "read_provenance",
}
UNRECORDED = {"GMemPipelineOutput", "read_provenance"}
RECORDED_CLASSES = [getattr(diffusers_gmem, name) for name in sorted(PUBLIC_NAMES - UNRECORDED)]
each_recorded_class = pytest.mark.parametrize("cls", RECORDED_CLASSES, ids=lambda cls: cls.__name__)

PROBE = """
import json, sys
import diffusers
names = ("gradio", "datasets", "pyarrow", "faiss")
before = [name for name in names if name in sys.modules]
import diffusers_gmem
print(json.dumps({
    "heavy": [name for name in names if name in sys.modules and name not in before],
    "ours": [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "diffusers_gmem"],
}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """What `import diffusers_gmem` brought into a process of its own."""
    process = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def imports_at_load(tree):
    """Top-level names of the packages that a module imports when it is loaded, not in a function or for type checkers."""
    names = set()
    for node in tree.body if isinstance(tree, ast.Module) else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            names |= imports_at_load(node)
    return names


def test_import_leaves_heavy_packages_out(fresh_import):
    assert fresh_import["heavy"] == []


def test_no_eager_module_imports_an_optional_package(fresh_import):
    # diffusers itself imports transformers, so `sys.modules` cannot tell
    assert len(fresh_import["ours"]) >= 5
    for file in fresh_import["ours"]:
        imported = imports_at_load(ast.parse(Path(file).read_text(encoding="utf-8")))
        assert not imported & {"transformers", "datasets", "gradio", "pyarrow", "faiss"}, file


def test_public_names():
    assert set(diffusers_gmem.__all__) == PUBLIC_NAMES
    assert len(diffusers_gmem.__all__) == len(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert callable(getattr(diffusers_gmem, name))


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", diffusers_gmem.__version__)


@each_recorded_class
def test_recorded_module_is_the_short_name(cls):
    assert cls.__module__ == "diffusers_gmem"
    assert cls.__qualname__ == cls.__name__


def test_registered_with_diffusers():
    assert diffusers.pipelines.diffusers_gmem is diffusers_gmem
    assert diffusers.GMemPipeline is diffusers_gmem.GMemPipeline
    assert diffusers.GMemFlowMatchScheduler is diffusers_gmem.GMemFlowMatchScheduler
    # diffusers' loader looks these up in the namespace that a saved pipeline names
    assert diffusers_gmem.ModelMixin is diffusers.ModelMixin
    assert diffusers_gmem.SchedulerMixin is diffusers.SchedulerMixin


def test_compatible_schedulers():
    names = {cls.__name__ for cls in diffusers_gmem.GMemFlowMatchScheduler().compatibles}
    assert names == {
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "GMemFlowMatchScheduler",
        "UniPCMultistepScheduler",
    }


@each_recorded_class
def test_classes_pickle_and_can_be_inspected(cls):
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert list(inspect.signature(cls).parameters)
    assert inspect.getdoc(cls)
    assert inspect.getsource(cls.__init__).lstrip().startswith(("def __init__", "@register_to_config"))


def test_instances_pickle():
    output = diffusers_gmem.GMemPipelineOutput(images=[], memory_indices=[3])
    assert pickle.loads(pickle.dumps(output)) == output
    scheduler = diffusers_gmem.GMemFlowMatchScheduler(shift=2.0)
    assert pickle.loads(pickle.dumps(scheduler)).config == scheduler.config
