# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
A stand-in for the Hugging Face Hub: the HTTP routes that the unmodified `huggingface_hub` client uses, on 127.0.0.1.

It keeps models, datasets and Spaces with branches, tags, pull requests and immutable commits, serves large files by
redirect and in byte ranges, and answers what is missing, private or gated with the Hub's status and error codes. It
records every request, and can be told to fail: to answer with an error, to cut connections, to be slow.

The client has to be told before `huggingface_hub` is imported: `HF_ENDPOINT` is the server's address, and
`HF_HUB_DISABLE_XET=1`, as the stand-in has no Xet storage. `conftest.py` does so and has the fixture `hub`.
"""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import uvicorn
import yaml
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, RedirectResponse


# Tokens, and what they may write to
USERS = {"hf_me": ("me", ["org"]), "hf_you": ("you", [])}
LARGE_FILES = re.compile(r".+\.(safetensors|parquet|bin|png|jpe?g|gif|webp|zip|npy)")


@dataclass
class File:
    sha256: str
    size: int
    blob_id: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.blob_id}
        return entry | ({"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.large else {})


@dataclass
class Commit:
    files: dict[str, File]
    parent: str | None
    title: str
    author: str
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repository:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the repository is in the Hub's addresses."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    @property
    def refs(self) -> dict[str, str]:
        return self.pull_requests | self.tags | self.branches

    def commit(self, files: dict[str, File], parent: str | None, title: str, author: str) -> str:
        commit_id = hashlib.sha1(f"{self.id} {len(self.commits)} {title} {time.time_ns()}".encode()).hexdigest()
        self.commits[commit_id] = Commit(files, parent, title, author)
        return commit_id

    def history(self, commit_id: str | None) -> list[str]:
        """The commit and its ancestors, newest first."""
        ids = []
        while commit_id is not None:
            ids.append(commit_id)
            commit_id = self.commits[commit_id].parent
        return ids

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag or a pull request, or one that can still be reached from them."""
        if revision in self.refs:
            return self.refs[revision]
        if not any(revision in self.history(tip) for tip in self.refs.values()):
            raise hub_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return revision


def unauthorized(code: str | None = None) -> HTTPException:
    return hub_error(401, code, "Invalid username or password.")


def hub_error(status: int, code: str | None, message: str, **headers: str) -> HTTPException:
    headers = {"X-Error-Message": message} | headers
    return HTTPException(status, message, headers | ({"X-Error-Code": code} if code else {}))


@dataclass
class Fault:
    """What happens to the next `times` requests whose `"METHOD /path"` matches."""

    pattern: re.Pattern
    times: int
    status: int | None = None
    cut_after: int | None = None
    seconds: float = 0.0


