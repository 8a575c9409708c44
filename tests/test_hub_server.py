# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The stand-in for the Hub, as the real client of the Hub sees it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


KINDS = ["model", "dataset", "space"]
LARGE = bytes(range(256)) * 400
api = HfApi()


def make_folder(path: Path, **files: bytes) -> Path:
    for name, content in {"config.json": b"{}\n", "parts/rows.safetensors": LARGE, **files}.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


@pytest.fixture
def repo(hub, tmp_path):
    api.create_repo("me/things")
    api.upload_folder(repo_id="me/things", folder_path=make_folder(tmp_path / "things"))
    hub.requests.clear()
    return "me/things"


def python(code: str, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, **pipes)


@pytest.mark.parametrize("kind", KINDS)
def test_upload_and_download(hub, tmp_path, kind):
    url = api.create_repo("things", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    assert (url.repo_id, url.repo_type) == ("me/things", kind)
    folder = make_folder(tmp_path / "things")
    commit = api.upload_folder(repo_id="me/things", repo_type=kind, folder_path=folder)
    assert commit.oid == api.repo_info("me/things", repo_type=kind).sha

    hub.requests.clear()
    snapshot = Path(snapshot_download("me/things", repo_type=kind))
    assert snapshot.name == commit.oid
    assert (snapshot / "config.json").read_bytes() == b"{}\n"
    assert (snapshot / "parts/rows.safetensors").read_bytes() == LARGE
    assert sorted(hub.downloaded("me/things")) == [".gitattributes", "config.json", "parts/rows.safetensors"]
    hub.requests.clear()
    assert snapshot_download("me/things", repo_type=kind) == str(snapshot)
    assert hub.downloaded("me/things") == []


def test_whoami(hub):
    assert api.whoami()["name"] == "me"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_unknown")


def test_create_and_delete_repo(hub):
    api.create_repo("org/things", private=True)
    assert api.repo_info("org/things").private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/things")
    assert api.create_repo("org/things", exist_ok=True).repo_id == "org/things"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("you/things")
    api.delete_repo("org/things")
    assert not api.repo_exists("org/things")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/things")


def test_files_of_a_repo(repo):
    assert api.list_repo_files(repo) == [".gitattributes", "config.json", "parts/rows.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(repo)] == ["parts", ".gitattributes", "config.json"]
    assert [entry.path for entry in api.list_repo_tree(repo, "parts")] == ["parts/rows.safetensors"]
    small, large, folder = api.get_paths_info(repo, ["config.json", "parts/rows.safetensors", "parts", "nothing"])
    assert (small.size, small.lfs) == (3, None)
    assert (large.size, large.lfs.size) == (len(LARGE), len(LARGE))
    assert folder.path == "parts"
    assert api.file_exists(repo, "config.json") and not api.file_exists(repo, "nothing.json")


def test_what_is_missing(repo):
    with pytest.raises(RepositoryNotFoundError, match="404"):
        hf_hub_download("me/nothing", "config.json")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        hf_hub_download("me/nothing", "config.json", token=False)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "config.json", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "config.json", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "nothing.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(repo, "config.json", repo_type="dataset")


def test_private_and_gated(hub, repo):
    hub.repository(repo).private = True
    assert hf_hub_download(repo, "config.json")
    for token, status in ((False, "401"), ("hf_you", "404")):
        with pytest.raises(RepositoryNotFoundError, match=status):
            hf_hub_download(repo, "parts/rows.safetensors", token=token)
    hub.repository(repo).private = False
    hub.repository(repo).gated = True
    for token in (False, "hf_you"):
        assert api.repo_info(repo, token=token).gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download(repo, "parts/rows.safetensors", token=token)


def test_only_owners_write(repo, tmp_path):
    for token, error in ((False, RepositoryNotFoundError), ("hf_you", HfHubHTTPError)):
        with pytest.raises(error, match="401|403"):
            api.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a", token=token)
        with pytest.raises(error, match="401|403"):
            api.create_tag(repo, tag="v1", token=token)
    pull_request = api.upload_file(
        repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a", token="hf_you", create_pr=True
    )
    assert pull_request.pr_revision == "refs/pr/1"
    assert "a.txt" not in api.list_repo_files(repo)
    assert Path(hf_hub_download(repo, "a.txt", revision="refs/pr/1")).read_bytes() == b"a"


def test_revisions(repo):
    first = api.repo_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="feature/a")
    on_branch = api.upload_file(repo_id=repo, path_in_repo="config.json", path_or_fileobj=b"[]", revision="feature/a")
    assert Path(hf_hub_download(repo, "config.json", revision="feature/a")).read_bytes() == b"[]"
    for revision in (None, "v1", first):
        assert Path(hf_hub_download(repo, "config.json", revision=revision)).read_bytes() == b"{}\n"
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/a": on_branch.oid}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert [commit.commit_id for commit in api.list_repo_commits(repo, revision="feature/a")][:2] == [
        on_branch.oid,
        first,
    ]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="feature/a")
    for revision in ("v1", on_branch.oid):
        with pytest.raises(RevisionNotFoundError):
            api.repo_info(repo, revision=revision)


