# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Files to and from the Hub: each commit whole, each file checked once, each failure with its name and what to do."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


logger = logging.get_logger(__name__)

T = TypeVar("T")

# huggingface_hub resumes a cut connection, but does not ask again for a file that was answered with an error
ATTEMPTS = 5
SECONDS_BETWEEN_ATTEMPTS = 1.0  # doubled each time
PARALLEL_DOWNLOADS = 8

# The base class of all errors of the HTTP client, whichever client this version of huggingface_hub has
_HTTPError = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class HubRepo:
    """
    A repository of the Hub at a revision, and how to reach it.

    Args:
        repo_id (`str`): Such as `"org/in256-memory"`.
        repo_type (`str`, defaults to `"dataset"`): `"model"`, `"dataset"` or `"space"`.
        revision (`str`, *optional*): A branch, a tag or a commit; the main branch by default.
        cache_dir (`str` or `Path`, *optional*): Of the downloads; that of huggingface_hub by default.
        token (`str` or `bool`, *optional*): That of `hf auth login` by default; `False` for none.
        local_files_only (`bool`, defaults to `False`): Whether to take files from the cache alone.
    """

    repo_id: str
    repo_type: str = "dataset"
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False

    def __str__(self) -> str:
        at = "" if self.revision is None else f" at revision {self.revision!r}"
        return f"the {self.repo_type} repository {self.repo_id!r}{at}"

    @classmethod
    def of_snapshot(cls, folder: str | Path, **kwargs) -> "HubRepo | None":
        """The repository and commit of a folder in the cache of downloads; `None` for any other folder."""
        match = re.fullmatch(r"(.+)/(model|dataset|space)s--([^/]+)/snapshots/([0-9a-f]{40})", Path(folder).as_posix())
        if match is None:
            return None
        cache_dir, repo_type, name, commit = match.groups()
        return cls(name.replace("--", "/"), repo_type, commit, cache_dir, **kwargs)

    def at(self, commit: str) -> "HubRepo":
        return replace(self, revision=commit)

    def download(self, filename: str, part_of: str | None = None) -> Path:
        """
        The path of a file in the cache, downloaded where it is not there. Asks up to five times where the connection or
        the Hub fails. `part_of` is what a repository without the file does not hold, for the message.

        Raises:
            `FileNotFoundError`: the repository, the revision or the file does not exist or is not in the cache.
            `PermissionError`: the repository may not be read.
            `ConnectionError`: the Hub was not reached, or the download did not come to an end.
            `OSError`: the file cannot be written.
        """

        def attempt() -> str:
            with _explained(self, filename, part_of):
                return hf_hub_download(
                    self.repo_id,
                    filename,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                )

        return Path(_retried(attempt))

    def commit_of(self, filename: str, path: Path) -> str:
        """The commit that `path`, where `download` put a file, belongs to."""
        return path.parents[filename.count("/")].name

    def download_verified(
        self, filename: str, size: int, sha256: str, check: Callable[[Path], None] | None = None
    ) -> Path:
        """
        [`~HubRepo.download`], and once for each download a check of size and SHA-256. A file that fails it is removed
        and downloaded again. `check` is called after that, once too, and raises what it finds.

        Raises:
            `ValueError`: what the Hub holds is not what is expected.
        """
        for last in (False, True):
            path = self.download(filename)
            mark = _mark(path, sha256)
            if mark.exists():
                return path
            found_size = path.stat().st_size
            with path.open("rb") as file:
                found_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if (found_size, found_sha256) == (size, sha256):
                break
            path.resolve().unlink()
            path.unlink(missing_ok=True)  # the link to it
            message = (
                f"{filename!r} in {self} is damaged: expected are {size} bytes with the SHA-256 {sha256}, found "
                f"{found_size} bytes with {found_sha256}. It was removed from the cache"
            )
            if last or self.local_files_only:
                raise ValueError(f"{message}; if a new download does not help, it has to be uploaded anew.")
            logger.warning(f"{message} and is downloaded again.")
        if check is not None:
            check(path)
        with suppress(OSError):  # where nothing can be written, it is checked each time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return path

    def download_all(
        self, files: Sequence[tuple[str, int, str]], check: Callable[[Path], None] | None = None
    ) -> list[Path]:
        """[`~HubRepo.download_verified`] of several files `(filename, size, sha256)` side by side."""
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            tasks = [pool.submit(self.download_verified, *file, check) for file in files]
            try:
                return [task.result() for task in logging.tqdm(tasks, desc=f"Fetching {self.repo_id}")]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def upload(
        self,
        files: Mapping[str, Path | bytes],
        commit_message: str,
        stale: Callable[[str], bool] = lambda filename: False,
        private: bool | None = None,
        create_pr: bool = False,
        space_sdk: str | None = None,
    ) -> CommitInfo:
        """
        Puts files into the repository with one commit, so that nobody sees half of it. The repository and the branch
        `revision` are made where they do not exist. Contents that the repository has are not sent again.

        Args:
            files (`dict[str, Path | bytes]`): Their names in the repository, and their contents.
            commit_message (`str`): The first line of the commit.
            stale (`Callable`, *optional*): Whether a file of the repository that is not among `files` is to be deleted.
            private (`bool`, *optional*): Of a repository that is made; the default of the namespace if not given.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request instead.
            space_sdk (`str`, *optional*): Of a Space that is made.

        Returns:
            `CommitInfo`: `oid` is the commit; `pr_url` is the pull request.

        Raises:
            `PermissionError`: the token is missing or may not write there.
            `ConnectionError`: the Hub was not reached.
        """
        api = HfApi(token=self.token)

        def attempt() -> CommitInfo:
            with _explained(self):
                if not (create_pr and api.repo_exists(self.repo_id, repo_type=self.repo_type)):
                    api.create_repo(
                        self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True, space_sdk=space_sdk
                    )
                if self.revision is not None and not self.revision.startswith("refs/"):
                    api.create_branch(self.repo_id, repo_type=self.repo_type, branch=self.revision, exist_ok=True)
                present = api.list_repo_files(self.repo_id, repo_type=self.repo_type, revision=self.revision)
                gone = [name for name in present if name not in files and stale(name)]
                return api.create_commit(
                    self.repo_id,
                    [CommitOperationDelete(name, is_folder=False) for name in gone]
                    + [CommitOperationAdd(name, content) for name, content in files.items()],
                    commit_message=commit_message,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    create_pr=create_pr,
                )

        # Where the answer to a commit got lost, the next attempt finds nothing to do; but a pull request would be opened
        # a second time
        return attempt() if create_pr else _retried(attempt)

    def set_space_variable(self, name: str, value: str) -> None:
        """
        Sets an environment variable of a Space, which anyone may read. The Hub restarts the Space with it.

        Raises:
            `PermissionError`, `FileNotFoundError`, `ConnectionError`: see [`~HubRepo.upload`].
        """

        def attempt() -> None:
            with _explained(self):
                HfApi(token=self.token).add_space_variable(self.repo_id, name, value)

        _retried(attempt)

    def squash_history(self) -> None:
        """
        Makes the present state of the branch its only commit, and deletes the large files that only earlier commits
        had: the way to take removed rows off the Hub. It cannot be undone, and whoever pinned an earlier commit can no
        longer load it.

        Raises:
            `ValueError`: tags, other branches or pull requests still hold earlier commits; delete them first.
            `PermissionError`, `FileNotFoundError`, `ConnectionError`: see [`~HubRepo.upload`].
        """
        api = HfApi(token=self.token)
        branch = self.revision or constants.DEFAULT_REVISION
        with _explained(self):
            refs = api.list_repo_refs(self.repo_id, repo_type=self.repo_type, include_pull_requests=True)
            others = [ref.ref for ref in [*refs.branches, *refs.tags, *refs.pull_requests] if ref.name != branch]
            if others:
                raise ValueError(
                    f"{self} keeps earlier commits in {', '.join(others)}. Delete these tags and branches first, and "
                    "close and delete the pull requests."
                )
            api.super_squash_history(self.repo_id, repo_type=self.repo_type, branch=branch)
            tree = api.list_repo_tree(self.repo_id, repo_type=self.repo_type, revision=branch, recursive=True)
            kept = {entry.lfs.sha256 for entry in tree if getattr(entry, "lfs", None) is not None}
            unused = [
                file for file in api.list_lfs_files(self.repo_id, repo_type=self.repo_type) if file.oid not in kept
            ]
            api.permanently_delete_lfs_files(self.repo_id, unused, rewrite_history=False, repo_type=self.repo_type)


