"""The golden vectors: numbers computed once with the public reference implementation, and how to compare with them.

`tests/reference` holds the vectors that the tests use. Point `GMEM_REFERENCE_DIR` at another folder of the same format
(a `cases.json` and its files) to check the package against other vectors of the same kinds.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file


REFERENCE_DIR = Path(os.environ.get("GMEM_REFERENCE_DIR", Path(__file__).parent / "reference"))


def reference_cases(kind: str) -> list[dict]:
    """All cases of one kind, for `pytest.mark.parametrize("case", ..., ids=lambda case: case["id"])`."""
    return [case for case in json.loads((REFERENCE_DIR / "cases.json").read_text())["cases"] if case["kind"] == kind]


@lru_cache
def _load(name: str) -> dict[str, torch.Tensor]:
    return load_file(REFERENCE_DIR / name)


def case_tensors(case: dict) -> dict[str, torch.Tensor]:
    """The tensors of a case by their names in the case."""
    stored = _load(case["file"])
    return {name: stored[case["prefix"] + name].clone() for name in case["tensors"]}


def case_state_dict(case: dict) -> dict[str, torch.Tensor]:
    """The original state dict that a model case (or a case that names another's weights) belongs to."""
    stored = _load(case.get("weights_from", case["file"]))
    return {
        name.removeprefix("state/"): tensor.clone() for name, tensor in stored.items() if name.startswith("state/")
    }


def assert_matches(case: dict, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts |actual - expected| <= atol + rtol * |expected| with the case's own tolerance for this tensor."""
    tolerance = case["tolerance"]
    stem = name.split("_")[0] if name.split("_")[-1] in ("eval", "train") else name
    tolerance = tolerance.get(name) or tolerance.get(stem) or tolerance["all"]
    torch.testing.assert_close(actual.float(), expected, **tolerance)