def test_commits(repo):
    first = api.repo_info(repo).sha
    api.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id=repo, path_in_repo="b.txt", path_or_fileobj=b"b", parent_commit=first)
    unchanged = api.upload_file(repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert unchanged.oid == api.repo_info(repo).sha
    api.delete_file("a.txt", repo)
    api.delete_folder("parts", repo)
    assert api.list_repo_files(repo) == [".gitattributes", "config.json"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("a.txt", repo)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"---\na: [\n---\n")
    with pytest.raises(BadRequestError):
        api.upload_file(repo_id=repo, path_in_repo="b.txt", path_or_fileobj=b"b", revision=first)


def test_squash(repo):
    first = api.repo_info(repo).sha
    api.delete_file("config.json", repo)
    api.super_squash_history(repo)
    assert len(api.list_repo_commits(repo)) == 1
    assert api.list_repo_files(repo) == [".gitattributes", "parts/rows.safetensors"]
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "config.json", revision=first)


def test_a_known_large_file_is_not_sent_again(hub, repo):
    api.create_repo("me/more")
    hub.requests.clear()
    api.upload_file(repo_id="me/more", path_in_repo="copy.safetensors", path_or_fileobj=LARGE)
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert Path(hf_hub_download("me/more", "copy.safetensors")).read_bytes() == LARGE


def test_offline_from_the_cache(hub, repo):
    api.create_tag(repo, tag="v1")
    snapshot = snapshot_download(repo, revision="v1", allow_patterns=["config.json"])
    hub.requests.clear()
    code = f"from huggingface_hub import *; print(hf_hub_download({repo!r}, 'config.json', revision='v1'))"
    out, err = python(code, HF_HUB_OFFLINE="1").communicate()
    assert out.strip() == f"{snapshot}/config.json", err
    with pytest.raises(IncompleteSnapshotError):
        snapshot_download(repo, revision="v1", local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repo, "parts/rows.safetensors", revision="v1", local_files_only=True)
    assert hub.requests == []


def test_an_error_on_purpose(hub, repo):
    hub.fail("GET .*rows.safetensors")
    with pytest.raises(HfHubHTTPError, match="503"):
        snapshot_download(repo)
    hub.requests.clear()
    assert Path(snapshot_download(repo), "parts/rows.safetensors").read_bytes() == LARGE
    assert hub.downloaded(repo) == ["parts/rows.safetensors"]


def test_a_cut_connection_is_resumed(hub, repo):
    hub.cut("GET .*rows.safetensors", after=70_000)
    assert Path(hf_hub_download(repo, "parts/rows.safetensors")).read_bytes() == LARGE
    assert hub.downloaded(repo) == ["parts/rows.safetensors"] * 2


def test_a_slow_answer(hub, repo):
    hub.delay("GET .*rows.safetensors", seconds=0.3)
    start = time.monotonic()
    hf_hub_download(repo, "parts/rows.safetensors")
    assert time.monotonic() - start > 0.3


def test_two_processes_at_once(hub, repo):
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({repo!r}))"
    hub.delay("GET .*rows.safetensors", seconds=0.3, times=2)
    processes = [python(code), python(code)]
    snapshots = {process.communicate()[0].strip() for process in processes}
    assert len(snapshots) == 1
    assert Path(snapshots.pop(), "parts/rows.safetensors").read_bytes() == LARGE


def test_stock_pipeline(hub):
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).push_to_hub("me/ddpm", private=True)
    hub.requests.clear()
    pipe = DiffusionPipeline.from_pretrained("me/ddpm")
    assert sorted(hub.downloaded("me/ddpm")) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), unet.parameters(), strict=True))


def test_load_dataset(hub, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"file": ["a.png", "b.png"], "label": [0, 1]}), tmp_path / "t.parquet")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: t.parquet\n---\n")
    api.create_repo("me/rows", repo_type="dataset")
    api.upload_folder(repo_id="me/rows", repo_type="dataset", folder_path=tmp_path)
    data = datasets.load_dataset("me/rows", split="train")
    assert data.to_dict() == {"file": ["a.png", "b.png"], "label": [0, 1]}
