import json
from pathlib import Path

import pytest
from reference_cases import REFERENCE_DIR


def test_every_case_of_the_reference_has_a_test(request):
    files = {path for path in Path(__file__).parent.rglob("test_*.py") if "reference_cases(" in path.read_text()}
    collected = {item.path for item in request.session.items}
    if not files <= collected:
        pytest.skip("needs all test files that read the reference")

    tested = set()
    for item in request.session.items:
        if hasattr(item, "callspec"):
            tested |= {
                value["id"] for value in item.callspec.params.values() if isinstance(value, dict) and "id" in value
            }
    cases = {case["id"] for case in json.loads((REFERENCE_DIR / "cases.json").read_text())["cases"]}
    assert cases - tested == set()
