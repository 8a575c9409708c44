# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import ModelCard

from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.hub import HubRepo, locate, push_memory_bank, transfer
from diffusers_gmem.pipelines import pipeline_gmem


BOTH = pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, "SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture
def warnings(caplog):
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def load(name="me/model", cls=GMemPipeline, **kwargs):
    pipe = cls.from_pretrained(name, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs):
    kwargs = {"num_images": 2, **kwargs} if "memory" not in kwargs else kwargs
    generator = torch.Generator().manual_seed(0)
    return pipe(**kwargs, num_inference_steps=2, generator=generator, output_type="pt").images


def assert_same(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)


def bank_files(hub, repo_id="me/model"):
    return [name for name in hub.downloaded(repo_id) if name.startswith("bank/")]


def source_of(folder):
    return json.loads(Path(folder, "model_index.json").read_text())["memory_bank_source"]


def other_bank(**changes):
    arguments = {"encoder": "facebook/dinov2-base", "preprocessing": {"resize": 256, "center_crop": 224}, **changes}
    return GMemMemoryBank(torch.randn(5, arguments.pop("dim", 16)), **arguments)


# Loading


@BOTH
def test_a_pipeline_that_holds_its_bank(hub, pipe, bank, cls):
    expected = draw(pipe)
    pipe.push_to_hub("me/model")
    hub.requests.clear()
    loaded = load(cls=cls)
    assert loaded.memory_bank is None
    draw(loaded, memory=bank[:2])
    assert not bank_files(hub)
    assert_same(draw(loaded), expected)
    assert bank_files(hub)
    assert "memory-mapped" in repr(loaded.memory_bank) and loaded.memory_bank.fingerprint == bank.fingerprint

    hub.requests.clear()
    assert_same(draw(load(cls=cls, local_files_only=True)), expected)
    assert not hub.requests


@BOTH
def test_a_pipeline_that_points_to_its_bank(hub, pipe, bank, cls, tmp_path):
    expected = draw(pipe)
    pipe.push_to_hub("me/model", bank_repo_id="me/snippets", private=True)
    assert hub.repository("me/snippets", "dataset").private
    commit = hub.repository("me/snippets", "dataset").branches["main"]
    push_memory_bank(bank.without(indices=[0]), "me/snippets")
    assert ModelCard.load("me/model").data.datasets == ["me/snippets"]

    hub.requests.clear()
    loaded = load(cls=cls, cache_dir=tmp_path / "cache")
    loaded.save_pretrained(tmp_path / "saved")
    draw(loaded, memory=bank[:2])
    assert not hub.downloaded("me/snippets") and not bank_files(hub)
    assert_same(draw(loaded), expected)
    assert loaded.memory_bank.fingerprint == bank.fingerprint
    assert (tmp_path / "cache/datasets--me--snippets").is_dir()
    assert not Path(os.environ["HF_HOME"], "hub/datasets--me--snippets").exists()

    loaded.save_pretrained(tmp_path / "again")
    source = source_of(tmp_path / "saved")
    assert source == source_of(tmp_path / "again")
    assert (source["repo_id"], source["revision"]) == ("me/snippets", commit)
    assert source["fingerprint"] == source["trained_with"]["fingerprint"] == bank.fingerprint
    assert not (tmp_path / "again/bank").exists()
    local = (
        load(tmp_path / "saved", cls, local_files_only=True) if cls is GMemPipeline else load(tmp_path / "saved", cls)
    )
    assert local.memory_bank is None
    assert_same(draw(load(tmp_path / "saved", cls, memory_bank=bank)), expected)
    local.load_memory_bank(cache_dir=tmp_path / "cache", local_files_only=True)
    assert_same(draw(local), expected)


OFFLINE = """
import sys
import diffusers
from diffusers_gmem import GMemMemoryBank, GMemPipeline

for cls in (GMemPipeline, diffusers.DiffusionPipeline):
    assert cls.from_pretrained("me/model").load_memory_bank().fingerprint == sys.argv[1]
assert len(GMemMemoryBank.from_pretrained("me/snippets", class_labels="fish")) == 3
for load in (GMemPipeline.from_pretrained, GMemMemoryBank.from_pretrained):
    try:
        load("me/none")
    except FileNotFoundError as error:
        assert "is not in the cache of downloads" in str(error), error
    else:
        raise AssertionError
"""


def test_offline(hub, pipe, bank):
    pipe.push_to_hub("me/model", bank_repo_id="me/snippets")
    load().load_memory_bank()
    GMemMemoryBank.from_pretrained("me/snippets")
    hub.requests.clear()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE, bank.fingerprint]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not hub.requests


@BOTH
def test_of_the_commit_that_was_loaded(hub, pipe, bank, cls):
    first = pipe.push_to_hub("me/model")
    expected = draw(pipe)
    loaded = load(cls=cls)
    pipe.memory_bank = bank.without(indices=[0])
    pipe.push_to_hub("me/model")
    assert_same(draw(loaded), expected)
    assert load(cls=cls).load_memory_bank().fingerprint == pipe.memory_bank.fingerprint
    assert load(cls=cls, revision=first.oid).load_memory_bank().fingerprint == bank.fingerprint


