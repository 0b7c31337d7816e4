"""The Hub of the tests, asked by the real client: in a process of its own, for the client reads its address once."""

import io
import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer

MODEL, DATA = "org/net", "org/data"
CARD = b"---\ntags: [t]\n---\n"
WEIGHTS = bytes(range(256)) * 400


def check_commits(hub, hf):
    api = hf.HfApi()
    assert api.whoami()["name"] == "alice"
    assert api.create_repo(MODEL).repo_id == MODEL
    assert status(api.create_repo, MODEL) == 409
    api.create_repo(MODEL, exist_ok=True)
    parent = hub.head(MODEL)
    files = {"model.safetensors": WEIGHTS, "config.json": b"{}", "sub/a b.txt": b"a", "README.md": CARD}
    commit = api.create_commit(MODEL, additions(hf, files), commit_message="First", parent_commit=parent)
    assert commit.oid == hub.head(MODEL)
    assert hub.files(MODEL) == files
    assert hub.commits(MODEL) == ["First", "initial commit"]
    assert (
        status(api.create_commit, MODEL, additions(hf, {"b": b"1"}), commit_message="b", parent_commit=parent) == 412
    )
    hub.before("POST", "/commit/main", lambda: hub.add_commit(MODEL, {"config.json": b"[]", "sub/a b.txt": None}))
    late = additions(hf, {"b": b"1"})
    assert status(api.create_commit, MODEL, late, commit_message="b", parent_commit=commit.oid) == 412
    assert status(api.create_commit, MODEL, [hf.CommitOperationDelete("no")], commit_message="delete") == 404
    bad = additions(hf, {"README.md": b"---\na: [\n---\n"})
    assert "Invalid metadata" in str(error(api.create_commit, MODEL, bad, commit_message="No YAML"))
    assert hub.files(MODEL)["config.json"] == b"[]"

    api.create_commit(MODEL, [hf.CommitOperationDelete("model.safetensors")], commit_message="Delete")
    api.create_branch(MODEL, branch="dev", revision=commit.oid)
    api.create_branch(MODEL, branch="dev", exist_ok=True)
    api.create_tag(MODEL, tag="v1", revision="dev")
    refs = api.list_repo_refs(MODEL)
    assert [ref.name for ref in (*refs.branches, *refs.tags)] == ["main", "dev", "v1"]
    assert [each.title for each in api.list_repo_commits(MODEL, revision="v1")] == ["First", "initial commit"]
    info = api.model_info(MODEL, revision="v1", files_metadata=True)
    assert (info.sha, info.tags, info.siblings[3].lfs.size) == (commit.oid, ["t"], len(WEIGHTS))
    tree = [each.path for each in api.list_repo_tree(MODEL, revision="v1", recursive=True)]
    assert tree == [".gitattributes", "README.md", "config.json", "model.safetensors", "sub", "sub/a b.txt"]
    assert [each.path for each in api.list_repo_tree(MODEL, "sub", revision="v1")] == ["sub/a b.txt"]
    found = api.get_paths_info(MODEL, ["sub", "no", "model.safetensors"], revision="v1", expand=True)
    assert [each.path for each in found] == ["sub", "model.safetensors"]
    assert hf.ModelCard.load(MODEL).data.tags == ["t"]
    api.delete_repo(MODEL)
    assert status(api.repo_info, MODEL) == 404


def check_pull_requests(hub, hf):
    hub.create(MODEL, {"a": b"1"})
    carol = hf.HfApi(token="hf_other")
    assert status(carol.create_commit, MODEL, additions(hf, {"a": b"2"}), commit_message="Two") == 403
    files = {"a": b"2", "b.bin": b"3"}
    opened = carol.create_commit(MODEL, additions(hf, files), commit_message="Two", create_pr=True)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    assert [(pull.title, pull.status, pull.author) for pull in hub.pulls(MODEL)] == [("Two", "open", "carol")]
    assert (hub.files(MODEL), hub.files(MODEL, "refs/pr/1")) == ({"a": b"1"}, files)
    assert Path(carol.hf_hub_download(MODEL, "b.bin", revision="refs/pr/1")).read_bytes() == b"3"
    carol.create_commit(MODEL, additions(hf, {"a": b"4"}), commit_message="More", revision="refs/pr/1")
    assert hub.commits(MODEL, "refs/pr/1")[:2] == ["More", "Two"]
    carol.comment_discussion(MODEL, 1, "Please")
    assert carol.get_discussion_details(MODEL, 1).events[-1].content == "Please"
    filters = {"discussion_type": "pull_request", "discussion_status": "open"}
    assert [each.num for each in carol.get_repo_discussions(MODEL, **filters)] == [1]
    hub.pulls(MODEL)[0].status = "closed"
    assert not list(carol.get_repo_discussions(MODEL, **filters))


