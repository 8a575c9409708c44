# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What the documentation tells users to type: commands that the scripts accept, code that imports what there is."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (*ROOT.glob("examples/**/*.py"), *ROOT.glob("scripts/*.py")))
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def text_of(path):
    """A document, or what a script's docstring says."""
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def commands():
    """Each call of a script of ours: where it stands, the script, its arguments."""
    found = []
    for path in (*DOCUMENTS, *SCRIPTS):
        for line in text_of(path).replace("\\\n", " ").splitlines():
            call = re.search(r"(?:^|\s)((?:examples|scripts)/[\w/]+\.py)(\s.*)?$", line.strip().strip("`"))
            if call and re.match(r"\s*(accelerate launch|python|make)\b", line):
                arguments = shlex.split(call[2] or "", comments=True)
                found.append(pytest.param(call[1], arguments, id=f"{path.name}:{Path(call[1]).name}"))
    return found


def load(script):
    specification = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_commands_are_accepted(script, arguments):
    load(script).parse_args(arguments)


def python_blocks():
    for path in DOCUMENTS:
        for k, block in enumerate(
            re.findall(r"```python[^\n]*\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        ):
            yield pytest.param(block, id=f"{path.name}-{k}")


@pytest.mark.parametrize("block", python_blocks())
def test_code_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                getattr(module, name.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
