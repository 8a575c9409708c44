# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The code of the pipeline as files for a model repository, for users who do not have this package."""

import ast
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


PACKAGE = "diffusers_gmem"
PIPELINE_FILE = "pipeline_gmem.py"

_HEADER = """\
# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
#
# Generated from the source files of the package diffusers_gmem {version}, one after the other; not to be edited here.
# To load this repository: DiffusionPipeline.from_pretrained(..., trust_remote_code=True)

import importlib
import sys
import types

import diffusers
"""

# diffusers executes the file at every load, and each time the classes would be new ones, which `isinstance` does not take
# for the old. So those of the first time are kept, where diffusers looks for the components' classes as well.
_FOOTER = """

for _class in ({classes}):
    _class.__module__ = "{package}"
if not hasattr(diffusers.pipelines, "{library}"):
    _kept = types.ModuleType("{library}")
    _kept.names = {{_name: _value for _name, _value in globals().items() if not _name.startswith("__")}}
    vars(_kept).update(_kept.names)
    setattr(diffusers.pipelines, "{library}", _kept)
globals().update(diffusers.pipelines.{library}.names)
"""

_COMPONENT = """\
# The classes are in {pipeline_file} at the root of this repository, which is always loaded first.
from diffusers import pipelines


globals().update(pipelines.{library}.names)
"""


def remote_code_files(folder: str | Path) -> dict[str, bytes]:
    """
    What a saved pipeline needs besides its files so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`
    loads it where this package is not installed: `pipeline_gmem.py`, a pointer to it in each component's folder, and a
    `model_index.json` that names them. The code is put together from the source files of this package.

    Args:
        folder (`str` or `Path`): Where `GMemPipeline.save_pretrained` wrote the pipeline.

    Returns:
        `dict[str, bytes]`: Names of files in the repository and their contents; `model_index.json` replaces the saved one.
    """
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    code = standalone_source("pipelines/pipeline_gmem.py")
    # Code of another version has another name, in repositories and in the process that loads them
    library = f"{PACKAGE}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    components = {name: value for name, value in index.items() if isinstance(value, list) and value[0] == PACKAGE}
    classes = sorted({index["_class_name"], *(class_name for _, class_name in components.values())})

    index["_class_name"] = [PIPELINE_FILE.removesuffix(".py"), index["_class_name"]]
    index |= {name: [library, class_name] for name, (_, class_name) in components.items()}
    footer = _FOOTER.format(classes="".join(f"{name}, " for name in classes).strip(), package=PACKAGE, library=library)
    files = {PIPELINE_FILE: code + footer, "model_index.json": json.dumps(index, indent=2) + "\n"}
    pointer = _COMPONENT.format(pipeline_file=PIPELINE_FILE, library=library)
    files |= {f"{name}/{library}.py": pointer for name in components}
    return {name: content.encode() for name, content in files.items()}


def standalone_source(entry: str) -> str:
    """
    The source of a module of this package with that of every module that it imports from here, in the order in which they
    need each other. What is imported inside a function stays in the package, and is asked for there.

    Args:
        entry (`str`): The module's file in the package, such as `"pipelines/pipeline_gmem.py"`.

    Raises:
        `ValueError`: two modules use one name for different things, or an import has a form that is not known here.
    """
    package = importlib.import_module(PACKAGE)
    root = Path(package.__file__).parent
    parts: dict[Path, str] = {}
    header = {name: ("the header", sys.modules[name]) for name in ("importlib", "types", "diffusers")}
    _append(root, root / entry, parts, header)
    return _HEADER.format(version=package.__version__) + "".join(parts.values())


def _append(root: Path, file: Path, parts: dict[Path, str], meanings: dict[str, tuple[str, Any]]) -> None:
    """Adds the modules that `file` imports to `parts`, and then itself."""
    if file in parts:
        return
    parts[file] = ""  # its place is found below; imports in a circle would end here
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            _append(root, _file_of(root, file, node), parts, meanings)
    del parts[file]

    name = file.relative_to(root).as_posix()
    module = importlib.import_module(_module_of(root, file))
    for node in tree.body:
        for defined, meaning in _definitions(node, module):
            other, other_meaning = meanings.setdefault(defined, (name, meaning))
            if meaning != other_meaning:
                raise ValueError(f"{name} and {other} both define {defined!r}; one of them needs another name.")

    lines = source.splitlines()
    for node in sorted(_relative_imports(tree), key=lambda node: node.lineno, reverse=True):
        indent = " " * node.col_offset
        target = _module_of(root, _file_of(root, file, node))
        replacement = []
        if node not in tree.body:
            replacement = [
                f'{indent}{alias.asname or alias.name} = importlib.import_module("{target}").{alias.name}'
                for alias in node.names
            ]
        elif any(alias.asname or alias.name == "*" for alias in node.names):
            raise ValueError(f"{name}, line {node.lineno}: only `from module import name` can be put together.")
        lines[node.lineno - 1 : node.end_lineno] = replacement
    text = re.sub(r"\A(#.*\n)+", "", "\n".join(lines)).strip("\n")
    parts[file] = f"\n\n# {PACKAGE}/{name}\n\n{text}\n"


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def _file_of(root: Path, file: Path, node: ast.ImportFrom) -> Path:
    """The file of the module that `node`, in `file`, imports from."""
    folder = file.parents[node.level - 1]
    target = folder.joinpath(*(node.module or "").split("."))
    for candidate in (target.with_suffix(".py"), target / "__init__.py"):
        if node.module and candidate.is_file():
            return candidate
    raise ValueError(f"{file.relative_to(root)}, line {node.lineno}: no module {'.' * node.level}{node.module or ''}.")


def _module_of(root: Path, file: Path) -> str:
    return ".".join([PACKAGE, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")


def _definitions(node: ast.stmt, module: ModuleType) -> list[tuple[str, Any]]:
    """The names that a statement of a module defines, each with what tells equal definitions: the object that is imported,
    else the source."""
    source = ast.unparse(node)
    match node:
        case ast.ImportFrom(level=0) | ast.Import():
            names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            return [(name, vars(module).get(name, source)) for name in names]
        case ast.FunctionDef() | ast.ClassDef():
            return [(node.name, source)]
        case ast.Assign():
            return [(target.id, source) for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name()):
            return [(node.target.id, source)]
        case ast.If() | ast.Try():
            return [definition for child in node.body for definition in _definitions(child, module)]
    return []
