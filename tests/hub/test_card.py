"""The model card: metadata, numbers, nothing left open; and what becomes of what people write into it."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_oscqat.hub.card import (
    CARD,
    CardError,
    card_of,
    eval_results_file,
    merge_eval_results,
    read_metadata,
    render_card,
    update_card,
    write_card,
)

MEASURED = {"accuracy": 0.9611, "top5_accuracy": 1.0, "num_images": 360, "images_per_second": 800.0}
PREPARATION = {
    "source": "hub", "input_size": [3, 48, 48], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
RESULTS = {
    "model": {
        "name": "mbv2-w4a4",
        "path": "org/mbv2-w4a4",
        "architecture": "mobilenetv2_100",
        "origin": "mobilenetv2_100, with pretrained weights",
        "base_model": "timm/mobilenetv2_100.ra_in1k",
        "license": "apache-2.0",
        "license_inherited": True,
    },
    "scheme": {
        "name": "W4A4",
        "in_words": "4-bit weights and 4-bit inputs of layers",
        "weights": "4 bits, symmetric, per tensor",
        "activations": "4 bits, symmetric, per tensor",
        "first_last": "8 bits; the image stays float",
        "remedies": "freezing (threshold=0.1)",
        "batchnorm": "statistics re-estimated on 50 training batches",
    },
    "data": {
        "name": "org/pets",
        "dataset_id": "org/pets",
        "config": None,
        "revision": "0123456789abcdef",
        "split": "validation",
        "num_train": 1437,
        "skipped_images": 0,
        "preprocessing": "48 x 48 pixels",
        "evaluation": PREPARATION,
    },
    "accuracy": {
        "float": {**MEASURED, "accuracy": 0.9722},
        "rounded": {**MEASURED, "accuracy": 0.3},
        "packed": MEASURED,
    },
    "bytes": {"float": 2_876_552, "packed": 572_972},
    "oscillation": {"start": 0.19, "peak": 10.6, "end": 2.56, "frozen": 1.52, "distances": True},
    "layers": [{"name": "conv_stem", "shape": [16, 3, 3, 3], "weight_bits": 8, "input_bits": None}],
    "run": {
        "command": "training/run_qat.py training/recipes/quickstart.yaml",
        "recipe": True,
        "epochs": 10,
        "steps": 230,
        "processes": 1,
        "device": "CPU, 2 threads",
        "seconds": 120.4,
        "versions": "torch 2.15.0",
        "commit": "89abcdef",
        "date": "2026-11-23",
    },
}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


def metadata_of(card):
    return read_metadata(card, "the card")


class TestMetadata:
    def test_names_base_model_relation_and_data(self, results):
        data = metadata_of(render_card(results))
        assert data.pop("model-index")
        assert data == {
            "library_name": "transformers",
            "pipeline_tag": "image-classification",
            "license": "apache-2.0",
            "base_model": "timm/mobilenetv2_100.ra_in1k",
            "base_model_relation": "quantized",
            "datasets": ["org/pets"],
            "metrics": ["accuracy"],
            "tags": ["timm", "oscqat", "quantization-aware-training", "w4a4"],
        }

    def test_results_are_read_back_by_the_client(self, results):
        top1, top5 = ModelCard(render_card(results)).data.eval_results
        assert (top1.metric_type, top1.metric_value, top5.metric_value) == ("accuracy", 0.9611, 1.0)
        assert (top1.dataset_type, top1.dataset_split, top1.dataset_revision) == (
            "org/pets",
            "validation",
            "0123456789abcdef",
        )
        assert top1.dataset_args == {**PREPARATION, "num_images": 360}

    def test_a_model_without_base_claims_no_relation(self, results):
        results["model"]["base_model"] = None
        assert not metadata_of(render_card(results)).keys() & {"base_model", "base_model_relation"}

    def test_without_a_licence_there_is_no_card(self, results):
        results["model"]["license"] = None
        with pytest.raises(CardError, match=r"got no licence for mbv2-w4a4: .* pass --model_license"):
            render_card(results)

    def test_licence_that_the_hub_does_not_list_is_named(self, results):
        results["model"]["license"] = "cvnets-license"
        data = metadata_of(render_card(results))
        assert (data["license"], data["license_name"]) == ("other", "cvnets-license")

    def test_mistyped_licence_is_pointed_out(self, results, caplog):
        results["model"]["license"] = "apache 2.0"
        assert metadata_of(render_card(results))["license"] == "other"
        assert "Did you mean 'apache-2.0'?" in caplog.text

    def test_data_that_cannot_be_found_again_back_no_claim(self, results):
        results["data"]["evaluation"] = None
        card = render_card(results)
        assert "model-index" not in metadata_of(card)
        assert "oscqat evaluate" not in card

    def test_eval_results_name_the_dataset_of_the_hub(self, results):
        path, text = eval_results_file(results)
        assert path == ".eval_results/org--pets.yaml"
        (entry,) = yaml.safe_load(text)
        assert entry["dataset"] == {"id": "org/pets", "task_id": "default", "revision": "0123456789abcdef"}
        assert (entry["value"], entry["date"]) == (96.11, "2026-11-23")
        results["data"]["dataset_id"] = None
        assert eval_results_file(results) is None


class TestEvalResults:
    PERSON = yaml.safe_dump([{"dataset": {"id": "org/pets", "task_id": "other"}, "value": 3}])

    def test_entries_of_people_stay_beside_ours(self, results):
        _, ours = eval_results_file(results)
        merged = yaml.safe_load(merge_eval_results(self.PERSON, ours))
        assert [entry["dataset"]["task_id"] for entry in merged] == ["other", "default"]

    def test_same_value_changes_nothing(self, results):
        _, ours = eval_results_file(results)
        results["run"]["date"] = "2027-01-01"
        assert merge_eval_results(ours, eval_results_file(results)[1]) == ours

    def test_other_value_takes_the_place_of_the_older(self, results):
        _, ours = eval_results_file(results)
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.5}
        (entry,) = yaml.safe_load(merge_eval_results(ours, eval_results_file(results)[1]))
        assert entry["value"] == 50

    def test_ours_go_with_the_weights_they_were_about(self, results):
        _, ours = eval_results_file(results)
        assert merge_eval_results(ours, "") == ""
        assert yaml.safe_load(merge_eval_results(merge_eval_results(self.PERSON, ours), "")) == yaml.safe_load(
            self.PERSON
        )
        assert merge_eval_results(self.PERSON, "") == self.PERSON

    @pytest.mark.parametrize("text", ["[a", "a: b", "[3]"])
    def test_file_of_another_form_is_an_error(self, text):
        with pytest.raises(CardError, match="mend or remove it"):
            merge_eval_results(text, "")


class TestBody:
    def test_numbers_are_those_of_the_results(self, results):
        text = render_card(results)
        for number in ("97.22%", "30.00%", "**96.11%**", "2,876,552", "572,972", "5.0 times smaller", "10.60%"):
            assert number in text
        assert "loses 67.22 points of top-1; training on the grid wins back 66.11 of them" in text
        assert "| `conv_stem` | 16 x 3 x 3 x 3 | 8 | float |" in text

    def test_better_than_float_is_said_to_be_all(self, results):
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.99}
        assert "wins back all of them" in render_card(results)

    def test_without_baselines_their_rows_are_left_out(self, results):
        results["accuracy"] |= {"float": None, "rounded": None}
        text = render_card(results)
        assert "float32 |" not in text
        assert "without training" not in text
        assert "wins back" not in text

    def test_without_tracking_there_are_no_pictures(self, results):
        assert "oscillation.png" not in render_card({**results, "oscillation": None})

    def test_a_missing_number_is_an_error_and_not_a_blank(self, results, folder):
        del results["bytes"]["packed"]
        (folder / "results.json").write_text(json.dumps(results))
        with pytest.raises(CardError, match=r"from which no card can be made .*has no attribute 'packed'"):
            card_of(folder)

    def test_says_that_inference_is_simulated(self, results):
        assert "**Inference is simulated low-bit arithmetic**" in render_card(results)


def test_every_python_block_runs_as_pasted(folder, tmp_path):
    """In a process that knows nothing, in the folder that the run was started in."""
    card = folder / CARD
    path = folder.relative_to(tmp_path).as_posix()
    blocks = re.findall(
        r"```python\n(.*?)```",
        card.read_text().replace(str(json.loads((folder / "results.json").read_text())["model"]["path"]), path),
        re.DOTALL,
    )
    assert len(blocks) == 2
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert path in blocks[0]


class TestEdits:
    def test_unedited_card_is_replaced(self, results):
        old = render_card(results)
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.5}
        results["scheme"]["name"] = "W3A3"
        new = render_card(results)
        assert update_card(old, new) == new

    def test_again_nothing_changes(self, results):
        card = render_card(results)
        assert update_card(card, card) == card

    def test_edited_section_is_kept_and_still_known_as_edited(self, results, caplog):
        old = render_card(results).replace(
            "Whatever the float model does badly", "Not for cats. Whatever it does badly"
        )
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.5}
        for _ in range(3):
            old = update_card(old, render_card(results), "the card of org/x")
        assert "Not for cats." in old
        assert "**50.00%**" in old
        assert "kept of the card of org/x, because people have edited it: Limits and licence" in caplog.text

    def test_added_section_stays_where_it_was(self, results):
        old = render_card(results).replace("## Scheme", "## Thanks\n\nTo all.\n\n## Scheme")
        merged = update_card(old, render_card(results))
        assert merged.index("## How to use") < merged.index("To all.") < merged.index("## Scheme")

    def test_removed_section_stays_away(self, results):
        card = render_card(results)
        start = card.index("## Citation")
        old = card[:start] + card[card.index("<!-- made by") :]
        assert "## Citation" not in update_card(old, render_card(results))

    def test_section_that_is_no_longer_made_goes_unless_edited(self, results):
        old = render_card(results)
        new = render_card({**results, "oscillation": None})
        assert "## Oscillation" not in update_card(old, new)
        edited = old.replace("Some low-bit weights jump", "In plain words: some weights jump")
        assert "In plain words" in update_card(edited, new)

    def test_introduction_can_be_edited(self, results):
        old = render_card(results).replace("# mbv2-w4a4, W4A4", "# Our pet classifier")
        assert "# Our pet classifier" in update_card(old, render_card(results))

    def test_card_of_a_person_is_kept_and_added_to(self, results):
        merged = update_card("---\nlicense: mit\ntags: [pets]\n---\n# Mine\n\nWords.\n", render_card(results))
        data = metadata_of(merged)
        assert data["license"] == "mit"
        assert {"pets", "oscqat"} <= set(data["tags"])
        assert "# Mine\n\nWords." in merged
        assert "## Results" in merged

    def test_card_without_text_is_replaced(self, results):
        merged = update_card("---\nlicense: mit\n---\n", render_card(results))
        assert "# mbv2-w4a4, W4A4" in merged

    def test_metadata_of_people_are_kept_and_facts_are_not(self, results):
        old = render_card(results).replace("library_name: transformers", "library_name: keras\nlanguage: en")
        old = old.replace("- timm\n", "- timm\n- pets\n")
        results["scheme"]["name"] = "W3A3"
        data = metadata_of(update_card(old, render_card(results)))
        assert (data["library_name"], data["language"]) == ("transformers", "en")
        assert {"pets", "w3a3"} <= set(data["tags"])

    def test_our_edit_wins_where_theirs_is_what_we_wrote(self, results):
        card = render_card(results)
        first, second = (
            card.replace("tested on anything else", word) for word in ("tested on dogs", "tested on cats")
        )
        there = update_card(card, first)
        assert "dogs" in there
        merged = update_card(there, second)
        assert "cats" in merged
        assert "dogs" not in merged

    def test_their_edit_stays_where_both_have_edited(self, results, caplog):
        card = render_card(results)
        ours = card.replace("tested on anything else", "tested on dogs")
        theirs = update_card(card, ours).replace("tested on dogs", "tested on cats")
        assert "cats" in update_card(theirs, ours)
        assert "because people have edited it: Limits and licence" in caplog.text

    def test_what_is_added_behind_the_comment_is_kept_and_the_rest_is_not_stale(self, results):
        old = render_card(results) + "\n## Thanks\n\nTo all.\n"
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.5}
        for _ in range(2):
            old = update_card(old, render_card(results))
            assert "## Thanks\n\nTo all." in old
            assert "**50.00%**" in old
            assert old.count("made by oscqat") == 1

    def test_added_tag_does_not_keep_the_others(self, results):
        old = render_card(results).replace("- w4a4", "- w4a4\n- pets")
        results["scheme"]["name"] = "W3A3"
        assert metadata_of(update_card(old, render_card(results)))["tags"][-2:] == ["w3a3", "pets"]

    def test_removed_tag_and_key_stay_away(self, results):
        old = render_card(results).replace("- timm\n", "").replace("metrics:\n- accuracy\n", "")
        data = metadata_of(update_card(old, render_card(results)))
        assert "timm" not in data["tags"]
        assert "metrics" not in data

    def test_licence_and_its_name_go_together(self, results):
        results["model"]["license"] = "cvnets-license"
        old = render_card(results).replace("license: other\nlicense_name: cvnets-license", "license: mit")
        data = metadata_of(update_card(old, render_card(results)))
        assert data["license"] == "mit"
        assert "license_name" not in data

    @pytest.mark.parametrize("index", ["foo", "[foo]", "[{results: [3]}]", "[{results: [{metrics: [3]}]}]"])
    def test_results_of_another_form_are_an_error(self, results, index):
        with pytest.raises(CardError, match="got a model-index in the metadata of the card there"):
            update_card(f"---\nmodel-index: {index}\n---\n", render_card(results), "the card there")

    def test_results_of_others_stay_and_ours_are_replaced_whatever_their_revision(self, results):
        old = render_card(results)
        data = metadata_of(old)
        other = copy.deepcopy(data["model-index"][0]["results"][0])
        other["dataset"]["type"] = other["dataset"]["name"] = "org/other"
        data["model-index"][0]["results"].append(other)
        old = f"---\n{yaml.safe_dump(data)}---" + old.split("\n---", 1)[1]
        results["data"]["revision"] = "fedcba"
        merged = update_card(old, render_card(results))
        found = {
            (r["dataset"]["type"], r["dataset"]["revision"]) for r in metadata_of(merged)["model-index"][0]["results"]
        }
        assert found == {("org/pets", "fedcba"), ("org/other", "0123456789abcdef")}

    def test_results_that_are_no_longer_claimed_go(self, results):
        old = render_card(results)
        results["data"] |= {"name": "org/other", "dataset_id": "org/other"}
        (entry,) = metadata_of(update_card(old, render_card(results)))["model-index"][0]["results"]
        assert entry["dataset"]["type"] == "org/other"

    def test_headings_in_code_are_no_headings(self, results):
        old = render_card(results).replace("## Scheme", "## Notes\n\n```\n## Results\n```\n\n## Scheme")
        assert update_card(old, render_card(results)).count("## Results") == 2

    @pytest.mark.parametrize("code", ["```pip install x```", "````\n```\n## Results\n````", "~~~\n```\n~~~"])
    def test_code_ends_where_it_does_in_markdown(self, results, code):
        old = render_card(results).replace("## Scheme", f"{code}\n\n## Scheme", 1)
        results["accuracy"]["packed"]["accuracy"] = 0.777
        new = update_card(old, render_card(results))
        assert code in new
        assert "77.70%" in new
        assert "## Scheme" in new

    def test_broken_mark_takes_all_for_edited(self, results, caplog):
        old = render_card(results)
        broken = re.sub(r"made by oscqat \{", 'made by oscqat {"x":1,', old)
        results["accuracy"]["packed"] = {**MEASURED, "accuracy": 0.5}
        assert "**96.11%**" in update_card(broken, render_card(results))
        assert "all of it is taken for edited" in caplog.text

    @pytest.mark.parametrize("front", ["tags: [a", "- a\n- b", "just words"])
    def test_bad_yaml_is_an_error_that_says_where(self, results, front):
        with pytest.raises(CardError, match="got metadata of the card there that are"):
            update_card(f"---\n{front}\n---\n", render_card(results), "the card there")


class TestFolder:
    def test_card_is_rendered_again_with_what_was_edited(self, folder):
        card = folder / CARD
        card.write_text(card.read_text().replace("## Citation", "## Thanks\n\nTo all.\n\n## Citation"))
        results = json.loads((folder / "results.json").read_text())
        results["accuracy"]["packed"]["accuracy"] = 0.5
        (folder / "results.json").write_text(json.dumps(results))
        write_card(folder)
        assert "To all." in card.read_text()
        assert "**50.00%**" in card.read_text()

    def test_folder_without_results_keeps_its_card(self, folder):
        (folder / "results.json").unlink()
        assert card_of(folder) == (folder / CARD).read_text()
        (folder / CARD).unlink()
        with pytest.raises(CardError, match="expected a packed checkpoint with its card"):
            card_of(folder)

    @pytest.mark.parametrize("content", ["{", "[]", "{}"])
    def test_results_that_cannot_be_read(self, folder, content):
        (folder / "results.json").write_text(content)
        with pytest.raises(CardError, match=r"expected what run_qat\.py wrote"):
            card_of(folder)
