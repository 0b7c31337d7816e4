"""Push a packed checkpoint to the Hub: everything in one commit, on the parent that was read.

Whatever happens on the way, the branch holds either the old files or the new ones. After each failure the repository
is read again, and what is already there is not sent: this recognises a commit whose answer was lost, and merges with
somebody else's in between.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_oscqat.checkpoint import WEIGHT_FILE
from hf_oscqat.hub.card import (
    CARD,
    EVAL_RESULTS,
    RECIPE,
    RESULTS,
    card_of,
    check_license,
    has_edited_license,
    merge_eval_results,
    read_card,
    read_metadata,
    update_card,
)
from hf_oscqat.hub.client import TRIES, HubError, explained, is_passing, patiently, wait
from hf_oscqat.hub.safetensors_file import LocalFile, read_header

logger = logging.getLogger(__name__)

ENDINGS = frozenset("csv html jpeg jpg json jsonl md png py safetensors svg txt yaml yml".split())
"""Endings of files that are pushed; none of them is a pickle's, and files without an ending are text of some kind."""
GENERATED = (RESULTS, RECIPE, "oscillation.png", "distances.png")
"""Files about the weights: they go with them."""
PROCESSOR = "preprocessor_config.json"
"""Of another model that was there: it would win over what config.json says of preparing images."""
CONFLICTS = (409, 412)
"""HTTP statuses of a commit whose parent is no longer the newest."""


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        url: of the repository, or of the pull request.
        commit: the commit that holds the files.
        changed: paths that were written or removed by it; empty if all was there already.
    """

    url: str
    commit: str
    changed: tuple[str, ...]


def check_push(
    repo_id: str,
    *,
    token: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    license: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Find out whether a push will be possible, before training for it.

    Args:
        repo_id: `org/name`, or `name` for the token's own account.
        token: None takes the stored one, or HF_TOKEN.
        create_pr: whether a pull request will be opened, for which a token of any kind will do.
        private: what the repository has to be; None takes it as it is.
        license: that the model will be pushed with, where it is known by now.
        api: the client; None makes one.

    Returns:
        The full name, with its account.

    Raises:
        HubError: if there is no such token, or it may not write there.
        CardError: if the card there cannot be merged with, or a person has written another licence into it.
    """
    api = api or HfApi(token=token)
    with explained(repo_id, "pushing to", api.endpoint):
        account = patiently(api.whoami, "asking who the token belongs to")
        if "/" not in repo_id:
            repo_id = f"{account['name']}/{repo_id}"
        exists = True
        try:
            patiently(lambda: api.auth_check(repo_id, write=not create_pr), f"asking about {repo_id}")
        except RepositoryNotFoundError:
            exists = False
        if exists:
            info = patiently(lambda: api.repo_info(repo_id), f"reading {repo_id}")
            if private is not None and bool(info.private) != private and not create_pr:
                is_private = "is private" if info.private else "is public"
                raise HubError(
                    f"got private={private} for {repo_id}, which exists and {is_private}; expected the same: change "
                    "it in the settings of the repository, or take another name"
                )
            card = _read_card(api, repo_id, info.sha)
            if card is not None and has_edited_license(card, f"the card of {repo_id}"):
                check_license(card, license, repo_id)
        elif create_pr:
            raise HubError(f"got {repo_id}, which does not exist, expected a repository to open a pull request in")
        else:
            _check_may_create(account, repo_id)
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Push a folder with a packed checkpoint in one commit.

    The card is rendered anew with the name of the repository, keeping what people have edited in the folder's and in
    the repository's. Pickles are left out. Weights of an older checkpoint are removed by the same commit; everything
    else that is there stays.

    Args:
        folder: what `training/run_qat.py` calls `packed`, or what `save_pretrained` wrote.
        repo_id: `org/name`, or `name` for the token's own account. It is made if it does not exist.
        token: None takes the stored one, or HF_TOKEN.
        private: for a repository that is made; None leaves it to the account's settings.
        create_pr: open a pull request instead of committing to the branch.
        revision: the branch, made if it does not exist; None is `main`.
        license: of the model, instead of what `results.json` states.
        message: title of the commit.

    Returns:
        The commit, and what it changed; nothing if the same content was there.

    Raises:
        ValueError: if the folder holds no whole packed checkpoint, the card cannot be made or merged, or it states
            another licence than `license`.
        HubError: if the Hub refuses, or does not answer.
    """
    api = HfApi(token=token)
    folder = Path(folder)
    paths = files_to_push(folder)
    repo_id = check_push(repo_id, token=token, create_pr=create_pr, private=private, api=api)
    ours = card_of(folder, license=license, repo_id=repo_id)
    contents: dict[str, Path | bytes] = dict(paths)
    title = message or f"{repo_id.rpartition('/')[2]}: packed checkpoint of hf_oscqat"
    with explained(repo_id, "pushing to", api.endpoint):
        if not create_pr:
            if not patiently(lambda: api.repo_exists(repo_id), f"asking about {repo_id}"):
                check_license(ours, license, str(folder / CARD))
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"making {repo_id}")
            if revision is not None:
                patiently(
                    lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), f"making branch {revision}"
                )

        def changes(head: str) -> dict[str, bytes | Path | None]:
            theirs = _read_card(api, repo_id, head)
            text = ours if theirs is None else update_card(theirs, ours, f"the card of {repo_id}")
            check_license(text, license, repo_id)
            there = digests_there(api, repo_id, head)
            wanted = {**contents, CARD: text.encode(), **_eval_results(api, repo_id, head, there, contents)}
            replaced = {p for p in there if WEIGHT_FILE.fullmatch(p) or p in GENERATED or p == PROCESSOR}
            return differences(there, wanted | dict.fromkeys(replaced - wanted.keys()))

        return commit(api, repo_id, changes, title, revision=revision, create_pr=create_pr)


def commit(
    api: HfApi,
    repo_id: str,
    changes: Callable[[str], Mapping[str, bytes | Path | None]],
    title: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
) -> Pushed:
    """Make one commit, or open one pull request, so that a failure leaves the repository as it was.

    Args:
        api: the client.
        repo_id: of the repository.
        changes: returns for a commit what has to be different from it: contents by path, None for a file to remove.
        title: of the commit.
        revision: the branch; None is `main`.
        create_pr: open a pull request.
        description: of the commit, below its title.

    Returns:
        What was done, also where that turned out only after the answer was lost.
    """
    changed: tuple[str, ...] = ()
    failure: Exception | None = None
    for attempt in range(1, TRIES + 2):  # the last time it is only seen whether the one before came through
        head = str(patiently(lambda: api.repo_info(repo_id, revision=revision), f"reading {repo_id}").sha)
        wanted = changes(head)
        if not wanted:
            return Pushed(f"{api.endpoint}/{repo_id}", head, changed)
        if failure is not None and attempt > TRIES:
            raise failure
        changed = tuple(sorted(wanted))
        if create_pr and (found := _open_pull_request(api, repo_id, changes, title)) is not None:
            return Pushed(*found, changed)
        try:
            done = api.create_commit(
                repo_id,
                [
                    CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
                    for path, content in wanted.items()
                ],
                commit_message=title,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
            return Pushed(str(done.pr_url or f"{api.endpoint}/{repo_id}"), done.oid, changed)
        except Exception as error:
            conflict = isinstance(error, HfHubHTTPError) and error.response.status_code in CONFLICTS
            if not (conflict or is_passing(error)):
                raise
            failure = error
            if attempt < TRIES:
                wait(attempt, f"the commit to {repo_id}", error)
    raise AssertionError("the last time returns or raises")


def files_to_push(folder: Path) -> dict[str, Path]:
    """Return the files of a packed checkpoint by their path in the repository; its card is not among them.

    Pickles, hidden files and what is no file are left out, which is logged.

    Raises:
        ValueError: if the folder holds no packed checkpoint, or its weights are no whole safetensors file.
    """
    config = folder / "config.json"
    try:
        quantization = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]
        packed = quantization["checkpoint_format"] == "packed"
    except (OSError, ValueError, KeyError, TypeError):
        packed = False
    if not packed:
        raise ValueError(
            f"got {folder}, expected a folder with a packed checkpoint, as a run writes it to <output_dir>/packed"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == CARD:
            continue
        listed = name.startswith(f"{EVAL_RESULTS}/") and path.suffix in (".yaml", ".yml")
        if any(part.startswith(".") for part in name.split("/")) and not listed:
            logger.info("not pushed: %s, which is hidden", name)
        elif is_pickle(path):
            logger.warning("not pushed: %s, which is a pickle and could run anything on whoever loads it", name)
        elif path.suffix.removeprefix(".").lower() not in ENDINGS and path.suffix:
            logger.warning("not pushed: %s, which is no kind of file that belongs to a checkpoint", name)
        elif not path.resolve().is_relative_to(folder.resolve()):
            logger.warning("not pushed: %s, a link that leads out of the folder", name)
        else:
            found[name] = path
    weights = [path for name, path in found.items() if name.endswith(".safetensors")]
    if not weights:
        raise ValueError(f"got {folder} without weights in safetensors, expected model.safetensors in it")
    for path in weights:
        read_header(LocalFile(path))
    return found


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of protocol 2 or newer, or holds one as torch writes it; nothing is executed."""
    if path.suffix == ".safetensors":
        return False
    with path.open("rb") as stream:
        start = stream.read(2)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5