def test_a_push_while_it_is_loaded(hub, pipe, bank, monkeypatch):
    pipe.push_to_hub("me/model")

    def locate_pipeline(repo):
        located = locate.locate_pipeline(repo)
        pipe.memory_bank = bank.without(indices=[0])
        pipe.push_to_hub("me/model")
        return located

    monkeypatch.setattr(pipeline_gmem, "locate_pipeline", locate_pipeline)
    assert load().load_memory_bank().fingerprint == bank.fingerprint


@BOTH
def test_variant_and_dtype(hub, pipe, bank, cls):
    pipe.push_to_hub("me/model")
    pipe.to(torch.float16).push_to_hub("me/model", variant="fp16")
    hub.requests.clear()
    loaded = load(cls=cls, variant="fp16", dtype=torch.bfloat16)
    assert {name for name in hub.downloaded("me/model") if name.endswith(".safetensors")} == {
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert loaded.transformer.dtype == torch.bfloat16
    assert draw(loaded).isfinite().all() and loaded.memory_bank.dtype == torch.float32


@BOTH
def test_components_by_keyword_are_not_downloaded(hub, pipe, bank, cls):
    pipe.push_to_hub("me/model")
    hub.requests.clear()
    loaded = load(cls=cls, vae=pipe.vae, transformer=pipe.transformer, memory_bank=bank)
    assert loaded.vae is pipe.vae and loaded.memory_bank is bank
    assert_same(draw(loaded), draw(pipe))
    assert {Path(name).parent.name for name in hub.downloaded("me/model")} == {"", "scheduler"}


@BOTH
def test_private_repositories(hub, pipe, cls, monkeypatch):
    pipe.push_to_hub("me/model", bank_repo_id="me/snippets", private=True)
    monkeypatch.delenv("HF_TOKEN")
    expected = draw(pipe)
    loaded = load(cls=cls, token="hf_me")
    if cls is DiffusionPipeline:
        with pytest.raises(FileNotFoundError, match="'me/snippets'.* or it is private: log in .* `token=`"):
            draw(loaded)
        loaded.load_memory_bank(token="hf_me")
    assert_same(draw(loaded), expected)
    shutil.rmtree(os.environ["HF_HOME"])
    with pytest.raises(FileNotFoundError, match="'me/model' does not exist, or it is private: log in"):
        load()


def test_safetensors_alone(hub, pipe):
    pipe.push_to_hub("me/model")
    weights = ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
    HubRepo("me/model", "model").upload({f"{name}.bin": b"pickle" for name in weights}, "Pickles")
    hub.requests.clear()
    load()
    assert not [name for name in hub.downloaded("me/model") if name.endswith(".bin")]
    HubRepo("me/model", "model").upload({"x": b""}, "No safetensors", stale=lambda name: name.endswith("safetensors"))
    with pytest.raises(OSError, match="safetensors"):
        load()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "me/none"}, "'me/none' does not exist, or it is private"),
        ({"name": "./no/where"}, "'./no/where' is neither a local folder nor a repository of the Hub"),
        ({"revision": "v9"}, "'me/model' at revision 'v9' does not exist: its branches and tags are main"),
        ({"name": "me/files"}, "has no file 'model_index.json': it does not hold a pipeline of diffusers"),
        ({"local_files_only": True}, "'model_index.json' in .*'me/model' is not in the cache"),
    ],
)
def test_what_is_not_there(hub, pipe, kwargs, message):
    pipe.push_to_hub("me/model")
    HubRepo("me/files", "model").upload({"config.json": b"{}"}, "Upload")
    with pytest.raises(FileNotFoundError, match=message):
        load(**kwargs)


def test_another_pipeline(hub):
    HubRepo("me/other", "model").upload({"model_index.json": b'{"_class_name": "DDPMPipeline"}'}, "Upload")
    with pytest.raises(ValueError, match="holds a DDPMPipeline, not a GMemPipeline"):
        load("me/other")


# Faults


def test_a_bank_whose_download_was_interrupted(hub, pipe):
    expected = draw(pipe)
    pipe.push_to_hub("me/model")
    loaded = load()
    shards = "GET .*/resolve/.*bank/memory_bank-0"
    hub.cut(shards, after=100)
    hub.fail(shards, times=50)
    with pytest.raises(ConnectionError, match="'bank/memory_bank-.*safetensors' in the model repository 'me/model'"):
        draw(loaded)
    assert loaded.memory_bank is None
    hub.faults.clear()
    assert_same(draw(loaded), expected)