class HubServer:
    """
    The server and what it stores: the contents of files in `folder`, everything else in memory.

    Args:
        folder (`Path`): where contents are kept.
        listener (`socket.socket`): bound to the address to serve on. Until `start`, connections to it are refused.
    """

    def __init__(self, folder: Path, listener: socket.socket):
        self.folder = folder
        self.listener = listener
        self.url = "http://{}:{}".format(*listener.getsockname())
        # Another host name, so that clients take it for the other host from which the Hub serves large files
        self.storage_url = f"http://localhost:{listener.getsockname()[1]}/storage"
        self.reset()

    def reset(self) -> None:
        """Forgets every repository, request and fault."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    def start(self) -> None:
        config = uvicorn.Config(
            self._serve, interface="asgi3", lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        self._app = make_app(self)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def downloaded(self, repo_id: str) -> list[str]:
        """The files of a repository whose contents were asked for since the last `requests.clear()`, in order."""
        address = rf"GET (?:/storage/\w+)?/(?:\w+s/)?{repo_id}/resolve/[^/]+/(.+)"
        matches = (re.fullmatch(address, line) for line in self.requests)
        return [unquote(match[1]) for match in matches if match]

    def fail(self, pattern: str, status: int = 503, times: int = 1) -> None:
        """Answers matching requests with an error."""
        self.faults.append(Fault(re.compile(pattern), times, status=status))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Closes the connection after so many bytes of the body of a matching request's answer."""
        self.faults.append(Fault(re.compile(pattern), times, cut_after=after))

    def delay(self, pattern: str, seconds: float, times: int = 1) -> None:
        """Answers matching requests late."""
        self.faults.append(Fault(re.compile(pattern), times, seconds=seconds))

    async def _serve(self, scope, receive, send) -> None:
        """Records the request, applies a fault, and hands over to the routes."""
        path = scope["raw_path"].decode()
        line = f"{scope['method']} {path}"
        self.requests.append(line)
        fault = next((fault for fault in self.faults if fault.times > 0 and fault.pattern.search(line)), None)
        if fault is not None:
            fault.times -= 1
            await asyncio.sleep(fault.seconds)
            if fault.status is not None:
                await Response(status_code=fault.status)(scope, receive, send)
                return
            if fault.cut_after is not None:
                send = cutting(send, fault.cut_after)
        # The routes see the path as it was sent: the slashes of `refs%2Fpr%2F1` do not separate segments
        await self._app(scope | {"path": path}, receive, send)

    def store(self, content: bytes, large: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return self.stored(sha256, large)

    def stored(self, sha256: str, large: bool) -> File:
        content = (self.folder / sha256).read_bytes()
        blob = f"version https://git-lfs.github.com/spec/v1\n{sha256}\n".encode() if large else content
        blob_id = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        return File(sha256, len(content), blob_id, large)


def cutting(send, after: int):
    """A `send` that passes on so many bytes of the body; uvicorn closes the connection on the error."""
    left = after

    async def send_some(message):
        nonlocal left
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or len(body) <= left:
            left -= len(body)
            await send(message)
        else:
            await send(message | {"body": body[:left], "more_body": True})
            raise ConnectionResetError("cut on purpose")

    return send_some


def make_app(hub: HubServer) -> FastAPI:
    """The routes. `kind` is model, dataset or space."""
    app = FastAPI(openapi_url=None)

    # Who asks, and what for

    def user_of(request: Request) -> tuple[str | None, list[str]]:
        """The name of the user, and the namespaces that the user may write to."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return None, []
        if token not in USERS:
            raise hub_error(401, None, "Invalid credentials in Authorization header")
        name, organizations = USERS[token]
        return name, [name, *organizations]

    def find(request: Request, kind: str, namespace: str, name: str, write: bool = False) -> Repository:
        user, namespaces = user_of(request)
        repo = hub.repositories.get((kind, f"{unquote(namespace)}/{unquote(name)}"))
        if repo is None or (repo.private and namespace not in namespaces):
            if user is None:
                # The client knows the Hub's 401 for a repository by its https address; here by the code
                raise unauthorized("RepoNotFound")
            raise hub_error(404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise unauthorized("RepoNotFound")
        if write and namespace not in namespaces:
            raise hub_error(403, None, f"you don't have write access to {repo.id}")
        return repo

    def writable_namespace(request: Request, organization: str | None) -> str:
        user, namespaces = user_of(request)
        if user is None:
            raise unauthorized()
        namespace = organization or user
        if namespace not in namespaces:
            raise hub_error(403, None, f"you don't have the rights to create a repository under {namespace}")
        return namespace

    @app.get("/api/whoami-v2")
    async def whoami(request: Request):
        user, namespaces = user_of(request)
        if user is None:
            raise unauthorized()
        return {"type": "user", "name": user, "orgs": [{"name": name} for name in namespaces[1:]], "auth": {}}

    # Repositories

    @app.post("/api/repos/create")
    async def create(request: Request):
        body = await request.json()
        kind = body.get("type", "model")
        repo = Repository(kind, f"{writable_namespace(request, body['organization'])}/{body['name']}")
        repo.private = body.get("private") is True or body.get("visibility") == "private"
        answer = {"url": f"{hub.url}/{repo.path}", "name": repo.id}
        if (kind, repo.id) in hub.repositories:
            message = "You already created this repo"
            return Response(json.dumps(answer | {"error": message}), 409, {"X-Error-Message": message})
        hub.repositories[kind, repo.id] = repo
        attributes = hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)
        repo.branches["main"] = repo.commit({".gitattributes": attributes}, None, "initial commit", "me")
        return answer

    @app.delete("/api/repos/delete")
    async def delete(request: Request):
        body = await request.json()
        namespace = writable_namespace(request, body["organization"])
        repo = find(request, body.get("type", "model"), namespace, body["name"], write=True)
        del hub.repositories[repo.kind, repo.id]

    @app.get("/api/{kind}s/{namespace}/{name}")
    @app.get("/api/{kind}s/{namespace}/{name}/revision/{revision}")
    async def info(request: Request, kind: str, namespace: str, name: str, revision: str = "main"):
        repo = find(request, kind, namespace, name)
        commit_id = repo.resolve(unquote(revision))
        commit = repo.commits[commit_id]
        return {
            "id": repo.id,
            "sha": commit_id,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    @app.get("/api/{kind}s/{namespace}/{name}/tree/{revision}")
    @app.get("/api/{kind}s/{namespace}/{name}/tree/{revision}/{path:path}")
    async def tree(request: Request, kind: str, namespace: str, name: str, revision: str, path: str = ""):
        repo = find(request, kind, namespace, name)
        files = repo.commits[repo.resolve(unquote(revision))].files
        prefix = f"{unquote(path)}/" if path else ""
        inside = [file for file in files if file.startswith(prefix)]
        if prefix and not inside:
            raise hub_error(404, "EntryNotFound", f"{prefix} does not exist")
        recursive = request.query_params.get("recursive", "").lower() == "true"
        folders = {str(parent) for file in inside for parent in Path(file).parents} - {"."}
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]
        entries += [files[file].describe(file) for file in inside]
        below = [entry for entry in entries if entry["path"].startswith(prefix)]
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]

    @app.post("/api/{kind}s/{namespace}/{name}/paths-info/{revision}")
    async def paths_info(request: Request, kind: str, namespace: str, name: str, revision: str):
        repo = find(request, kind, namespace, name)
        files = repo.commits[repo.resolve(unquote(revision))].files
        form = (await request.body()).decode()
        paths = [unquote(value.replace("+", " ")) for value in re.findall(r"(?:^|&)paths=([^&]*)", form)]
        folders = {path for path in paths if any(file.startswith(f"{path}/") for file in files)}
        return [files[path].describe(path) for path in paths if path in files] + [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)
        ]

    # Branches, tags, history

    @app.get("/api/{kind}s/{namespace}/{name}/refs")
    async def refs(request: Request, kind: str, namespace: str, name: str):
        repo = find(request, kind, namespace, name)

        def listing(prefix: str, ids: dict[str, str]) -> list[dict]:
            return [{"name": ref, "ref": f"{prefix}{ref}", "targetCommit": commit} for ref, commit in ids.items()]

        return {
            "branches": listing("refs/heads/", repo.branches),
            "tags": listing("refs/tags/", repo.tags),
            "converts": [],
            "pullRequests": listing("", repo.pull_requests),
        }

    @app.get("/api/{kind}s/{namespace}/{name}/commits/{revision}")
    async def commits(request: Request, kind: str, namespace: str, name: str, revision: str):
        repo = find(request, kind, namespace, name)
        ids = repo.history(repo.resolve(unquote(revision)))
        listed = [(commit_id, repo.commits[commit_id]) for commit_id in ids]
        return [
            {"id": i, "title": c.title, "message": "", "authors": [{"user": c.author}], "date": c.date}
            for i, c in listed
        ]

    @app.post("/api/{kind}s/{namespace}/{name}/branch/{branch}")
    async def create_branch(request: Request, kind: str, namespace: str, name: str, branch: str):
        repo = find(request, kind, namespace, name, write=True)
        if unquote(branch) in repo.branches:
            raise hub_error(409, None, f"Reference already exists: {unquote(branch)}")
        repo.branches[unquote(branch)] = repo.resolve((await request.json()).get("startingPoint", "main"))

    @app.post("/api/{kind}s/{namespace}/{name}/tag/{revision}")
    async def create_tag(request: Request, kind: str, namespace: str, name: str, revision: str):
        repo = find(request, kind, namespace, name, write=True)
        tag = (await request.json())["tag"]
        if tag in repo.tags:
            raise hub_error(409, None, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.resolve(unquote(revision))

    @app.delete("/api/{kind}s/{namespace}/{name}/{ref}/{ref_name}")
    async def delete_ref(request: Request, kind: str, namespace: str, name: str, ref: str, ref_name: str):
        repo = find(request, kind, namespace, name, write=True)
        if {"branch": repo.branches, "tag": repo.tags}[ref].pop(unquote(ref_name), None) is None:
            raise hub_error(404, "RevisionNotFound", f"Invalid rev id: {unquote(ref_name)}")

    @app.post("/api/{kind}s/{namespace}/{name}/super-squash/{branch}")
    async def super_squash(request: Request, kind: str, namespace: str, name: str, branch: str):
        repo = find(request, kind, namespace, name, write=True)
        message = (await request.json())["message"]
        files = repo.commits[repo.resolve(unquote(branch))].files
        repo.branches[unquote(branch)] = repo.commit(dict(files), None, message, user_of(request)[0])

    @app.get("/api/{kind}s/{namespace}/{name}/lfs-files")
    async def lfs_files(request: Request, kind: str, namespace: str, name: str):
        repo = find(request, kind, namespace, name, write=True)
        return [
            {"fileOid": f.sha256, "oid": f.sha256, "filename": path, "size": f.size, "ref": None, "pushedAt": c.date}
            for c in repo.commits.values()
            for path, f in c.files.items()
            if f.large and (hub.folder / f.sha256).exists()
        ]

    @app.post("/api/{kind}s/{namespace}/{name}/lfs-files/batch")
    async def delete_lfs_files(request: Request, kind: str, namespace: str, name: str):
        find(request, kind, namespace, name, write=True)
        for sha256 in (await request.json())["deletions"]["sha"]:
            (hub.folder / sha256).unlink(missing_ok=True)

    @app.post("/api/spaces/{namespace}/{name}/variables")
    async def set_variable(request: Request, namespace: str, name: str):
        repo = find(request, "space", namespace, name, write=True)
        body = await request.json()
        repo.variables[body["key"]] = body["value"]
        return {key: {"value": value} for key, value in repo.variables.items()}

    # Uploads

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request):
        content = (await request.json())["content"]
        try:
            block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
            valid = block is not None and isinstance(yaml.safe_load(block[1]), dict)
        except yaml.YAMLError:
            valid = False
        if valid:
            return {"errors": [], "warnings": []}
        errors = {"errors": [{"message": "the metadata is not a YAML mapping"}], "warnings": []}
        return Response(json.dumps(errors), 400)

    @app.post("/api/{kind}s/{namespace}/{name}/preupload/{revision}")
    async def preupload(request: Request, kind: str, namespace: str, name: str, revision: str):
        # Whoever may read may open a pull request
        repo = find(request, kind, namespace, name, write="create_pr" not in request.query_params)
        commit = repo.commits[repo.resolve(unquote(revision))]
        answer = []
        for file in (await request.json())["files"]:
            path = file["path"]
            large = LARGE_FILES.fullmatch(path) or b"\0" in base64.b64decode(file["sample"])
            known = {"oid": commit.files[path].etag} if path in commit.files else {}
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | known)
        return {"files": answer, "commitOid": repo.resolve(unquote(revision))}

    @app.post("/{namespace}/{name}.git/info/lfs/objects/batch")
    @app.post("/{kind}s/{namespace}/{name}.git/info/lfs/objects/batch")
    async def lfs_batch(request: Request, namespace: str, name: str, kind: str = "model"):
        find(request, kind, namespace, name)
        objects = []
        for item in (await request.json())["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not (hub.folder / item["oid"]).exists():
                upload, verify = f"{hub.storage_url}/{item['oid']}", f"{hub.url}/api/lfs/verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    @app.put("/storage/{sha256}")
    async def upload(request: Request, sha256: str):
        file = hub.folder / f"{sha256}.tmp"
        file.write_bytes(await request.body())
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise hub_error(400, None, "the content has another SHA-256")
        file.rename(hub.folder / sha256)

    @app.post("/api/lfs/verify")
    async def verify(request: Request):
        item = await request.json()
        file = hub.folder / item["oid"]
        if not file.exists() or file.stat().st_size != item["size"]:
            raise hub_error(404, None, "the object was not uploaded")

    @app.post("/api/{kind}s/{namespace}/{name}/commit/{revision}")
    async def commit(request: Request, kind: str, namespace: str, name: str, revision: str):
        create_pr = "create_pr" in request.query_params
        repo = find(request, kind, namespace, name, write=not create_pr)
        user, _ = user_of(request)
        if user is None:
            raise unauthorized()
        revision = unquote(revision)
        parent = repo.resolve(revision)
        files = dict(repo.commits[parent].files)
        title = ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value, path = item["value"], item["value"].get("path")
            match item["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit", parent) != parent:
                        raise hub_error(412, None, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[path] = hub.store(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    if not (hub.folder / value["oid"]).exists():
                        raise hub_error(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
                    files[path] = hub.stored(value["oid"], large=True)
                case "deletedFile" | "deletedFolder":
                    gone = [file for file in files if file == path or file.startswith(f"{path.rstrip('/')}/")]
                    if not gone:
                        raise hub_error(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
                    files = {file: content for file, content in files.items() if file not in gone}
        commit_id = repo.commit(files, parent, title, user)
        answer = {"success": True, "commitOid": commit_id, "commitUrl": f"{hub.url}/{repo.path}/commit/{commit_id}"}
        if create_pr:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = commit_id
            return answer | {"pullRequestUrl": f"{hub.url}/{repo.path}/discussions/{number}"}
        if revision not in repo.branches | repo.pull_requests:
            raise hub_error(400, None, f"{revision} is not a branch")
        (repo.branches if revision in repo.branches else repo.pull_requests)[revision] = commit_id
        return answer

    # Downloads

    @app.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    @app.api_route("/{kind}s/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(request: Request, namespace: str, name: str, revision: str, path: str, kind: str = "model"):
        repo = find(request, kind, namespace, name)
        user, namespaces = user_of(request)
        if repo.gated and namespace not in namespaces:
            message = f"Access to {kind} {repo.id} is restricted. You must have access to it to download its files."
            raise hub_error(403 if user else 401, "GatedRepo", message)
        commit_id = repo.resolve(unquote(revision))
        file = repo.commits[commit_id].files.get(unquote(path))
        if file is None:
            raise hub_error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit_id})
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{file.etag}"'}
        if not file.large:
            return FileResponse(hub.folder / file.sha256, headers=headers)
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": headers["ETag"]}
        return RedirectResponse(f"{hub.storage_url}/{file.sha256}{request.url.path}", 302, headers)

    @app.get("/storage/{sha256}/{path:path}")
    async def storage(sha256: str, path: str):
        return FileResponse(hub.folder / sha256, headers={"ETag": f'"{sha256}"'})

    return app