def squash_history(
    repo_id: str, repo_type: str = "dataset", branch: str | None = None, token: str | bool | None = None
) -> None:
    """[`HubRepo.squash_history`]: leaves a repository its present state alone."""
    HubRepo(repo_id, repo_type, branch, token=token).squash_history()


def _mark(path: Path, sha256: str) -> Path:
    """The empty file that says that the download at `path` was checked. Another file there has another mark."""
    file = path.resolve()
    state = f"{file} {file.stat().st_mtime_ns} {sha256}"
    return Path(constants.HF_ASSETS_CACHE, "diffusers_gmem", "verified", hashlib.sha256(state.encode()).hexdigest())


def _retried(attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which is called again, a few times, after a `ConnectionError`."""
    for number in range(1, ATTEMPTS):
        try:
            return attempt()
        except ConnectionError as error:
            seconds = SECONDS_BETWEEN_ATTEMPTS * 2 ** (number - 1)
            logger.warning(f"{error} Attempt {number + 1} of {ATTEMPTS} in {seconds:g} s.")
            time.sleep(seconds)
    return attempt()


@contextmanager
def _explained(repo: HubRepo, filename: str | None = None, part_of: str | None = None) -> Iterator[None]:
    """Says of an error of huggingface_hub which repository and file it is about and what to do."""
    subject = f"{repo}" if filename is None else f"{filename!r} in {repo}"
    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo.repo_id!r} is neither a local folder nor a repository of the Hub.") from error
    except GatedRepoError as error:
        address = f"{constants.ENDPOINT}/{'' if repo.repo_type == 'model' else f'{repo.repo_type}s/'}{repo.repo_id}"
        raise PermissionError(
            f"{repo} is gated: ask for access at {address}, then log in with `hf auth login` or pass `token=`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(_not_found(repo)) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} does not exist: {_known_revisions(repo)}.") from error
    except LocalEntryNotFoundError as error:
        if repo.local_files_only or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise FileNotFoundError(
                f"{subject} is not in the cache of downloads, and the Hub may not be asked (`local_files_only=True` or "
                "HF_HUB_OFFLINE=1). Load it once with a connection."
            ) from error
        raise ConnectionError(f"{subject} cannot be reached: {error.__cause__ or error}") from error
    except OfflineModeIsEnabled as error:
        raise FileNotFoundError(f"{subject} cannot be reached: {error}") from error
    except EntryNotFoundError as error:
        lack = f": it does not hold {part_of}" if part_of else ""
        raise FileNotFoundError(f"{repo} has no file {filename!r}{lack}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"{subject} is not open to this token ({error.server_message or status}). Log in with `hf auth login`, or "
                "pass `token=`, with an account and a token that have the right to do this."
            ) from error
        if status in (408, 409, 412, 429) or status >= 500:
            raise ConnectionError(f"{subject}: the Hub answers with the status {status}.") from error
        raise OSError(f"{subject}: {error}") from error
    except _HTTPError as error:
        raise ConnectionError(f"{subject}: the connection failed ({type(error).__name__}: {error}).") from error
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise ConnectionError(f"{subject}: the download ended early.") from error
        if error.errno is None or filename is None:
            raise
        cache = repo.cache_dir or constants.HF_HUB_CACHE
        raise OSError(
            error.errno,
            f"{subject} cannot be written to {cache} ({error.strerror}). Make room or choose another place, with "
            "`cache_dir=` or the environment variable HF_HOME; what is complete there stays",
        ) from error


def _not_found(repo: HubRepo) -> str:
    """The Hub does not tell a repository that is missing from one that may not be read."""
    message = f"{repo} does not exist"
    if repo.token is False or (repo.token or get_token()) is None:
        message += ", or it is private: log in with `hf auth login` or pass `token=`"
    else:
        message += ", or it is private and your token may not read it"
    message += f". There is no local folder {repo.repo_id!r} either."
    for repo_type in {"model", "dataset"} - {repo.repo_type}:
        if HfApi(token=repo.token).repo_exists(repo.repo_id, repo_type=repo_type):
            message += f" But there is a {repo_type} repository of this name."
    return message


def _known_revisions(repo: HubRepo) -> str:
    refs = HfApi(token=repo.token).list_repo_refs(repo.repo_id, repo_type=repo.repo_type)
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"its branches and tags are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
