"""Pushing, against a server that fails on demand: the branch is always the old state or the new one."""

import json
import pickle
import shutil
import zipfile

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoModelForImageClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat
from hf_oscqat.checkpoint import packed_layers
from hf_oscqat.hub.card import CARD, CardError
from hf_oscqat.hub.client import HubError
from hf_oscqat.hub.push import check_push, is_pickle, push_folder
from hf_oscqat.integration import modeling_oscqat

REPO = "org/mbv2-w4a4-osc"
FILES = {
    "README.md", "config.json", "model.safetensors", "modeling_oscqat.py", "oscillation.png", "recipe.yaml",
    "results.json",
}  # fmt: skip


def contents(folder):
    """The files of a folder that are not rendered again when they are pushed."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.name != CARD and p.is_file()
    }


def assert_is(hub, folder, revision="main"):
    """Main holds the folder, file by file, and a card of that repository."""
    files = hub.files(REPO, revision)
    assert files.keys() == FILES
    card = files.pop(CARD).decode()
    assert f'path = "{REPO}"' in card
    assert ModelCard(card).data.license == "mit"
    assert files == contents(folder)


class TestOneCommit:
    def test_holds_everything_and_makes_the_repository(self, hub, folder):
        pushed = push_folder(folder, REPO)
        assert_is(hub, folder)
        assert hub.commits(REPO) == ["mbv2-w4a4-osc: packed checkpoint of hf_oscqat", "initial commit"]
        assert (pushed.commit, pushed.url, set(pushed.changed)) == (hub.head(REPO), f"{hub.url}/{REPO}", FILES)

    def test_again_makes_no_commit(self, hub, folder):
        first = push_folder(folder, REPO)
        again = push_folder(folder, REPO)
        assert (again.changed, again.commit) == ((), first.commit)
        assert len(hub.commits(REPO)) == 2

    def test_only_what_changed_is_sent(self, hub, folder):
        push_folder(folder, REPO)
        (folder / "recipe.yaml").write_text("seed: 1\n")
        assert push_folder(folder, REPO).changed == ("recipe.yaml",)

    def test_weights_of_an_older_checkpoint_go_and_other_files_stay(self, hub, folder):
        hub.create(
            REPO, {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "a.txt": b"x"}
        )
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | {"a.txt"}

    def test_processor_of_another_model_goes(self, hub, folder):
        hub.create(REPO, {"preprocessor_config.json": b'{"image_processor_type": "ViTImageProcessor"}'})
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES
        (folder / "preprocessor_config.json").write_text("{}")
        push_folder(folder, REPO)
        assert hub.files(REPO)["preprocessor_config.json"] == b"{}"

    @pytest.mark.parametrize("theirs", ["license: apache-2.0", "license: other\nlicense_name: mine"])
    def test_licence_that_a_person_has_written_there_is_not_passed_over(self, hub, folder, theirs):
        hub.create(REPO, {CARD: f"---\n{theirs}\n---\n".encode()})
        with pytest.raises(CardError, match=r"got licence 'mit' for .*, whose card says '(apache-2.0|mine)'"):
            push_folder(folder, REPO, license="mit")
        assert hub.files(REPO).keys() == {CARD}
        push_folder(folder, REPO, license="apache-2.0" if "apache" in theirs else "mine")
        assert theirs in hub.files(REPO)[CARD].decode()

    def test_licence_that_the_hub_learns_later_is_itself(self, hub, folder):
        (folder / CARD).write_text("---\nlicense: brand-new-1.0\n---\nText.\n")
        push_folder(folder, REPO, license="brand-new-1.0")
        assert "license: brand-new-1.0" in hub.files(REPO)[CARD].decode()

    @pytest.mark.parametrize("license", ["MIT", "Apache-2.0", "Our own"])
    def test_licence_in_capitals_is_the_one_that_the_hub_knows(self, hub, folder, license):
        push_folder(folder, REPO, license=license)
        data = ModelCard(hub.files(REPO)[CARD].decode()).data
        own = license == "Our own"
        assert (data.license, data.license_name) == ("other" if own else license.lower(), license if own else None)
        assert not push_folder(folder, REPO, license=license).changed

    def test_licence_that_contradicts_the_folder_is_refused_before_anything_is_made(self, hub, folder):
        (folder / CARD).write_text("---\nlicense: gpl-3.0\n---\nText.\n")
        with pytest.raises(CardError, match=r"got licence 'mit' for .*/packed/README.md, whose card says 'gpl-3.0'"):
            push_folder(folder, REPO, license="mit")
        assert not HfApi().repo_exists(REPO)

    def test_licence_is_compared_with_the_card_of_the_branch(self, hub, folder):
        hub.create(REPO, {CARD: b"---\nlicense: apache-2.0\n---\n"})
        api = HfApi()
        api.create_branch(REPO, branch="mine")
        hub.add_commit(REPO, {CARD: b"---\nlicense: mit\n---\n"}, revision="mine")
        push_folder(folder, REPO, license="mit", revision="mine")
        with pytest.raises(CardError, match=r"whose card says 'apache-2.0'"):
            push_folder(folder, REPO, license="mit")

    def test_card_that_begins_with_a_mark_keeps_its_metadata(self, hub, folder):
        hub.create(REPO, {CARD: b"\xef\xbb\xbf---\nlicense: gpl-3.0\ntags: [mine]\n---\nText.\n"})
        push_folder(folder, REPO)
        data = ModelCard(hub.files(REPO)[CARD].decode()).data
        assert data.license == "gpl-3.0"
        assert "mine" in data.tags

    def test_card_in_another_encoding_is_an_error_that_names_it(self, hub, folder):
        (folder / CARD).write_bytes("---\nlicense: mit\n---\nGrüße".encode("latin-1"))
        with pytest.raises(CardError, match=r"README.md, which is not in UTF-8"):
            push_folder(folder, REPO)

    def test_weights_in_folders_of_the_repository_stay(self, hub, folder):
        others = {"float/model.safetensors": b"float", "ema.safetensors": b"ema"}
        hub.create(REPO, others)
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | others.keys()

    def test_what_is_about_older_weights_goes_with_them(self, hub, folder):
        ours = yaml.safe_dump([{"dataset": {"id": "org/a", "task_id": "b"}, "value": 3, "notes": "hf_oscqat: top-1"}])
        theirs = yaml.safe_dump([{"dataset": {"id": "org/a", "task_id": "b"}, "value": 3, "notes": "by hand"}])
        files = {".eval_results/org--a.yaml": ours.encode(), ".eval_results/mine.yaml": theirs.encode()}
        hub.create(REPO, {**files, "distances.png": b"old"})
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | {".eval_results/mine.yaml"}

    def test_goes_to_a_branch_if_told(self, hub, folder):
        hub.create(REPO)
        before = hub.head(REPO)
        push_folder(folder, REPO, revision="w4a4-v2")
        assert hub.head(REPO) == before
        assert_is(hub, folder, "w4a4-v2")

    def test_private_repository_opens_with_the_token_only(self, hub, folder, tmp_path):
        push_folder(folder, REPO, private=True)
        AutoModelForImageClassification.from_pretrained(REPO)
        with pytest.raises(OSError, match="not a local folder and is not a valid model identifier"):
            AutoModelForImageClassification.from_pretrained(REPO, token="hf_other", cache_dir=tmp_path / "cache")

    def test_name_alone_belongs_to_the_account(self, hub, folder):
        push_folder(folder, "mine")
        assert hub.files("alice/mine").keys() == FILES


class TestPullRequest:
    def test_holds_everything_and_leaves_main(self, hub, folder):
        hub.create(REPO, {"old.txt": b"old"})
        before = hub.head(REPO)
        pushed = push_folder(folder, REPO, create_pr=True)
        assert hub.head(REPO) == before
        assert hub.files(REPO, "refs/pr/1").keys() == FILES | {"old.txt"}
        assert pushed.url.endswith("/discussions/1")

    def test_again_finds_the_open_one(self, hub, folder):
        hub.create(REPO)
        first, again = (push_folder(folder, REPO, create_pr=True) for _ in range(2))
        assert first.url == again.url
        assert len(hub.pulls(REPO)) == 1

    def test_lost_answer_opens_no_second_one(self, hub, folder):
        hub.create(REPO)
        hub.fail("POST", "/commit/", status=None, after=True)
        push_folder(folder, REPO, create_pr=True)
        assert len(hub.pulls(REPO)) == 1

    def test_needs_a_repository(self, hub, folder):
        with pytest.raises(HubError, match="which does not exist, expected a repository to open a pull request in"):
            push_folder(folder, REPO, create_pr=True)

    def test_any_account_may_propose(self, hub, folder):
        hub.create(REPO)
        push_folder(folder, REPO, create_pr=True, token="hf_other")
        assert hub.pulls(REPO)[0].author == "carol"


class TestWhatIsNotPushed:
    def test_pickles_whatever_they_are_called(self, hub, folder, caplog):
        torch.save({"lr": 1}, folder / "training_args.bin")
        torch.save({"lr": 1}, folder / "notes")
        (folder / "state").write_bytes(pickle.dumps({"lr": 1}))
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES
        for name in ("training_args.bin", "notes", "state"):
            assert f"not pushed: {name}, which is a pickle" in caplog.text

    def test_hidden_files(self, hub, folder):
        for place in (folder / ".cache", folder / "sub"):
            place.mkdir()
        (folder / ".cache" / "token.txt").write_text("secret")
        (folder / "sub" / ".env").write_text("secret")
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES

    def test_files_of_other_kinds_and_links_that_lead_out(self, hub, folder, tmp_path, caplog):
        (folder / "arrays.npz").write_bytes(b"PK")
        (tmp_path / "secret.txt").write_text("secret")
        (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
        (folder / "LICENSE").write_text("MIT")
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | {"LICENSE"}
        assert "not pushed: arrays.npz, which is no kind of file" in caplog.text
        assert "not pushed: notes.txt, a link that leads out of the folder" in caplog.text

    @pytest.mark.parametrize("name", ["a.safetensors", "a.txt", "a.png"])
    def test_other_files_are_no_pickles(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"\x80\x02\x00" if name.endswith("safetensors") else b"\x89PNG")
        assert not is_pickle(tmp_path / name)

    def test_archive_without_a_pickle_is_none(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.txt", "x")
        assert not is_pickle(tmp_path / "a.zip")

    @pytest.mark.parametrize("damage", ["truncated", "pickle", "no weights", "training form"])
    def test_folder_that_is_no_whole_checkpoint(self, hub, folder, damage):
        weights = folder / "model.safetensors"
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "pickle":
            weights.write_bytes(pickle.dumps([1] * 100))
        elif damage == "no weights":
            weights.unlink()
        else:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["checkpoint_format"] = "qat"
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="expected"):
            push_folder(folder, REPO)
        assert not hub.requests

    def test_model_without_a_licence(self, hub, folder):
        results = json.loads((folder / "results.json").read_text())
        results["model"]["license"] = None
        (folder / "results.json").write_text(json.dumps(results))
        with pytest.raises(CardError, match="got no licence for mbv2-w4a4-osc"):
            push_folder(folder, REPO)
        push_folder(folder, REPO, license="bsd-3-clause")
        assert ModelCard(hub.files(REPO)[CARD].decode()).data.license == "bsd-3-clause"


class TestFaults:
    @pytest.mark.parametrize(
        ("method", "pattern"),
        [
            ("GET", "/whoami"),
            ("GET", "/auth-check"),
            ("POST", "/repos/create"),
            ("GET", f"/api/models/{REPO}"),
            ("POST", "/preupload/"),
            ("POST", "/lfs/objects/batch"),
            ("PUT", "/lfs/"),
            ("POST", "/commit/"),
        ],
    )
    def test_busy_server_is_asked_again(self, hub, folder, method, pattern):
        hub.create(REPO)
        hub.fail(method, pattern)
        push_folder(folder, REPO)
        assert_is(hub, folder)
        assert len(hub.commits(REPO)) == 2

    def test_server_that_stays_busy_leaves_the_old_state(self, hub, folder):
        hub.create(REPO, {"old.txt": b"old"})
        before = hub.head(REPO)
        hub.fail("POST", "/commit/", times=99)
        with pytest.raises(HubError, match="the Hub does not answer as it should, also after 5 tries"):
            push_folder(folder, REPO)
        assert (hub.head(REPO), hub.files(REPO)) == (before, {"old.txt": b"old"})

    @pytest.mark.parametrize("status", [None, 500, 503])
    def test_answer_lost_after_the_commit_commits_once(self, hub, folder, status):
        hub.fail("POST", "/commit/", status=status, after=True)
        pushed = push_folder(folder, REPO)
        assert_is(hub, folder)
        assert len(hub.commits(REPO)) == 2
        assert set(pushed.changed) == FILES

    def test_answer_lost_after_the_last_try_is_no_failure(self, hub, folder):
        hub.create(REPO)
        hub.fail("POST", "/commit/", times=4)
        hub.fail("POST", "/commit/", status=None, after=True)
        push_folder(folder, REPO)
        assert_is(hub, folder)
        assert len(hub.commits(REPO)) == 2

    def test_answer_lost_after_making_the_repository(self, hub, folder):
        hub.fail("POST", "/repos/create", status=None, after=True)
        push_folder(folder, REPO)
        assert_is(hub, folder)

    def test_connection_cut_in_the_upload(self, hub, folder):
        hub.create(REPO, {"old.txt": b"old"})
        hub.fail("PUT", ".*", status=None)
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | {"old.txt"}
        assert len(hub.commits(REPO)) == 3

    @pytest.mark.parametrize("times", [1, 2])
    def test_somebody_elses_commit_in_between_is_merged_with(self, hub, folder, times):
        hub.create(REPO)
        names = iter(["first.txt", "second.txt"])
        hub.before("POST", "/commit/", lambda: hub.add_commit(REPO, {next(names): b"theirs"}), times=times)
        push_folder(folder, REPO)
        assert hub.files(REPO).keys() == FILES | set(["first.txt", "second.txt"][:times])
        assert len(hub.commits(REPO)) == 2 + times

    @pytest.mark.parametrize("status", [409, 412])
    def test_conflict_is_read_again(self, hub, folder, status):
        hub.create(REPO)
        hub.fail("POST", "/commit/", status=status, times=2)
        push_folder(folder, REPO)
        assert_is(hub, folder)
        assert len(hub.commits(REPO)) == 2

    def test_somebody_who_commits_each_time_ends_in_an_error(self, hub, folder):
        hub.create(REPO)
        count = iter(range(99))
        hub.before("POST", "/commit/", lambda: hub.add_commit(REPO, {f"{next(count)}.txt": b"theirs"}), times=99)
        with pytest.raises(HubError, match="others have committed to it each time"):
            push_folder(folder, REPO)
        assert not FILES & hub.files(REPO).keys()

    def test_card_edited_in_between_keeps_the_edit(self, hub, folder):
        push_folder(folder, REPO)
        edited = hub.files(REPO)[CARD].decode().replace("## Citation", "## Thanks\n\nTo all.\n\n## Citation")
        (folder / "recipe.yaml").write_text("seed: 1\n")
        hub.before("POST", "/commit/", lambda: hub.add_commit(REPO, {CARD: edited.encode()}))
        push_folder(folder, REPO)
        files = hub.files(REPO)
        assert "## Thanks\n\nTo all." in files[CARD].decode()
        assert files["recipe.yaml"] == b"seed: 1\n"

    def test_two_pushers_at_once_leave_one_whole_tree(self, hub, folder, tmp_path):
        """The second pushes everything between the first one's reading and its commit."""
        hub.create(REPO)
        (folder / "recipe.yaml").write_text("seed: 1\n")

        def other():
            (folder / "recipe.yaml").write_text("seed: 2\n")
            push_folder(folder, REPO, message="other")
            (folder / "recipe.yaml").write_text("seed: 1\n")

        hub.before("POST", "/commit/", other)
        push_folder(folder, REPO, message="first")
        assert_is(hub, folder)
        assert hub.commits(REPO) == ["first", "other", "initial commit"]

    def test_bad_yaml_in_the_card_there(self, hub, folder):
        hub.create(REPO, {CARD: b"---\ntags: [a\n---\nWords.\n"})
        before = hub.head(REPO)
        with pytest.raises(CardError, match="got metadata of the card of org/mbv2-w4a4-osc that are no YAML"):
            push_folder(folder, REPO)
        assert hub.head(REPO) == before