def _check_may_create(account: Mapping[str, Any], repo_id: str) -> None:
    owner = repo_id.partition("/")[0]
    token = (account.get("auth") or {}).get("accessToken") or {}
    orgs = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or []}
    if owner != account["name"] and orgs.get(owner, "read" if owner not in orgs else None) == "read":
        raise HubError(
            f"pushing to {repo_id}: there is no such repository, or it is private, and the account {account['name']} "
            f"may not make one for {owner}; expected one of its own or of an organisation that it may write to"
        )
    allowed = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        allowed = any(
            "repo.write" in scope.get("permissions", ()) and (scope.get("entity") or {}).get("name") == owner
            for scope in scopes
        )
    if not allowed:
        raise HubError(
            f"pushing to {repo_id}: got a token that may only read, expected one with write permission for {owner}; "
            "make one in the settings of the account, then run `hf auth login` or set HF_TOKEN"
        )


def _read_card(api: HfApi, repo_id: str, commit: str | None) -> str | None:
    """Return the card of a repository; None if it has none.

    Raises:
        CardError: if its metadata are no YAML.
    """
    listed = patiently(lambda: api.get_paths_info(repo_id, [CARD], revision=commit), f"reading {repo_id}")
    if not listed:
        return None
    text = read_file(api, repo_id, CARD, str(commit))
    read_metadata(text, f"the card of {repo_id}")
    return text


