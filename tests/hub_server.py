"""A Hugging Face Hub on loopback for the real client: a test decides what it holds, and when it fails.

It is git in small: contents are named by their digest, a commit is a parent and a tree, a ref is a name for a commit.
Neither time nor chance enters, so the same calls give the same digests. `python tests/hub_server.py` serves by hand.
"""

import argparse
import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

logger = logging.getLogger(__name__)

Files = Mapping[str, bytes | None]
"""Path to content; None deletes."""
NO_FILES: Files = {}
LFS = (".bin", ".parquet", ".png", ".safetensors")
ATTRIBUTES = ".gitattributes"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class User:
    """An account, seen through one of its tokens.

    Args:
        name: of the account, which is also its namespace.
        orgs: the organisations in which it may write.
        role: of the token: `read`, `write` or `fineGrained`.
        permissions: of a fine-grained token, for each of the organisations.
    """

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"
    permissions: tuple[str, ...] = ()

    def may(self, permission: str, namespace: str) -> bool:
        """Whether the token gives this permission for all that a user or an organisation has."""
        if self.role == "fineGrained":
            return namespace in self.orgs and permission in self.permissions
        return namespace in (self.name, *self.orgs) and (self.role == "write" or permission.endswith(".read"))


NOBODY = User("", role="read")
USERS = {
    "hf_write": User("alice", ("org",)),
    "hf_read": User("bob", ("org",), "read"),
    "hf_other": User("carol"),
    "hf_fine": User("dora", ("org",), "fineGrained", ("repo.content.read", "repo.write")),
    "hf_fine_read": User("dora", ("org",), "fineGrained", ("repo.content.read",)),
}
SEE, READ, PROPOSE, WRITE = range(4)
"""What a request asks for. A gated repository shows the names of its files to everybody, but not what is in them."""


@dataclass(frozen=True)
class Commit:
    """A state of all files, and the commit it was made from."""

    parent: "Commit | None"
    tree: Mapping[str, bytes]
    title: str
    message: str = ""
    author: str = "somebody"

    @cached_property
    def sha(self) -> str:
        tree = {path: _etag(path, content) for path, content in self.tree.items()}
        parent = self.parent.sha if self.parent else None
        named = [parent, tree, self.title, self.message, self.author]
        return _git_oid(json.dumps(named, sort_keys=True).encode())

    def history(self) -> "Iterator[Commit]":
        """All commits that led to this one, newest first."""
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class Pull:
    """A pull request; a test may set `status` to `closed` or `merged`."""

    number: int
    title: str
    status: str
    author: str
    comments: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Repo:
    """A repository; `refs` gives a commit to each full name, such as `refs/heads/main` and `refs/pr/1`."""

    kind: str
    id: str
    private: bool
    gated: bool
    refs: dict[str, Commit] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    @property
    def page(self) -> str:
        return f"datasets/{self.id}" if self.kind == "dataset" else self.id

    def add(self, commit: Commit, revision: str) -> str:
        """Make a branch or pull request point at the commit."""
        self.refs[revision if revision.startswith("refs/") else f"refs/heads/{revision}"] = commit
        return commit.sha

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request or a digest names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        for commit in (commit for head in self.refs.values() for commit in head.history()):
            if commit.sha == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def pull(self, number: str) -> Pull:
        if not 0 < int(number) <= len(self.pulls):
            raise Refusal(404, "Discussion not found")
        return self.pulls[int(number) - 1]


