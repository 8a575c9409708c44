# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import hashlib
import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from diffusers_gmem.hub import transfer
from diffusers_gmem.hub.transfer import HubRepo


CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILES = {"config.json": b"{}\n", "rows.safetensors": CONTENT}
REPO = HubRepo("me/bank")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, "SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture
def commit(hub):
    """The commit that put `FILES` into the data set me/bank."""
    info = REPO.upload(FILES, "Upload")
    hub.requests.clear()
    return info.oid


def stored(hub, repo_id="me/bank", kind="dataset", revision="main"):
    repo = hub.repository(repo_id, kind)
    return {
        name: (hub.folder / f.sha256).read_bytes() for name, f in repo.commits[repo.resolve(revision)].files.items()
    }


# Upload


def test_upload_makes_the_repository_and_one_commit(hub):
    info = HubRepo("me/new", "dataset").upload(FILES | {"sub/README.md": b"text"}, "First", private=True)
    repo = hub.repository("me/new", "dataset")
    assert repo.private
    assert repo.branches == {"main": info.oid}
    assert [repo.commits[i].title for i in repo.history(info.oid)] == ["First", "initial commit"]
    assert stored(hub, "me/new").items() >= (FILES | {"sub/README.md": b"text"}).items()


def test_upload_takes_files_from_disk(hub, tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    REPO.upload({"rows.safetensors": tmp_path / "a"}, "First")
    assert stored(hub)["rows.safetensors"] == CONTENT


def test_upload_deletes_stale_files_in_the_same_commit(hub, commit):
    HubRepo("me/bank").upload({"notes.txt": b"mine"}, "Notes")
    info = REPO.upload({"config.json": b"[]"}, "Second", stale=lambda name: name.endswith((".safetensors", ".json")))
    assert sorted(stored(hub)) == [".gitattributes", "config.json", "notes.txt"]
    assert stored(hub)["config.json"] == b"[]"
    assert stored(hub, revision=commit).items() >= FILES.items()
    assert len(hub.repository("me/bank", "dataset").history(info.oid)) == 4


def test_upload_to_a_branch(hub, commit):
    info = HubRepo("me/bank", revision="small").upload({"config.json": b"[]"}, "Small")
    assert hub.repository("me/bank", "dataset").branches == {"main": commit, "small": info.oid}
    assert stored(hub, revision="small") == stored(hub) | {"config.json": b"[]"}


def test_upload_as_a_pull_request(hub, commit):
    info = HubRepo("me/bank", token="hf_you").upload({"config.json": b"[]"}, "Change", create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert stored(hub)["config.json"] == b"{}\n"
    assert stored(hub, revision="refs/pr/1")["config.json"] == b"[]"


def test_upload_of_the_same_sends_and_commits_nothing(hub, commit):
    assert REPO.upload(FILES, "Again").oid == commit
    assert not [line for line in hub.requests if line.startswith("PUT") or "/commit/" in line]


@pytest.mark.parametrize("route", ["POST .*/repos/create", "GET .*/tree/", "POST .*/commit/"])
def test_upload_survives_errors_of_the_hub(hub, route):
    hub.fail(route)
    info = REPO.upload(FILES, "Upload")
    assert stored(hub).items() >= FILES.items()
    assert len(hub.repository("me/bank", "dataset").history(info.oid)) == 2


def test_upload_whose_answer_got_lost(hub):
    hub.cut("POST .*/commit/", after=10)
    info = REPO.upload(FILES, "Upload", stale=lambda name: True)
    assert len(hub.repository("me/bank", "dataset").history(info.oid)) == 2


def test_a_pull_request_is_opened_once(hub, commit):
    hub.cut("POST .*/commit/", after=10)
    with pytest.raises(ConnectionError, match="'me/bank'"):
        REPO.upload({"config.json": b"[]"}, "Change", create_pr=True)
    assert len(hub.repository("me/bank", "dataset").pull_requests) == 1


@pytest.mark.parametrize(
    "repo", [HubRepo("me/bank", token=False), HubRepo("you/bank"), HubRepo("me/bank", token="hf_no")]
)
def test_upload_without_the_right(hub, repo):
    with pytest.raises(PermissionError, match=f"the dataset repository '{repo.repo_id}' is not open to this token"):
        repo.upload(FILES, "Upload")


# Download


def test_download(hub, commit):
    path = REPO.download("config.json")
    assert path.read_bytes() == b"{}\n"
    assert REPO.commit_of("config.json", path) == commit
    assert HubRepo.of_snapshot(path.parent) == HubRepo("me/bank", "dataset", commit, os.environ["HF_HOME"] + "/hub")
    assert HubRepo.of_snapshot("/somewhere/else") is None
    hub.requests.clear()
    assert REPO.at(commit).download("config.json") == path
    assert hub.requests == []


def test_commit_of_a_file_in_a_folder(hub):
    info = REPO.upload({"bank/config.json": b"{}"}, "Upload")
    assert REPO.commit_of("bank/config.json", REPO.download("bank/config.json")) == info.oid


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1", "commit"])
def test_download_at_a_revision(hub, commit, revision):
    HfApi().create_tag("me/bank", tag="v1", repo_type="dataset")
    REPO.upload({"config.json": b"[1]"}, "Change", create_pr=True)
    REPO.upload({"config.json": b"[2]"}, "Change")
    expected = {"main": b"[2]", "v1": b"{}\n", "refs/pr/1": b"[1]", "commit": b"{}\n"}
    repo = REPO.at(commit if revision == "commit" else revision)
    assert repo.download("config.json").read_bytes() == expected[revision]


def test_download_to_another_cache(commit, tmp_path):
    path = HubRepo("me/bank", cache_dir=tmp_path).download("config.json")
    assert path.is_relative_to(tmp_path)
    assert HubRepo("me/bank", cache_dir=tmp_path, local_files_only=True).download("config.json") == path


def test_download_all(hub, commit):
    files = {f"part-{k}.safetensors": CONTENT + bytes([k]) for k in range(12)}
    REPO.upload(files, "More")
    listing = [(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()]
    paths = REPO.download_all(listing)
    assert [path.read_bytes() for path in paths] == list(files.values())
    assert sorted(hub.downloaded("me/bank")) == sorted(files)


@pytest.mark.parametrize(("method", "times"), [("HEAD", 1), ("GET", transfer.ATTEMPTS - 1)])
def test_download_survives_errors_of_the_hub(hub, commit, method, times):
    hub.fail(f"{method} .*rows.safetensors", times=times)
    assert REPO.download("rows.safetensors").read_bytes() == CONTENT


def test_download_gives_up_and_the_next_call_completes(hub, commit):
    hub.fail("GET .*rows.safetensors", times=transfer.ATTEMPTS)
    with pytest.raises(ConnectionError, match="'rows.safetensors' in the dataset repository 'me/bank'.*503"):
        REPO.download("rows.safetensors")
    assert REPO.download("rows.safetensors").read_bytes() == CONTENT


def test_download_goes_on_after_a_cut(hub, commit):
    hub.cut("GET .*rows.safetensors", after=60_000)
    hub.fail("GET .*rows.safetensors", times=1)
    assert REPO.download("rows.safetensors").read_bytes() == CONTENT


def test_two_processes_at_once(hub, commit):
    hub.delay("GET .*rows.safetensors", seconds=0.3, times=2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        first, second = [pool.submit(REPO.download, "rows.safetensors") for _ in range(2)]
        assert first.result() == second.result()
    assert first.result().read_bytes() == CONTENT


def test_a_file_that_cannot_be_written(commit):
    # A limit on the size of files stands for a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            OSError, match="'rows.safetensors' in the dataset repository 'me/bank' cannot be written"
        ) as e:
            REPO.download("rows.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.environ["HF_HOME"] in str(e.value)
    assert REPO.download("rows.safetensors").read_bytes() == CONTENT


# What is said when it fails


@pytest.mark.parametrize(
    ("repo", "filename", "message"),
    [
        (
            HubRepo("me/none"),
            "config.json",
            "'me/none' does not exist, or it is private and your token may not read it",
        ),
        (
            HubRepo("me/none", token=False),
            "config.json",
            "or it is private: log in with `hf auth login` or pass `token=`",
        ),
        (HubRepo("me/bank", "model"), "config.json", "there is a dataset repository of this name"),
        (
            HubRepo("me/bank", revision="v9"),
            "config.json",
            "at revision 'v9' does not exist: its .* tags are main, v1",
        ),
        (HubRepo("me/bank"), "model_index.json", "'me/bank' has no file 'model_index.json'"),
        (HubRepo("./me/bank"), "config.json", "neither a local folder nor a repository"),
        (HubRepo("me/bank", local_files_only=True), "config.json", "not in the cache of downloads"),
    ],
)
def test_what_is_not_there(commit, repo, filename, message):
    HfApi().create_tag("me/bank", tag="v1", repo_type="dataset")
    with pytest.raises(FileNotFoundError, match=message):
        repo.download(filename)


def test_private_and_gated_repositories(hub, commit):
    hub.repository("me/bank", "dataset").private = True
    with pytest.raises(FileNotFoundError, match="or it is private: log in"):
        HubRepo("me/bank", token=False).download("config.json")
    assert REPO.download("config.json")
    hub.repository("me/bank", "dataset").private = False
    hub.repository("me/bank", "dataset").gated = True
    with pytest.raises(PermissionError, match=f"gated: ask for access at {hub.url}/datasets/me/bank"):
        HubRepo("me/bank", token="hf_you").download("rows.safetensors")


def test_nobody_is_logged_in(commit, hub, monkeypatch):
    hub.repository("me/bank", "dataset").private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="or it is private: log in"):
        REPO.download("config.json")


def test_errors_are_not_asked_for_again(hub, commit):
    with pytest.raises(FileNotFoundError):
        REPO.download("nothing.json")
    assert [line for line in hub.requests if "nothing.json" in line] == [
        "HEAD /datasets/me/bank/resolve/main/nothing.json"
    ]


# Checks


def test_a_download_is_checked_once(hub, commit, monkeypatch):
    checked = []
    for _ in range(2):
        path = REPO.at(commit).download_verified("rows.safetensors", len(CONTENT), SHA256, checked.append)
    assert checked == [path]
    os.utime(path)  # another file for all we know
    REPO.at(commit).download_verified("rows.safetensors", len(CONTENT), SHA256, checked.append)
    assert checked == [path, path]


def test_a_failed_check_is_repeated(commit):
    def check(path):
        raise ValueError("not finite")

    for _ in range(2):
        with pytest.raises(ValueError, match="not finite"):
            REPO.download_verified("rows.safetensors", len(CONTENT), SHA256, check)


def test_a_damaged_download_is_replaced(hub, commit):
    path = REPO.download("rows.safetensors")
    path.resolve().write_bytes(CONTENT[:-1] + b"!")
    hub.requests.clear()
    assert REPO.download_verified("rows.safetensors", len(CONTENT), SHA256).read_bytes() == CONTENT
    assert hub.downloaded("me/bank") == ["rows.safetensors"]


def test_a_damaged_upload_is_refused(hub, commit):
    with pytest.raises(ValueError, match="'rows.safetensors' in the dataset repository 'me/bank' is damaged"):
        REPO.download_verified("rows.safetensors", len(CONTENT), "0" * 64)
    with pytest.raises(ValueError, match="expected are 7 bytes"):
        REPO.download_verified("rows.safetensors", 7, SHA256)
    assert not (Path(os.environ["HF_HOME"]) / "assets").exists()


# Squashing


def test_squash_history(hub, commit):
    new = CONTENT[::-1]
    REPO.upload({"rows.safetensors": new}, "Without row 3")
    HfApi().create_tag("me/bank", tag="v1", repo_type="dataset")
    with pytest.raises(ValueError, match="keeps earlier commits in refs/tags/v1"):
        REPO.squash_history()
    HfApi().delete_tag("me/bank", tag="v1", repo_type="dataset")
    REPO.squash_history()
    repo = hub.repository("me/bank", "dataset")
    assert len(repo.history(repo.branches["main"])) == 1
    assert stored(hub).items() >= (FILES | {"rows.safetensors": new}).items()
    assert not (hub.folder / SHA256).exists()
    with pytest.raises(FileNotFoundError, match="its branches and tags are main"):
        REPO.at(commit).download("config.json")
    with pytest.raises(PermissionError):
        HubRepo("me/bank", token="hf_you").squash_history()