def digests_there(api: HfApi, repo_id: str, commit: str) -> dict[str, str]:
    """Return the digest of each file of a commit: sha256 where git keeps a pointer only, else what git calls it.

    Args:
        api: the client.
        repo_id: of the repository.
        commit: of which.
    """

    def listing() -> dict[str, str]:
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    return patiently(listing, f"reading {repo_id}")


def differences(there: Mapping[str, str], wanted: Mapping[str, Path | bytes | None]) -> dict[str, Path | bytes | None]:
    """Return what of the wanted contents, None for a file that must go, is not so already.

    Args:
        there: digests by path.
        wanted: contents by path.
    """
    return {
        path: content
        for path, content in wanted.items()
        if (path in there if content is None else there.get(path) not in _digests(content))
    }


def _eval_results(
    api: HfApi, repo_id: str, commit: str, there: Mapping[str, str], ours: Mapping[str, Path | bytes]
) -> dict[str, bytes | None]:
    """Merge our entries of `.eval_results/` into the files there, and take away those of weights that were before."""
    paths = {path for path in (*there, *ours) if path.startswith(f"{EVAL_RESULTS}/")}
    merged: dict[str, bytes | None] = {}
    for path in paths:
        own = ours.get(path, b"")
        new = own.decode() if isinstance(own, bytes) else own.read_text(encoding="utf-8")
        text = merge_eval_results(read_file(api, repo_id, path, commit) if path in there else "", new)
        merged[path] = text.encode() if text else None
    return merged


def read_file(api: HfApi, repo_id: str, path: str, commit: str) -> str:
    """Return the text of a file of a commit.

    Args:
        api: the client.
        repo_id: of the repository.
        path: of the file.
        commit: of which.
    """
    local = patiently(lambda: api.hf_hub_download(repo_id, path, revision=commit), f"reading {path} of {repo_id}")
    return read_card(Path(local))


def _digests(content: Path | bytes) -> tuple[str, str]:
    """What git calls the content, and its sha256."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()


def _open_pull_request(
    api: HfApi, repo_id: str, changes: Callable[[str], Mapping[str, Any]], title: str
) -> tuple[str, str] | None:
    """Return address and commit of an open pull request of this title that has these changes already."""
    for request in open_pull_requests(api, repo_id, title):
        reference = f"refs/pr/{request.num}"
        head = str(patiently(lambda ref=reference: api.repo_info(repo_id, revision=ref), f"reading {repo_id}").sha)  # type: ignore[misc]
        if not changes(head):
            return str(request.url), head
    return None


def open_pull_requests(api: HfApi, repo_id: str, title: str) -> list[Discussion]:
    """Return the open pull requests of this title."""
    found = patiently(
        lambda: list(api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")),
        f"reading the pull requests of {repo_id}",
    )
    return [request for request in found if request.title == title]
