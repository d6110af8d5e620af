"""A small model hub on loopback: what `huggingface_hub`, `transformers` and `datasets` ask of the real one.

Nothing of the client is replaced: tests start a process with `client_environment`. Repositories live in memory:
commits of whole trees, branches and tags, LFS objects by their sha256, accounts by their token. A test may make the
next requests of a kind fail (`hub.fail`) and read what was asked (`hub.requests`).

Left out: Xet, a binary protocol that `hf_xet` speaks past Python. With `HF_HUB_DISABLE_XET=1`, the client's documented
switch, it takes LFS. (With Xet a folder goes up in batches of 256 files a commit, so a checkpoint is one commit too.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml


_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow")
_DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An answer with an error's status. The client tells errors apart by `code`; `more` is for the body."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any):
        super().__init__(message)
        self.status, self.content = status, {"error": message} | more
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """A file of a commit; `large` ones were uploaded as LFS objects."""

    data: bytes
    large: bool = False

    @cached_property
    def etag(self) -> str:
        """The sha256 of a large file, git's hash of a small one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0%b" % (len(self.data), self.data)).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As it is listed in a tree."""
        size = len(self.data)
        lfs = {"lfs": {"oid": self.etag, "size": size, "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": path, "size": size, "oid": self.etag[:40]} | lfs


@dataclass
class Repo:
    """A repository: the whole tree of each commit, their titles, and the commits of refs."""

    id: str
    type: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], title: str) -> str:
        """Adds a commit and points `ref` to it."""
        sha = hashlib.sha1(f"{self.type} {self.id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[sha] = files
        self.titles.append(title)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str:
        """The commit of a branch, a tag, a ref or a commit's own hash."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if revision in self.commits:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, File]:
        """Path to file."""
        return self.commits[self.find(revision)]


@dataclass(frozen=True)
class Request:
    """What was asked, by which account (`None` without a token), and the answer's status (0 if it was cut short)."""

    kind: str
    path: str
    user: str | None
    status: int


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub` serves until the end of the block."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.accounts: dict[str, tuple[str, ...]] = {}  # by token: a name, then its organisations
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, str, int | str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Quiet: a client that leaves is no fault of the server's."""

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """A repository that is there."""
        return self.repos[repo_type, repo_id]

    def fail(self, kind: str, how: int | str = 503, times: int = 1, match: str = "") -> None:
        """Makes the next requests of a kind fail.

        Args:
            kind (`str`):
                Name of an endpoint's function.
            how (`int` or `str`, *optional*, defaults to `503`):
                A status; `"drop"`: the connection is cut in the middle of the upload, or of the download; `"lost"`: it
                is cut when the work is done and the answer was due; `"slow"`: it takes half a second.
            times (`int`, *optional*, defaults to `1`):
                How many requests.
            match (`str`, *optional*):
                Only paths with this in them.
        """
        self.faults += [(kind, match, how)] * times

    def take_fault(self, kind: str, path: str) -> int | str | None:
        """The first fault that is meant for this request, which is its last."""
        with self.lock:
            for fault in self.faults:
                if fault[0] == kind and fault[1] in path:
                    self.faults.remove(fault)
                    return fault[2]
        return None

    def everything(self) -> Iterator[tuple[str, bytes]]:
        """All that ever came: files of all commits, objects that no commit has, titles, addresses asked for."""
        yield from (("object", data) for data in self.objects.values())
        for repo in self.repos.values():
            yield from ((title, title.encode()) for title in repo.titles)
            yield from ((path, file.data) for files in repo.commits.values() for path, file in files.items())
        yield from ((request.kind, request.path.encode()) for request in self.requests)


_ROUTES: list[tuple[str, str, bool, Callable]] = []
_API = r"/api/(?P<type>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<type>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
_REV = r"(?P<rev>[^/]+)"


def route(method: str, form: str, write: bool = False) -> Callable:
    """An endpoint: of the path's groups `type` and `id` are opened as `self.repo`, the others are its arguments."""

    def register(function: Callable) -> Callable:
        _ROUTES.append((method, form, write, function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Endpoints return what is sent as JSON, or bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a request
    server: Hub

    def log_message(self, *args) -> None:
        """Quiet."""

    def answer_request(self) -> None:
        url = urlsplit(self.path)
        found = ((r, re.fullmatch(r[1], url.path)) for r in _ROUTES if r[0] == self.command)
        (*_, write, endpoint), match = next(((r, m) for r, m in found if m), (("", "", False, _Handler.nothing), None))
        kind, length = endpoint.__name__, int(self.headers.get("Content-Length") or 0)
        fault = self.server.take_fault(kind, self.path)
        if fault == "slow":
            time.sleep(0.5)
        cut_in = fault == "drop" and length > 0
        self.query, self.user, self.extra = parse_qs(url.query), None, {}
        self.body = self.rfile.read(length // 2 if cut_in else length)
        status, content = (0, b"") if cut_in else self.do(endpoint, match, write, fault)
        self.server.requests.append(Request(kind, self.path, self.user and self.user[0], status))
        if not cut_in and fault != "lost":
            self.reply(status, content, half=fault == "drop")
        if fault in ("drop", "lost"):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def do(self, endpoint: Callable, match: re.Match | None, write: bool, fault: int | str | None) -> tuple[int, Any]:
        """Status and content of the answer."""
        names = {name: unquote(value) for name, value in match.groupdict("").items()} if match else {}
        try:
            self.user = self.account()
            if isinstance(fault, int):
                raise Refusal(fault, "Made to fail.")
            with self.server.lock:
                if "id" in names:
                    self.repo = self.open(names.pop("type"), names.pop("id"), write)
                return 200, endpoint(self, **names)
        except Refusal as refusal:
            self.extra |= refusal.headers
            return refusal.status, refusal.content

    def reply(self, status: int, content: Any, half: bool) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **self.extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def nothing(self) -> None:
        raise Refusal(404, "Repository not found", "RepoNotFound")

    # ---- who may do what ----

    def account(self) -> tuple[str, ...] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.accounts.get(token)

    def member(self, owner: str) -> bool:
        return self.user is not None and owner in self.user

    def open(self, type: str, id: str, write: bool) -> Repo:
        """The repository, if this account may read (or write) it; what it may not see is not there."""
        repo, member = self.server.repos.get((type.removesuffix("s") or "model", id)), self.member(id.split("/")[0])
        if repo is None or (repo.private and not member):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not member:
            raise Refusal(403 if self.user else 401, f"You have no right to write to {id}")
        return repo

    def address(self, repo: Repo) -> str:
        return f"{self.server.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"

    # ---- accounts and repositories ----

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> dict[str, Any]:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        name, *orgs = self.user
        return {"type": "user", "name": name, "orgs": [{"type": "org", "name": org} for org in orgs]}

    @route("POST", "/api/validate-yaml")
    def validate(self) -> dict[str, Any]:
        """A card's metadata must be a mapping."""
        parts = re.split(r"^---\s*$", self.json()["content"], maxsplit=2, flags=re.MULTILINE)
        try:
            problem = "" if len(parts) < 3 or isinstance(yaml.safe_load(parts[1]), dict) else "no mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            raise Refusal(400, "Invalid metadata", errors=[{"message": problem}])
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self) -> dict[str, Any]:
        asked = self.json()
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner, type = asked.get("organization") or self.user[0], asked.get("type", "model")
        if not self.member(owner):
            raise Refusal(403, f'You don\'t have the rights to create a {type} under the namespace "{owner}"')
        if type == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "A Space needs one of the sdks gradio, docker and static")
        repo = Repo(
            f"{owner}/{asked['name']}", type, asked.get("visibility") == "private" or asked.get("private") is True
        )
        if (type, repo.id) in self.server.repos:
            raise Refusal(409, f"You already created this {type} repo", url=self.address(repo))
        rules = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in _LARGE)
        repo.commit("refs/heads/main", {".gitattributes": File(rules.encode())}, "initial commit")
        self.server.repos[type, repo.id] = repo
        return {"url": self.address(repo)}

    @route("GET", rf"{_API}(?:/revision/{_REV})?")
    def info(self, rev: str) -> dict[str, Any]:
        repo, sha = self.repo, self.repo.find(rev or "main")
        return {
            "_id": "0" * 24, "id": repo.id, "sha": sha, "private": repo.private, "gated": repo.gated, "tags": [],
            "lastModified": _DATE, "siblings": [{"rfilename": path} for path in repo.commits[sha]],
        }  # fmt: skip

    @route("GET", f"{_API}/refs")
    def refs(self) -> dict[str, Any]:
        found = {kind: [] for kind in ("heads", "tags", "pr")}
        for ref, sha in self.repo.refs.items():
            _, kind, name = ref.split("/", 2)
            found[kind].append({"name": name, "ref": ref, "targetCommit": sha})
        return {"branches": found["heads"], "tags": found["tags"], "pullRequests": found["pr"], "converts": []}

    @route("GET", f"{_API}/auth-check")
    def may_read(self) -> dict[str, Any]:
        return {}

    @route("GET", f"{_API}/auth-check/write", write=True)
    def may_write(self) -> dict[str, Any]:
        return {}

    @route("POST", rf"{_API}/branch/(?P<name>.+)", write=True)
    def branch(self, name: str) -> dict[str, Any]:
        return self.point(f"refs/heads/{name}", self.json().get("startingPoint", "main"))

    @route("POST", rf"{_API}/tag/{_REV}", write=True)
    def tag(self, rev: str) -> dict[str, Any]:
        return self.point(f"refs/tags/{self.json()['tag']}", rev)

    def point(self, ref: str, revision: str) -> dict[str, Any]:
        if ref in self.repo.refs:
            raise Refusal(409, f"Reference {ref} exists already")
        self.repo.refs[ref] = self.repo.find(revision)
        return {}

    # ---- uploads ----

    @route("POST", f"{_API}/preupload/{_REV}", write=True)
    def preupload(self, rev: str) -> dict[str, Any]:
        """How each file is to go up, and which are there already."""
        there, found = self.repo.files(rev), []
        for path in (file["path"] for file in self.json()["files"]):
            mode, oid = "lfs" if path.endswith(_LARGE) else "regular", there[path].etag if path in there else None
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    @route("POST", rf"{_GIT}\.git/info/lfs/objects/batch", write=True)
    def batch(self) -> dict[str, Any]:
        """Where to put objects; those that are there already need no action."""
        objects = []
        for wanted in self.json()["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.objects else upload))
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def put(self, oid: str) -> dict[str, Any]:
        """The address stands for a signed one, so nobody need say who they are."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content has another sha256")
        self.server.objects[oid] = self.body
        return {}

    @route("POST", f"{_API}/commit/{_REV}", write=True)
    def commit(self, rev: str) -> dict[str, Any]:
        """All of its operations or none: what it names must have been uploaded."""
        repo, ref = self.repo, f"refs/heads/{rev}"
        parent, files = repo.find(ref), dict(repo.files(ref))
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files[path] = File(self.server.objects[value["oid"]], large=True)
            else:  # a file or a folder is deleted
                files = {p: file for p, file in files.items() if not f"{p}/".startswith(path.rstrip("/") + "/")}
        if "create_pr" in self.query:
            ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
        sha, url = repo.commit(ref, files, header["value"]["summary"]), self.address(repo)
        pull = {"pullRequestUrl": f"{url}/discussions/{ref.split('/')[2]}"}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"} | pull

    # ---- downloads ----

    @route("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?")
    def tree(self, rev: str, path: str) -> list[dict[str, Any]]:
        folder = path.rstrip("/") + "/" if path else ""
        files = {p: file for p, file in self.repo.files(rev).items() if p.startswith(folder)}
        if folder and not files:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
        entries = _entries(files)
        deep = self.query.get("recursive") == ["true"]
        return [e for p, e in entries.items() if p.startswith(folder) and (deep or "/" not in p[len(folder) :])]

    @route("POST", rf"{_API}/paths-info/{_REV}")
    def paths(self, rev: str) -> list[dict[str, Any]]:
        entries = _entries(self.repo.files(rev))
        return [entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries]

    @route("GET", rf"{_GIT}/resolve/{_REV}/(?P<path>.+)")
    def resolve(self, rev: str, path: str) -> bytes:
        if self.repo.gated and not self.member(self.repo.id.split("/")[0]):
            raise Refusal(403, f"Access to {self.repo.id} is restricted.", "GatedRepo")
        sha = self.repo.find(rev)
        self.extra["X-Repo-Commit"] = sha
        if path not in self.repo.commits[sha]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = self.repo.commits[sha][path]
        self.extra["ETag"] = f'"{file.etag}"'
        if file.large:
            self.extra |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return file.data

    @route("HEAD", rf"{_GIT}/resolve/{_REV}/(?P<path>.+)")
    def head(self, rev: str, path: str) -> bytes:
        return self.resolve(rev, path)


def _entries(files: dict[str, File]) -> dict[str, dict[str, Any]]:
    """Of files and of the folders that they are in."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)}
    return found | {path: file.entry(path) for path, file in files.items()}


def client_environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """For a process that has `hub` for its Hub, `home` for its cache and token file, and no other token."""
    others = ("HF_", "HUGGING", "TRANSFORMERS_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return mine | switches | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | more


@pytest.fixture(scope="module", name="hub")
def serving() -> Iterator[Hub]:
    """A hub that all tests of a file share."""
    with Hub() as server:
        yield server