def test_a_full_disk(hub, pipe):
    expected = draw(pipe)
    pipe.push_to_hub("me/model", max_shard_size="1GB")
    loaded = load()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # a limit on the size of files stands for a full disk
    try:
        with pytest.raises(OSError, match="'bank/.*' in the model repository 'me/model'.* cannot be written"):
            draw(loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(draw(loaded), expected)


def fingerprint_of_loaded(_):
    return load().load_memory_bank().fingerprint


def test_two_processes_at_once(hub, pipe, bank):
    pipe.push_to_hub("me/model")
    hub.delay("GET .*safetensors", seconds=0.2, times=4)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(fingerprint_of_loaded, range(2))) == [bank.fingerprint] * 2


# Where the bank is saved


def test_the_place_of_the_bank(hub, pipe, bank, tmp_path, warnings):
    commit = bank.push_to_hub("me/snippets")
    pointer = {"repo_id": "me/snippets", "revision": commit.oid}
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, memory_bank_source=pointer)
    assert f"its memory bank elsewhere; the one in {tmp_path / 'bank'} stays" in warnings.text
    loaded = load(tmp_path)
    assert loaded.memory_bank is None
    assert loaded.load_memory_bank()._folder.is_relative_to(os.environ["HF_HOME"])

    loaded.save_pretrained(tmp_path / "held", memory_bank_source={"subfolder": "bank"})
    assert GMemMemoryBank.from_pretrained(tmp_path / "held/bank").fingerprint == bank.fingerprint
    loaded.memory_bank = bank.without(indices=[1])
    loaded.save_pretrained(tmp_path / "edited")
    source = source_of(tmp_path / "edited")
    assert source["subfolder"] == "bank" and source["fingerprint"] == loaded.memory_bank.fingerprint
    assert source["trained_with"]["fingerprint"] == bank.fingerprint
    assert load(tmp_path).config.memory_bank_source["repo_id"] == "me/snippets"


@pytest.mark.parametrize(
    "source", [{}, {"repo_id": "me/snippets"}, {"subfolder": "other"}, {"repo_id": "me/snippets", "revision": None}]
)
def test_a_place_that_is_none(pipe, tmp_path, source):
    with pytest.raises(ValueError, match="`memory_bank_source` must be .*'subfolder': 'bank'.* got"):
        pipe.save_pretrained(tmp_path, memory_bank_source=source)


def test_no_bank_to_put_anywhere(hub, pipe, tmp_path):
    pipe.memory_bank = None
    with pytest.raises(ValueError, match="`memory_bank_source` is {'subfolder': 'bank'}, but this pipeline has no"):
        pipe.save_pretrained(tmp_path, memory_bank_source={"subfolder": "bank"})
    with pytest.raises(ValueError, match="`bank_repo_id` is 'me/snippets', but the pipeline has no memory bank"):
        pipe.push_to_hub("me/model", bank_repo_id="me/snippets")


def test_a_pointer_to_another_bank(hub, pipe, tmp_path):
    commit = push_memory_bank(other_bank(), "me/other")
    pipe.save_pretrained(tmp_path, memory_bank_source={"repo_id": "me/other", "revision": commit.oid})
    with pytest.raises(ValueError, match=f"bank in the dataset repository 'me/other' at revision '{commit.oid}' has"):
        draw(load(tmp_path))


# Whether a bank fits


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    return tmp_path


@BOTH
def test_a_descendant_needs_no_comment(folder, bank, cls, warnings, tmp_path):
    loaded = load(folder, cls, memory_bank=bank.extend(torch.ones(1, 16), [0]).without(indices=[2]))
    draw(loaded)
    loaded.memory_bank.save_pretrained(tmp_path / "edited")
    loaded.memory_bank = GMemMemoryBank.from_pretrained(tmp_path / "edited")
    draw(loaded)
    assert not warnings.records


@pytest.mark.parametrize("changes", [{}, {"encoder": None, "preprocessing": None}], ids=["same", "not recorded"])
def test_another_bank_of_the_same_encoder(folder, bank, warnings, changes, tmp_path):
    other = other_bank(**changes)
    loaded = load(folder)
    draw(loaded)
    loaded.memory_bank = other
    draw(loaded)
    draw(loaded, memory_indices=[0], num_images=1)
    (record,) = warnings.records
    assert bank.fingerprint in record.message and other.fingerprint in record.message
    loaded.save_pretrained(tmp_path / "saved")
    warnings.clear()
    draw(load(tmp_path / "saved"))  # saving does not make it the bank of the training
    assert len(warnings.records) == 1


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "openai/clip"}, "whose `encoder` is 'facebook/dinov2-base'. .*'openai/clip'"),
        ({"preprocessing": {"resize": 224}}, r"`preprocessing` is {.*'resize': 256}\. .* is {'resize': 224}"),
        ({"dim": 12}, "`dim` is 16. .* is 12"),
    ],
)
def test_a_bank_that_does_not_fit(folder, bank, cls, changes, message):
    loaded = load(folder, cls, memory_bank=other_bank(**changes))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            draw(loaded)
    draw(loaded, memory=bank[:2])
    loaded.memory_bank = bank
    draw(loaded)