@dataclass(frozen=True)
class Answer:
    """A response; what is not bytes is sent as JSON."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, headers)


@dataclass
class Rule:
    """What to do with the next requests of a kind; as a fault without `answer`, drop the connection."""

    method: str
    pattern: str
    times: int
    action: Callable[[], None] | None = None
    answer: Answer | None = None
    after: bool = False
    cut: int | None = None


class Request(BaseHTTPRequestHandler):
    """One request of a connection after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "HubServer"
    user: User

    def do_GET(self) -> None:
        self.query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server._serve(self)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        logger.info(format, *args)

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def send(self, answer: Answer, cut: int | None) -> None:
        """Send an answer; with `cut`, promise all of the body but send so many bytes of it only."""
        plain = isinstance(answer.content, bytes)
        body = answer.content if plain else json.dumps(answer.content, default=str).encode()
        headers = {"Content-Type": "application/octet-stream" if plain else "application/json", **answer.headers}
        self.send_response(answer.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None


class HubServer(ThreadingHTTPServer):
    """The Hub: set `HF_ENDPOINT` to `url` before huggingface_hub is imported, and `HF_HUB_DISABLE_XET` to 1.

    In all methods, `repo_id` is `org/name`, and `kind` is `model` or `dataset`.

    Args:
        users: token to account.
        port: 0 takes a free one.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        requests: method, path with its query (as sent, so quoted) and header `Range` of each request since `reset`.
    """

    request_queue_size = 64

    def __init__(self, users: Mapping[str, User] = USERS, port: int = 0) -> None:
        self.users = dict(users)
        super().__init__(("127.0.0.1", port), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # The client takes a file's commit from the redirect to storage, but follows a redirect within the Hub; to 1.33
        # another port is the Hub still. So storage has a host name of its own.
        self._storage = f"http://localhost:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget repositories, objects, faults, hooks and requests."""
        with self._lock:
            self._repos: dict[tuple[str, str], Repo] = {}
            self._objects: dict[str, bytes] = {}
            self._faults: list[Rule] = []
            self._hooks: list[Rule] = []
            self.requests: list[tuple[str, str, str | None]] = []

    def start(self) -> Self:
        """Serve, from daemon threads."""
        self._thread.start()
        return self

    def stop(self, *_: object) -> None:
        """Stop serving, for good."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    __enter__, __exit__ = start, stop

    def create(
        self, repo_id: str, files: Files = NO_FILES, *, kind: str = "model", private: bool = False, gated: bool = False
    ) -> None:
        """Make a repository; a private one is for its namespace only, and so are the files of a gated one."""
        with self._lock:
            repo = self._repos[kind, repo_id] = Repo(kind, repo_id, private, gated)
            rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS)
            repo.add(Commit(None, {ATTRIBUTES: rules.encode()}, "initial commit"), "main")
            if files:
                self.add_commit(repo_id, files, title="Add files", kind=kind)

    def add_commit(
        self, repo_id: str, files: Files, *, title: str = "Change", revision: str = "main", kind: str = "model"
    ) -> str:
        """Commit as somebody else, and return the digest."""
        with self._lock:
            repo = self._repos[kind, repo_id]
            parent = repo.at(revision)
            changed = {path: content for path, content in {**parent.tree, **files}.items() if content is not None}
            self._objects |= {_sha256(content): content for content in changed.values()}
            return repo.add(Commit(parent, changed, title), revision)

    def head(self, repo_id: str, revision: str = "main", kind: str = "model") -> str:
        """The digest of the newest commit."""
        return self._repos[kind, repo_id].at(revision).sha

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path to content of all files, without `.gitattributes`."""
        tree = self._repos[kind, repo_id].at(revision).tree
        return {path: tree[path] for path in sorted(tree) if path != ATTRIBUTES}

    def commits(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[str]:
        """The titles of the commits, newest first."""
        return [commit.title for commit in self._repos[kind, repo_id].at(revision).history()]

    def pulls(self, repo_id: str, kind: str = "model") -> list[Pull]:
        """The pull requests, oldest first; the commits of the first are at revision `refs/pr/1`."""
        return self._repos[kind, repo_id].pulls

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = 503,
        times: int = 1,
        after: bool = False,
        cut: int | None = None,
        error_code: str | None = None,
    ) -> None:
        """Let the next requests of a kind fail.

        Args:
            method: regular expression that matches the method.
            pattern: regular expression that is found in the path with its query, as sent.
            status: of the answer; None drops the connection instead.
            times: how many requests.
            after: whether to do what was asked first, as when the answer is lost.
            cut: answer as usual, but drop the connection after so many bytes of the body.
            error_code: header `X-Error-Code` of the answer.
        """
        answer = None if status is None else Refusal(status, "Failure on demand", error_code).answer
        self._faults.append(Rule(method, pattern, times, answer=answer, after=after, cut=cut))

    def before(self, method: str, pattern: str, action: Callable[[], None], *, times: int = 1) -> None:
        """Run `action` just before the next requests of a kind are served; it may use this object and the client."""
        self._hooks.append(Rule(method, pattern, times, action))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""
        logger.debug("a client went away", exc_info=True)

    def _serve(self, request: Request) -> None:
        with self._lock:
            self.requests.append((request.command, request.path, request.headers.get("Range")))
            hook, fault = self._take(self._hooks, request), self._take(self._faults, request)
        answer = fault.answer if fault else None
        try:
            if hook and hook.action:
                hook.action()  # without the lock, for it may wait for another thread of this server
            if not fault or fault.after or fault.cut is not None:
                with self._lock:
                    done = self._answer(request)
                if not fault or not fault.after:
                    answer = done if isinstance(done, Answer) else Answer(done)
        except Refusal as refusal:
            answer = refusal.answer
        except Exception as error:
            logger.exception("%s %s", request.command, request.path)
            answer = Refusal(500, f"The server of the tests failed: {error!r}").answer
        if answer is None:
            request.close_connection = True
        else:
            request.send(answer, fault.cut if fault else None)

    @staticmethod
    def _take(rules: list[Rule], request: Request) -> Rule | None:
        for rule in rules:
            if rule.times and re.fullmatch(rule.method, request.command) and re.search(rule.pattern, request.path):
                rule.times -= 1
                return rule
        return None

    def _answer(self, request: Request) -> Any:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        request.user = self.users.get(token, NOBODY)
        for method, pattern, access, respond in ROUTES:
            if re.fullmatch(method, request.command) and (match := re.fullmatch(pattern, urlsplit(request.path).path)):
                found: dict[str, Any] = {name: unquote(value) for name, value in match.groupdict("").items()}
                if "create_pr" in request.query or found.get("revision", "").startswith("refs/pr/"):
                    access = min(access, PROPOSE)
                if "repo" in found:
                    found["repo"] = self._open(request.user, access, found.pop("kind") or "model", found["repo"])
                elif access >= PROPOSE and request.user is NOBODY:
                    raise Refusal(401, "Invalid username or password.")
                return respond(self, request, **found)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _open(self, user: User, access: int, kind: str, repo_id: str) -> Repo:
        """Find the repository, if the account may do there what it asks for."""
        repo, owner = self._repos.get((kind, repo_id)), repo_id.partition("/")[0]
        ours = user.may("repo.content.read", owner)
        if repo is None or (repo.private and not ours):  # which of the two is not for strangers to know
            raise Refusal(401 if user is NOBODY else 404, "Repository not found", "RepoNotFound")
        refused = 401 if user is NOBODY else 403
        if access >= READ and repo.gated and not ours:
            raise Refusal(refused, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        if access == WRITE and not user.may("repo.write", owner):
            raise Refusal(refused, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        # An account of any namespace may propose, if its token writes at all.
        if access == PROPOSE and user.role != "write" and not user.may("repo.write", owner):
            raise Refusal(refused, "Forbidden: this token may not write")
        return repo

    def _whoami(self, request: Request) -> Any:
        user = request.user
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs]
        token: dict[str, Any] = {"displayName": "test", "role": user.role, "createdAt": DATE}
        if user.role == "fineGrained":
            scoped = [{"entity": {"type": "org", "name": org}, "permissions": user.permissions} for org in user.orgs]
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}

    def _create_repo(self, request: Request) -> Any:
        kind, owner = request.json.get("type", "model"), request.json["organization"] or request.user.name
        if not request.user.may("repo.write", owner):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id, conflict = f"{owner}/{request.json['name']}", {}
        if (kind, repo_id) in self._repos:
            conflict = {"error": f"You already created this {kind} repo"}
        else:
            self.create(repo_id, kind=kind, private=request.json.get("visibility") == "private")
        url = f"{self.url}/{self._repos[kind, repo_id].page}"
        return Answer({"name": repo_id, "url": url, **conflict}, 409 if conflict else 200)

    def _delete_repo(self, request: Request) -> Any:
        kind, owner = request.json.get("type", "model"), request.json["organization"] or request.user.name
        repo = self._open(request.user, WRITE, kind, f"{owner}/{request.json['name']}")
        del self._repos[kind, repo.id]
        return {}

    def _auth_check(self, request: Request, repo: Repo) -> Any:
        return b"OK"

    def _info(self, request: Request, repo: Repo, revision: str) -> Any:
        commit = repo.at(revision or "main")
        card: dict[str, Any] = {}
        with suppress(ValueError, yaml.YAMLError):  # the Hub shows a model whose card it cannot read
            card = _metadata(commit.tree.get("README.md", b"").decode())
        told = {
            "id": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "disabled": False,
        }
        told |= {"gated": "auto" if repo.gated else False, "createdAt": DATE, "lastModified": DATE, "likes": 0}
        told |= {"cardData": card, "tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag")}
        files = [_about(commit, path) for path in sorted(commit.tree)]
        return {**told, "siblings": [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in files]}

    def _refs(self, request: Request, repo: Repo) -> Any:
        told: dict[str, list[dict[str, str]]] = {"converts": []}
        for kind, folder in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("pullRequests", "refs/pr/")):
            found = [(ref, commit.sha) for ref, commit in repo.refs.items() if ref.startswith(folder)]
            told[kind] = [{"name": ref.removeprefix(folder), "ref": ref, "targetCommit": sha} for ref, sha in found]
        return told

    def _commits(self, request: Request, repo: Repo, revision: str) -> Any:
        told = []
        for each in repo.at(revision).history():
            about = {"id": each.sha, "title": each.title, "message": each.message, "date": DATE}
            told.append({**about, "authors": [{"user": each.author}]})
        return told

    def _add_ref(self, request: Request, repo: Repo, what: str, name: str) -> Any:
        ref, start = f"refs/heads/{name}", request.json.get("startingPoint", "main")
        if what == "tag":
            ref, start = f"refs/tags/{request.json['tag']}", name
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(start)
        return {}

    def _tree(self, request: Request, repo: Repo, revision: str, folder: str) -> Any:
        commit, prefix = repo.at(revision), f"{folder}/" if folder else ""
        deep = request.query.get("recursive") == "true"
        every = {str(path) for file in commit.tree for path in (file, *PurePosixPath(file).parents)} - {"."}
        inside = [path for path in sorted(every) if path.startswith(prefix)]
        if not inside:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        return [_about(commit, path) for path in inside if deep or "/" not in path.removeprefix(prefix)]

    def _paths_info(self, request: Request, repo: Repo, revision: str) -> Any:
        told = [_about(repo.at(revision), path) for path in parse_qs(request.body.decode()).get("paths", [])]
        return [each for each in told if each]

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Any:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.tree:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.tree[path]
        headers["ETag"] = etag = f'"{_etag(path, content)}"'
        if not path.endswith(LFS):
            return _part(request, content, headers)
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        return Answer(b"", 302, headers | {"Location": f"{self._storage}/cdn/{_sha256(content)}/{quote(path)}"})

    def _download(self, request: Request, sha256: str) -> Any:
        if "Authorization" in request.headers:  # the address is signed: a token here is one that has leaked
            raise Refusal(400, "Only one auth mechanism allowed")
        if sha256 not in self._objects:
            raise Refusal(404, "No such object")
        return _part(request, self._objects[sha256], {"ETag": f'"{sha256}"'})

    def _validate_yaml(self, request: Request) -> Any:
        try:
            found = _metadata(request.json["content"])
        except (yaml.YAMLError, ValueError) as error:
            return Answer({"errors": [{"message": str(error)}]}, 400)
        return {"warnings": [] if found else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Any:
        tree, files = repo.at(revision).tree, []
        for path in (file["path"] for file in request.json["files"]):
            mode = "lfs" if path.endswith(LFS) else "regular"
            there = {"oid": _etag(path, tree[path])} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return {"files": files}

    def _lfs_batch(self, request: Request, repo: Repo) -> Any:
        objects = request.json["objects"]
        for each in objects:
            if each["oid"] not in self._objects:
                href = f"{self.url}/lfs/{each['oid']}"
                each["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request: Request, sha256: str) -> Any:
        if _sha256(request.body) != sha256:
            raise Refusal(400, "The content is not what the address says")
        self._objects[sha256] = request.body
        return b""

    def _lfs_verify(self, request: Request, sha256: str) -> Any:
        if len(self._objects.get(sha256, b"")) != request.json["size"]:
            raise Refusal(422, "The object was not uploaded, or not all of it")
        return {}

    def _commit(self, request: Request, repo: Repo, revision: str) -> Any:
        (_, about), *changes = (json.loads(line).values() for line in request.body.splitlines())
        is_pull, page, author = "create_pr" in request.query, f"{self.url}/{repo.page}", request.user.name
        parent = repo.at(about.get("parentCommit", revision))
        if parent.sha != repo.at(revision).sha and not is_pull:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for kind, value in changes:
            path = value["path"]
            if kind in ("file", "lfsFile"):
                tree[path] = base64.b64decode(value["content"]) if kind == "file" else self._objects[value["oid"]]
                continue
            folder = f"{path.rstrip('/')}/"
            gone = [file for file in tree if (file == path if kind == "deletedFile" else file.startswith(folder))]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for file in gone:
                del tree[file]
        commit = Commit(parent, tree, about["summary"], about["description"], author)
        told = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        if is_pull:
            number = len(repo.pulls) + 1
            repo.pulls.append(Pull(number, commit.title, "open", author))
            revision, told["pullRequestUrl"] = f"refs/pr/{number}", f"{page}/discussions/{number}"
        repo.add(commit, revision)
        return told

    def _discussions(self, request: Request, repo: Repo) -> Any:
        status = request.query.get("status", "all")
        found = [self._discussion(request, repo, str(pull.number)) for pull in reversed(repo.pulls)]
        found = [each for each in found if status == "all" or (each["status"] == "open") == (status == "open")]
        return {"discussions": found, "count": len(found), "start": 0}

    def _discussion(self, request: Request, repo: Repo, number: str) -> Any:
        pull = repo.pull(number)
        told: dict[str, Any] = {"num": pull.number, "title": pull.title, "status": pull.status, "isPullRequest": True}
        told |= {"author": {"name": pull.author}, "createdAt": DATE, "repo": {"name": repo.id, "type": repo.kind}}
        return told | {"events": pull.comments, "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}

    def _comment(self, request: Request, repo: Repo, number: str) -> Any:
        comments = repo.pull(number).comments
        data = {"edited": False, "hidden": False, "latest": {"raw": request.json["comment"]}}
        about = {"id": f"{len(comments):024x}", "type": "comment", "author": {"name": request.user.name}}
        comments.append({**about, "createdAt": DATE, "data": data})
        return {"newMessage": comments[-1]}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(path: str, content: bytes) -> str:
    """What the client caches a file under, and compares its own one with."""
    return _sha256(content) if path.endswith(LFS) else _git_oid(content)


def _about(commit: Commit, path: str) -> dict[str, Any]:
    """What listings say of a file or a folder; nothing if there is no such path."""
    told: dict[str, Any] = {"path": path, "lastCommit": {"id": commit.sha, "title": commit.title, "date": DATE}}
    if path not in commit.tree:
        inside = {file: _etag(file, content) for file, content in commit.tree.items() if file.startswith(f"{path}/")}
        return told | {"type": "directory", "oid": _git_oid(json.dumps(inside).encode()), "size": 0} if inside else {}
    content = commit.tree[path]
    told |= {"type": "file", "oid": _git_oid(content), "size": len(content)}
    if path.endswith(LFS):
        # Git keeps a pointer. Some listings call the digest of the content `oid`, some `sha256`.
        sha256, spec = _sha256(content), "https://git-lfs.github.com/spec/v1"
        pointer = f"version {spec}\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
        told |= {"oid": _git_oid(pointer), "lfs": lfs}
    return told


def _metadata(card: str) -> dict[str, Any]:
    """Read the YAML that a card begins with."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n?---", card, re.DOTALL)
    metadata = (yaml.safe_load(found[1]) if found else None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("metadata must be a mapping")
    return metadata


def _part(request: Request, content: bytes, headers: Mapping[str, str]) -> Answer:
    """Answer with the bytes that were asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Answer(content, 200, headers)
    start, last = int(asked[1]), len(content) - 1
    end = min(int(asked[2] or last), last)
    if start > end:
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


_API = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_PULL = rf"{_API}/discussions/(?P<number>\d+)"
_SHA256 = r"(?P<sha256>[0-9a-f]{64})"
ROUTES: list[tuple[str, str, int, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", PROPOSE, HubServer._whoami),
    ("POST", "/api/repos/create", PROPOSE, HubServer._create_repo),
    ("DELETE", "/api/repos/delete", PROPOSE, HubServer._delete_repo),
    ("POST", "/api/validate-yaml", SEE, HubServer._validate_yaml),
    ("GET", f"{_API}(?:/revision/{_REVISION})?", SEE, HubServer._info),
    ("GET", f"{_API}/auth-check", READ, HubServer._auth_check),
    ("GET", f"{_API}/auth-check/write", WRITE, HubServer._auth_check),
    ("GET", f"{_API}/refs", SEE, HubServer._refs),
    ("GET", f"{_API}/commits/{_REVISION}", SEE, HubServer._commits),
    ("POST", f"{_API}/(?P<what>branch|tag)/(?P<name>[^/]+)", WRITE, HubServer._add_ref),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", SEE, HubServer._tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", SEE, HubServer._paths_info),
    ("GET|HEAD", f"{_WEB}/resolve/{_REVISION}/(?P<path>.+)", READ, HubServer._resolve),
    # The name of the file ends the address so that `fail` can tell one download from another.
    ("GET|HEAD", f"/cdn/{_SHA256}/.+", SEE, HubServer._download),
    ("POST", f"{_API}/preupload/{_REVISION}", WRITE, HubServer._preupload),
    # This request does not say whether it is for a pull request.
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", PROPOSE, HubServer._lfs_batch),
    ("PUT", f"/lfs/{_SHA256}", SEE, HubServer._lfs_put),
    ("POST", f"/lfs/{_SHA256}/verify", SEE, HubServer._lfs_verify),
    ("POST", f"{_API}/commit/{_REVISION}", WRITE, HubServer._commit),
    ("GET", f"{_API}/discussions", SEE, HubServer._discussions),
    ("GET", _PULL, SEE, HubServer._discussion),
    ("POST", f"{_PULL}/comment", PROPOSE, HubServer._comment),
]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8765)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with HubServer(port=parser.parse_args().port) as by_hand, suppress(KeyboardInterrupt):
        logger.info("HF_ENDPOINT=%s HF_HUB_DISABLE_XET=1 HF_TOKEN=%s", by_hand.url, "|".join(USERS))
        threading.Event().wait()