class TestWhoMay:
    def test_bad_token(self, hub, folder):
        with pytest.raises(HubError, match="the Hub does not accept the token"):
            push_folder(folder, REPO, token="hf_bad")

    def test_no_token(self, hub, folder, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(
            HubError, match=r"got no token, expected one: run `hf auth login`|does not accept the token"
        ):
            push_folder(folder, REPO)

    @pytest.mark.parametrize("exists", [True, False])
    @pytest.mark.parametrize("token", ["hf_read", "hf_fine_read", "hf_other"])
    def test_token_that_may_not_write(self, hub, folder, token, exists):
        if exists:
            hub.create(REPO)
        with pytest.raises(
            HubError, match=r"the token may not do this|token that may only read|may not make one for org"
        ):
            check_push(REPO, token=token)
        assert {method for method, *_ in hub.requests} <= {"GET"}

    def test_fine_grained_token_that_may_write(self, hub, folder):
        push_folder(folder, REPO, token="hf_fine")
        assert_is(hub, folder)

    def test_private_repository_of_others_is_as_if_missing(self, hub, folder):
        hub.create("bob/secret", private=True)
        with pytest.raises(HubError, match="there is no such repository, or it is private"):
            check_push("bob/secret")

    def test_bad_name(self, hub, folder):
        with pytest.raises(HubError, match="expected a name such as org/model"):
            push_folder(folder, "org/a b")

    def test_private_is_not_taken_for_done(self, hub, folder):
        hub.create(REPO)
        with pytest.raises(HubError, match="which exists and is public; expected the same"):
            push_folder(folder, REPO, private=True)
        assert not hub.files(REPO)

    def test_offline(self, hub, folder, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            push_folder(folder, REPO)

    def test_token_is_in_no_message(self, hub, folder):
        with pytest.raises(HubError) as raised:
            push_folder(folder, REPO, token="hf_secretsecret")
        assert "hf_secretsecret" not in str(raised.value)


class TestModel:
    def test_pushes_itself_with_what_it_was_loaded_beside(self, hub, folder, pixel_values):
        model = AutoModelForImageClassification.from_pretrained(folder)
        model.push_to_hub(REPO)
        assert_is(hub, folder)
        with torch.no_grad():
            loaded = AutoModelForImageClassification.from_pretrained(REPO)
            assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)

    def test_again_makes_no_commit_although_it_is_saved_anew(self, hub, folder):
        model = AutoModelForImageClassification.from_pretrained(folder)
        for _ in range(4):
            model.push_to_hub(REPO)
        assert len(hub.commits(REPO)) == 2

    def test_without_a_card_needs_a_licence_and_claims_nothing(self, hub, make_prepared_wrapper):
        packed = pack(make_prepared_wrapper())
        with pytest.raises(CardError, match="got no licence"):
            packed.push_to_hub(REPO)
        packed.push_to_hub(REPO, license="mit")
        card = hub.files(REPO)[CARD].decode()
        assert "was not measured" in card
        assert ModelCard(card).data.eval_results is None

    def test_card_of_the_float_model_is_not_taken_for_its_own(self, hub, make_wrapper, tmp_path, pixel_values):
        make_wrapper().save_pretrained(tmp_path)
        (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# Float model, 99.9%\n")
        model = AutoModelForImageClassification.from_pretrained(tmp_path)
        calibrate(prepare_qat(model, OscQATConfig()), [{"pixel_values": pixel_values}])
        pack(model).push_to_hub(REPO, license="mit", commit_message="Packed")
        assert "99.9%" not in hub.files(REPO)[CARD].decode()
        assert hub.commits(REPO)[0] == "Packed"

    def test_weights_that_were_changed_since_leave_their_card_behind(self, hub, folder):
        model = AutoModelForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            model.timm_model.bn1.weight.mul_(2)
        with pytest.raises(CardError, match="got no licence"):
            model.push_to_hub(REPO)
        model.push_to_hub(REPO, license="mit")
        assert "was not measured" in hub.files(REPO)[CARD].decode()

    def test_other_weights_saved_beside_old_results_are_not_pushed_with_them(self, hub, folder):
        model = AutoModelForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            model.timm_model.bn1.weight.mul_(2)
        model.save_pretrained(folder)
        with pytest.raises(CardError, match=r"which are not the weights that results.json beside them is about"):
            push_folder(folder, REPO)

    def test_from_a_folder_that_is_gone_needs_a_licence_again(self, hub, folder, tmp_path, caplog):
        shutil.copytree(folder, tmp_path / "gone")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(CardError, match="got no licence"):
            model.push_to_hub(REPO)
        assert "is not there any more" in caplog.text
        model.push_to_hub(REPO, license="mit")
        assert "was not measured" in hub.files(REPO)[CARD].decode()

    def test_without_its_head_is_refused(self, hub, folder):
        with pytest.raises(ValueError, match="got a model without its head"):
            AutoModel.from_pretrained(folder).push_to_hub(REPO, license="mit")

    def test_loaded_by_the_code_beside_it_has_the_same_card(self, hub, folder, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setitem(AUTO_QUANTIZER_MAPPING, "oscqat", modeling_oscqat.PackedQuantizer)
            patch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "oscqat", modeling_oscqat.PackedConfig)
            model = modeling_oscqat.OscQATTimmForImageClassification.from_pretrained(folder)
        assert not packed_layers(model)
        model.push_to_hub(REPO)
        assert_is(hub, folder)
        for name in (CARD, "results.json"):
            (folder / name).unlink()
        model.push_to_hub("org/plain", license="mit")
        package = AutoModelForImageClassification.from_pretrained(folder)
        package.push_to_hub("org/other", license="mit")
        plain, other = (
            hub.files(name)[CARD].decode().partition("<!-- made by")[0] for name in ("org/plain", "org/other")
        )
        assert plain.replace("plain", "other") == other
        assert "times smaller" in plain

    def test_loaded_from_one_repository_goes_to_another_with_its_card(self, hub, folder):
        push_folder(folder, REPO)
        AutoModelForImageClassification.from_pretrained(REPO).push_to_hub("org/other")
        files = hub.files("org/other")
        assert files.keys() == FILES
        assert 'path = "org/other"' in files[CARD].decode()

    def test_while_saving(self, hub, folder, tmp_path):
        model = AutoModelForImageClassification.from_pretrained(folder)
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPO, commit_message="Saved")
        assert hub.commits(REPO)[0] == "Saved"
        assert HfApi().file_exists(REPO, "model.safetensors")
