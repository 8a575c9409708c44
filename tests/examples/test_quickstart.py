import importlib.util
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from diffusers_gmem import GMemTransformer2DModel


ROOT = Path(__file__).parents[2]
SCRIPTS = ["examples/quickstart/prepare_data.py", "examples/train_gmem.py", "examples/quickstart/show_results.py"]


@pytest.fixture(scope="module")
def commands():
    """The commands that `make quickstart` would run, as lists of words, by their scripts."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    result = subprocess.run(["make", "--dry-run", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in result.stdout.replace("\\\n", " ").splitlines()]
    return {script: line for script in SCRIPTS for line in lines if script in line}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_take_the_arguments_of_the_makefile(commands, script):
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = commands[script]
    module.parse_args(words[words.index(script) + 1 :])


def test_what_one_step_writes_the_next_one_reads(commands):
    def value(script, flag):
        words = commands[script]
        return words[words.index(flag) + 1]

    prepare, train, show = SCRIPTS
    data = value(prepare, "--output_dir")
    assert value(train, "--train_data_dir") == value(show, "--train_data_dir") == f"{data}/train"
    assert value(show, "--held_out_dir") == f"{data}/held_out"
    assert value(show, "--pipeline") == value(train, "--output_dir")


def test_its_model_fits_its_resolution(commands):
    words = commands["examples/train_gmem.py"]
    config = json.loads((ROOT / words[words.index("--model_config") + 1]).read_text())
    resolution = int(words[words.index("--resolution") + 1])
    GMemTransformer2DModel(sample_size=resolution, in_channels=3, alignment_layer=None, **config)