def check_downloads(hub, hf):
    hub.create(MODEL, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    path = Path(hf.hf_hub_download(MODEL, "model.safetensors"))
    assert path.read_bytes() == WEIGHTS
    assert path.parent.name == hub.head(MODEL)
    assert [method for method, target, _ in hub.requests if target.startswith("/cdn/")] == ["GET"]
    assert {each.name for each in Path(hf.snapshot_download(MODEL)).iterdir()} >= {"model.safetensors", "config.json"}
    assert status(hf.hf_hub_download, MODEL, "no.json") == 404
    assert status(hf.hf_hub_download, MODEL, "config.json", revision="no") == 404

    with hf.HfFileSystem().open(f"{MODEL}/model.safetensors", block_size=1000) as file:
        file.seek(5000)
        assert file.read(10) == WEIGHTS[5000:5010]
    assert hub.requests[-1][2].startswith("bytes=5000-")

    hf.constants.DOWNLOAD_CHUNK_SIZE = 10_000  # it resumes at whole chunks, which are as large as 10 MiB
    hub.fail("GET", r"/cdn/.*model\.safetensors", cut=50_000)
    path = hf.hf_hub_download(MODEL, "model.safetensors", force_download=True)
    assert Path(path).read_bytes() == WEIGHTS
    assert hub.requests[-1][2] == "bytes=50000-"


def check_access(hub, hf):
    hub.create(MODEL, {"config.json": b"{}"})
    hub.create("org/private", {"config.json": b"{}"}, private=True)
    hub.create("org/gated", {"config.json": b"{}"}, gated=True)
    anonymous, reader, stranger = (hf.HfApi(token=token) for token in (False, "hf_read", "hf_other"))
    fine, fine_reader = hf.HfApi(token="hf_fine"), hf.HfApi(token="hf_fine_read")
    assert status(hf.HfApi(token="hf_unknown").whoami) == 401
    assert fine.whoami()["auth"]["accessToken"]["fineGrained"]["scoped"][0]["permissions"][-1] == "repo.write"

    for api, private, gated in ((anonymous, 401, 401), (stranger, 404, 403), (reader, None, None), (fine, None, None)):
        for repo, expected in (("org/private", private), ("org/gated", gated)):
            assert status(api.auth_check, repo) == expected
            assert status(api.get_hf_file_metadata, url=hf.hf_hub_url(repo, "config.json")) == expected
    assert isinstance(error(stranger.auth_check, "org/gated"), hf.errors.GatedRepoError)
    assert isinstance(error(anonymous.auth_check, "org/private", write=True), hf.errors.RepositoryNotFoundError)
    assert stranger.model_info("org/gated").gated == "auto"

    for api, expected in ((reader, 403), (stranger, 403), (fine_reader, 403), (fine, None), (hf.HfApi(), None)):
        api.create_repo(MODEL, exist_ok=True)
        assert status(api.auth_check, MODEL, write=True) == expected
        assert (
            status(api.create_commit, MODEL, additions(hf, {"a": str(api.token).encode()}), commit_message="a")
            == expected
        )
        assert status(api.create_repo, f"org/new-{expected}", private=True, exist_ok=expected is None) == expected
    assert status(stranger.repo_info, "org/new-None") == 404


def check_failures(hub, hf):
    hub.create(MODEL)
    api = hf.HfApi()
    hub.fail("POST", "/commit/", status=None, after=True)
    lost = error(api.create_commit, MODEL, additions(hf, {"a": b"1"}), commit_message="Landed")
    assert type(lost).__name__ == "RemoteProtocolError"
    assert hub.commits(MODEL)[0] == "Landed"
    hub.fail("POST", "/commit/", status=503)
    assert status(api.create_commit, MODEL, additions(hf, {"a": b"2"}), commit_message="Did not") == 503
    assert hub.commits(MODEL)[0] == "Landed"
    hub.fail("PUT", "/lfs/", status=None)
    api.create_commit(MODEL, additions(hf, {"a.bin": b"2"}), commit_message="Retried")
    assert hub.files(MODEL)["a.bin"] == b"2"
    hub.fail("GET", "/api/", status=404, error_code="RevisionNotFound")
    assert isinstance(error(api.repo_info, MODEL), hf.errors.RevisionNotFoundError)
    assert status(api.get_user_overview, "alice") == 404  # of which the server has never heard
    assert hub.requests[-1] == ("GET", "/api/users/alice/overview", None)


def check_dataset(hub, hf):
    import datasets

    table = io.BytesIO()
    datasets.Dataset.from_dict({"label": [3, 1, 2]}).to_parquet(table)
    hub.create(DATA, {"data/validation-00000-of-00001.parquet": table.getvalue()}, kind="dataset", private=True)
    assert datasets.load_dataset(DATA, split="validation")["label"][:] == [3, 1, 2]
    streamed = datasets.load_dataset(DATA, split="validation", streaming=True, revision=hub.head(DATA, kind="dataset"))
    assert [each["label"] for each in streamed] == [3, 1, 2]


def additions(hf, files):
    return [hf.CommitOperationAdd(path, content) for path, content in files.items()]


def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as caught:
        return caught
    return None


def status(call, *args, **kwargs):
    """HTTP status of a refusal; None if there is none."""
    caught = error(call, *args, **kwargs)
    return None if caught is None else caught.response.status_code


def test_real_client(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # The client's own uploads to LFS call httpx in a way that it wants to be rid of.
    warnings = ["-W", "error", "-W", "ignore:Use 'content=<...>' to upload:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *warnings, __file__],
        env=kept | switches | {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_write", "USE_TORCH": "0"},  # faster without
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    with HubServer() as server:
        os.environ["HF_ENDPOINT"] = server.url
        import huggingface_hub as client

        for check in (
            check_commits,
            check_pull_requests,
            check_downloads,
            check_access,
            check_failures,
            check_dataset,
        ):
            server.reset()
            check(server, client)
