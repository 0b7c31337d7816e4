"""The table of accuracies on small images, whole but tiny: it is filled in parts, and says what is missing."""

import csv
import dataclasses
import json
import logging
import math
import re
import shutil
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from hf_oscqat import reestimate_batchnorm
from hf_oscqat.integration.data import DataArguments
from hf_oscqat.report.page import write_report
from hf_oscqat.studies import cifar10, small_images
from hf_oscqat.studies.base import show, write
from hf_oscqat.studies.cifar10 import BUDGETS, METHODS, STUDY, Cell, Cifar10Settings, Table, Trial, cells, run
from hf_oscqat.studies.small_images import PADDING, Images, Normaliser, load_small_images, training_batches

DOCS = Path(__file__).parents[2] / "docs"

SMOKE = {"dataset_name": "digits", "budget": "smoke", "device": "cpu", "max_eval_samples": 40}


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A folder with the cells of two methods and one seed, and the result of the run that filled it."""
    folder = tmp_path_factory.mktemp("cifar10")
    settings = Cifar10Settings(**SMOKE, output_dir=str(folder), methods=["lsq", "freezing"], seeds=[0])
    return folder, run(settings)


def test_half_a_table_names_what_is_missing(half_done):
    _, result = half_done
    missing = {row["method"]: row["missing_seeds"] for row in result.rows}
    assert missing == {"lsq": "1", "dampening": "0, 1", "freezing": "1"}
    assert "2 of 6 cells are there, 4 are missing." in result.finding
    assert "test_efficientnet in float" in result.finding


def test_the_rest_is_filled_without_training_anything_twice(half_done, caplog, tmp_path):
    folder, _ = half_done
    before = {path: path.read_bytes() for path in folder.glob("*/*.json")}
    caplog.set_level(logging.INFO, logger="hf_oscqat.studies.cifar10")
    settings = Cifar10Settings(**SMOKE, output_dir=str(folder))
    result = run(settings)
    assert not any(row["missing_seeds"] for row in result.rows)
    assert result.finding.startswith("6 of 6 cells are there.")
    assert all(path.read_bytes() == content for path, content in before.items())
    trained = [message for message in caplog.messages if message.startswith("test_efficientnet-")]
    # Two trials of the method that was missing, and the four cells.
    assert len(trained) == 2 + 4
    files = write(STUDY, settings, result)
    show(STUDY, result, files)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        done = [json.loads(path.read_text()) for path in folder.glob(f"cells/*-{row['method']}-*.json")]
        by_seed = [fmean([cell["after"], *cell["after_other_draws"]]) for cell in done]
        assert row["after"] == f"{fmean(by_seed):.2f} ± {stdev(by_seed):.2f}"
    caplog.clear()
    assert run(Cifar10Settings(output_dir=str(folder), budget="smoke", table_only=True)).rows == result.rows
    assert not caplog.messages


def test_cells_that_were_measured_otherwise_make_no_row(half_done, tmp_path):
    """Nothing but --again makes cells of a row that an older version has measured comparable."""
    folder = shutil.copytree(half_done[0], tmp_path / "copy")
    file = folder / "cells" / "test_efficientnet-W3A3-freezing-0.json"
    cell = json.loads(file.read_text())
    file.with_name(file.name.replace("-0.json", "-1.json")).write_text(json.dumps(cell | {"seed": 1}))
    del cell["after_other_draws"]
    file.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match=r"W3A3 freezing with re-estimations of 1, 5, expected one for all.*--again"):
        run(Cifar10Settings(output_dir=str(folder), budget="smoke", table_only=True))


def test_recorded_cells_have_a_report_and_are_trained_no_otherwise(half_done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(half_done[0], folder)
    cell = Cell("test_efficientnet", "W3A3", "freezing", 0)
    before = Table(Cifar10Settings(**SMOKE, output_dir=str(folder))).results(cell)
    options = {**SMOKE, "methods": ["lsq", "freezing"], "seeds": [0], "again": True, "record": True}
    run(Cifar10Settings(**options, output_dir=str(folder)))
    after = Table(Cifar10Settings(**SMOKE, output_dir=str(folder))).results(cell)
    assert all(before[key] == after[key] for key in ("before", "after", "history", "frozen_percent"))
    recordings = [folder / "recordings" / f"test_efficientnet-W3A3-{method}-0" for method in ("lsq", "freezing")]
    assert sorted((folder / "recordings").iterdir()) == sorted(recordings), "of the cells and not of the trials"
    text = write_report(recordings).read_text(encoding="utf-8")
    assert "freezing, 0.06 at the end" in text
    assert f"{fmean([after['after'], *after['after_other_draws']]):.2f}%" in text


def test_picture_without_the_first_method_has_its_legend_too(half_done):
    result = Table(Cifar10Settings(**SMOKE, output_dir=str(half_done[0]))).results(
        Cell("test_efficientnet", "W3A3", "freezing", 0)
    )
    found = {("test_efficientnet", "W3A3", method): [] for method in METHODS}
    figure = cifar10._draw({**found, ("test_efficientnet", "W3A3", "freezing"): [result, result]})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["before", "after"]


def test_the_same_cell_again_measures_the_same(half_done):
    folder, _ = half_done
    file = folder / "cells" / "test_efficientnet-W3A3-freezing-0.json"
    first = json.loads(file.read_text())
    run(Cifar10Settings(**SMOKE, output_dir=str(folder), methods=["freezing"], seeds=[0], again=True))
    second = json.loads(file.read_text())
    assert first.pop("seconds") != second.pop("seconds")
    assert first.pop("date") <= second.pop("date")
    assert first == second
    assert first["steps"] == 2 * (64 // 16)
    assert first["images"] == 40
    assert len(first["after_other_draws"]) == 4
    assert all(0 < after <= 100 for after in first["after_other_draws"])
    last = first["history"][-1]
    assert all(
        last[key] == first[key] > 0 for key in ("frozen_percent", "oscillating_percent", "scale_caused_percent")
    )


def test_accuracy_is_the_share_of_images_whose_class_has_the_largest_logit():
    class Answers(torch.nn.Module):
        def forward(self, pixels):
            return torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2], [2, 1, 3]])[pixels.flatten().long()]

    images = Images(torch.tensor([0, 1, 2, 3, 1]).view(5, 1, 1, 1), torch.tensor([0, 0, 1, 2, 2]))
    assert small_images.accuracy(Answers(), images, lambda pixels: pixels, batch_size=2) == pytest.approx(80)


def test_trials_see_held_out_images_and_cells_the_best_trial_and_test_images(half_done, monkeypatch):
    table = Table(Cifar10Settings(**SMOKE, output_dir=str(half_done[0]), record=True))
    cell = Cell("test_efficientnet", "W3A3", "freezing", 1)
    asked = []
    monkeypatch.setattr(table, "measure", lambda *args: asked.append(args) or {})
    table._try(("test_efficientnet", "W3A3", "freezing"), Trial(0.3, 0.1))
    table._train(cell)
    (tried, trial, epochs, images), (trained, best, all_epochs, tested, draws, recorded) = asked
    assert (tried.seed, trial, epochs) == (0, Trial(0.3, 0.1), table.budget.tuning_epochs)
    assert images is table.images.held_out
    trials = {Trial(t["learning_rate"], t["strength"]): t["after"] for t in table.trials(cell)}
    assert trials[best] == max(trials.values())
    assert (trained, all_epochs, draws, recorded) == (cell, table.budget.epochs, cifar10.DRAWS, True)
    assert tested is table.images.test


def test_before_and_after_are_those_of_reestimation(half_done):
    table = Table(Cifar10Settings(**SMOKE, output_dir=str(half_done[0])))
    cell, trial = Cell("test_efficientnet", "W3A3", "lsq", 0), Trial(0.1)
    measured = table.measure(cell, trial, 1, table.images.test, draws=2)
    model, _ = table.train(cell, trial, 1)
    found = [small_images.accuracy(model, table.images.test, table.images.normalise)]
    for draw in range(2):
        reestimate_batchnorm(model, table.some_batches(table.budget.reestimation_batches, seed=draw))
        found.append(small_images.accuracy(model, table.images.test, table.images.normalise))
    assert [measured["before"], measured["after"], *measured["after_other_draws"]] == found


@pytest.mark.parametrize("schedule", ["constant", "as_weights"])
def test_scales_follow_the_weights_if_asked_to(half_done, monkeypatch, schedule):
    table = Table(Cifar10Settings(**SMOKE, output_dir=str(half_done[0]), scale_lr_scheduler_type=schedule))
    optimizers, rates = [], []

    def create_optimizer(*args, **kwargs):
        optimizers.append(small_images_optimizer(*args, **kwargs))
        return optimizers[-1]

    def take_tick(*args):
        rates.append([group["lr"] for group in optimizers[-1].param_groups])
        return small_images_tick(*args)

    small_images_optimizer, small_images_tick = small_images.create_optimizer, small_images.take_tick
    monkeypatch.setattr(small_images, "create_optimizer", create_optimizer)
    monkeypatch.setattr(small_images, "take_tick", take_tick)
    cell = Cell("test_efficientnet", "W3A3", "lsq", 0)
    table.measure(cell, Trial(0.1), 1, table.images.held_out)
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    assert [weights for weights, _ in rates] == pytest.approx([0.1 * f for f in cosine])
    assert [s for _, s in rates] == pytest.approx([1e-5 * f if schedule == "as_weights" else 1e-5 for f in cosine])


def test_one_folder_has_one_schedule_of_the_scales(half_done):
    settings = Cifar10Settings(
        output_dir=str(half_done[0]), budget="smoke", table_only=True, scale_lr_scheduler_type="as_weights"
    )
    with pytest.raises(
        ValueError, match="made with scale_lr_scheduler_type='constant' and not 'as_weights', expected"
    ):
        run(settings)


@pytest.mark.long
def test_compiled_training_is_that_of_eager(half_done):
    cell = Cell("test_efficientnet", "W3A3", "freezing", 0)
    found = []
    for compiled in (False, True):
        table = Table(Cifar10Settings(**SMOKE, output_dir=str(half_done[0]), compile=compiled))
        found.append(table.measure(cell, Trial(0.01, 0.06), 3, table.images.held_out))
    eager, compiled = found
    assert (eager["compile"], compiled["compile"]) == (False, True)
    assert compiled["history"][0]["loss"] == pytest.approx(eager["history"][0]["loss"], rel=1e-3)
    assert compiled["history"][-1]["loss"] == pytest.approx(eager["history"][-1]["loss"], rel=0.05)
    assert compiled["frozen_percent"] == pytest.approx(eager["frozen_percent"], rel=0.2)
    assert eager["frozen_percent"] > 0


def test_with_compile_every_training_is_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(small_images, "_compiled", lambda model: compiled.append(model) or model)
    options = {**SMOKE, "output_dir": str(tmp_path), "methods": ["lsq"], "seeds": [0]}
    run(Cifar10Settings(**options, compile=True))
    assert len(compiled) == 1 + len(BUDGETS["smoke"].trials["lsq"]) + 1
    run(Cifar10Settings(**options, again=True))
    assert len(compiled) == 4


def test_the_best_trial_is_taken(half_done, monkeypatch):
    folder, _ = half_done
    table = Table(Cifar10Settings(**SMOKE, output_dir=str(folder)))
    cell = Cell("test_efficientnet", "W3A3", "freezing", 0)
    trials = table.trials(cell)
    assert [Trial(t["learning_rate"], t["strength"]) for t in trials] == list(BUDGETS["smoke"].trials["freezing"])
    monkeypatch.setattr(table, "trials", lambda cell: [trials[0] | {"after": 1.0}, trials[1] | {"after": 2.0}])
    assert table.best(cell) == Trial(0.1, 0.06)


def test_a_training_that_diverges_is_the_worst_trial(half_done, monkeypatch):
    folder, _ = half_done
    table = Table(Cifar10Settings(**SMOKE, output_dir=str(folder)))

    def diverge(*args, **kwargs):
        raise FloatingPointError("got a loss of nan")

    monkeypatch.setattr(cifar10, "train_on_grid", diverge)
    measured = table._try(("test_efficientnet", "W3A3", "lsq"), Trial(0.1))
    assert measured["diverged"]
    assert measured["after"] == 0


def test_a_cell_that_diverges_does_not_keep_the_others_from_being_trained(half_done, monkeypatch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(half_done[0], folder)
    train_on_grid = cifar10.train_on_grid

    def diverge(model, config, *args, **kwargs):
        if config.freezing is not None:
            raise FloatingPointError("got a loss of nan")
        return train_on_grid(model, config, *args, **kwargs)

    for cell in folder.glob("cells/*-1.json"):
        cell.unlink()
    monkeypatch.setattr(cifar10, "train_on_grid", diverge)
    options = {**SMOKE, "output_dir": str(folder), "methods": ["lsq", "freezing"], "seeds": [1]}
    with pytest.raises(ValueError, match="training of test_efficientnet-W3A3-freezing-1 diverged: got a loss of nan"):
        run(Cifar10Settings(**options))
    assert (folder / "cells" / "test_efficientnet-W3A3-lsq-1.json").is_file()


def test_a_float_training_that_was_stopped_goes_on_where_it_was(half_done, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="hf_oscqat.studies.small_images")
    options = {**SMOKE, "output_dir": str(tmp_path)}
    taken = []

    def stopped_before_the_sixth(*args):
        for batch in training_batches(*args):
            if len(taken) == 5:
                raise KeyboardInterrupt
            taken.append(batch)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(cifar10, "training_batches", stopped_before_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            run(Cifar10Settings(**options))
    (kept,) = (tmp_path / "float").iterdir()
    with monkeypatch.context() as patched:
        faster = dataclasses.replace(BUDGETS["smoke"], float_learning_rate=0.07)
        patched.setitem(BUDGETS, "smoke", faster)
        with pytest.raises(ValueError, match=r"made with float_learning_rate=0.05 and not 0.07"):
            run(Cifar10Settings(**options))
    assert kept.is_file()
    with pytest.raises(ValueError, match="a training with other steps and labels that was stopped, expected"):
        run(Cifar10Settings(**options, max_train_samples=80))
    damaged = kept.with_name("copy")
    kept.rename(damaged)
    kept.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"stopped, which cannot be read: .*: delete it"):
        run(Cifar10Settings(**options))
    damaged.rename(kept)
    caplog.clear()
    Table(Cifar10Settings(**options))._float_model("test_efficientnet")
    assert caplog.messages[0] == "going on after float step 5 of 8"
    assert [message.partition(":")[0] for message in caplog.messages[1:]] == [
        f"float step {n} of 8" for n in (6, 7, 8)
    ]
    assert not kept.exists()
    once = half_done[0] / "float" / "test_efficientnet.safetensors"
    assert (tmp_path / "float" / once.name).read_bytes() == once.read_bytes()


def test_nothing_is_trained_again_under_another_protocol_and_nothing_is_lost(half_done):
    cell = half_done[0] / "cells" / "test_efficientnet-W3A3-lsq-0.json"
    content = cell.read_bytes()
    options = {**SMOKE, "output_dir": str(half_done[0]), "again": True, "methods": ["lsq"], "seeds": [0]}
    with pytest.raises(ValueError, match="made with scale_lr_scheduler_type='constant' and not 'as_weights'"):
        run(Cifar10Settings(**options, scale_lr_scheduler_type="as_weights"))
    assert cell.read_bytes() == content


def test_a_file_from_before_an_option_was_trained_with_its_default(half_done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(half_done[0], folder)
    for file in folder.glob("*/*.json"):
        content = json.loads(file.read_text())
        for key in ("scale_lr_scheduler_type", "activation_scheme"):
            content["protocol"].pop(key, None)
        file.write_text(json.dumps(content))
    options = {"output_dir": str(folder), "budget": "smoke", "table_only": True}
    assert run(Cifar10Settings(**options)).rows[0]["seeds"] >= 1
    with pytest.raises(ValueError, match="made with scale_lr_scheduler_type='constant'"):
        run(Cifar10Settings(**options, scale_lr_scheduler_type="as_weights"))


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 0.3), ("images", 7)])
def test_cells_of_a_row_are_trained_and_measured_alike(half_done, tmp_path, key, value):
    folder = tmp_path / "copy"
    shutil.copytree(half_done[0], folder)
    first = folder / "cells" / "test_efficientnet-W3A3-lsq-0.json"
    other = json.loads(first.read_text()) | {key: value}
    first.with_name("test_efficientnet-W3A3-lsq-1.json").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match=f"got cells of test_efficientnet W3A3 lsq with {key} of .*, {value}, expected"
    ):
        run(Cifar10Settings(output_dir=str(folder), budget="smoke", table_only=True))


def test_results_of_another_protocol_are_refused(half_done):
    folder, _ = half_done
    settings = Cifar10Settings(output_dir=str(folder), budget="cpu", table_only=True)
    other = folder / "cells" / "test_efficientnet-W3A3-lsq-0.json"
    for cell in cells(BUDGETS["cpu"])[:1]:
        copied = other.with_name(f"{cell.network}-{cell.width}-{cell.method}-{cell.seed}.json")
        copied.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match=r"made with .*batch_size=16 and not 64, .*expected"):
            run(settings)
        copied.unlink()


PAGES = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("results.md", "studies/cifar10.md"))
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("budget", "name"), [("cpu", "cifar10"), ("cpu_large", "cifar10_large")])
def test_the_documented_table_is_made_of_its_cells(budget, name):
    folder = DOCS / "studies" / name
    result = run(Cifar10Settings(output_dir=str(folder), budget=budget, table_only=True))
    text = PAGES.replace("**", "")
    for row in result.rows:
        if row["seeds"]:
            cells = (row["oscillating_percent"], row["scale_caused_percent"], row["frozen_percent"], row["seconds"])
            title = {"lsq": "LSQ"}.get(row["method"], f"LSQ, {row['method']}")
            assert f"| {' | '.join((title, row['before'], row['after'], *cells))} |" in text
        for trial in filter(None, row["trials"].split("; ")):
            assert f"| {trial.rstrip('*')} |" in text
    for network, width in dict.fromkeys((row["network"], row["width"]) for row in result.rows):
        accuracy_in_float = json.loads((folder / "float" / f"{network}.json").read_text(encoding="utf-8"))["test"]
        assert f"**{accuracy_in_float:.2f}%**" in PAGES
        rows = {r["method"]: r for r in result.rows if (r["network"], r["width"]) == (network, width)}
        if not any(row["missing_seeds"] for row in rows.values()):
            line = " | ".join(rows[method]["after"] for method in METHODS)
            assert f"| {accuracy_in_float:.2f} | {line} |" in README.replace("**", ""), (network, width)
    with (folder / "cifar10.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in result.rows]
    record = json.loads((folder / "cifar10.json").read_text(encoding="utf-8"))
    assert record["trainings"] == result.trainings
    assert sum(kind["cells"] for kind in result.trainings) == sum(row["seeds"] for row in result.rows)


def test_the_documented_draws_are_those_of_the_cells():
    table = Table(Cifar10Settings(output_dir=str(DOCS / "studies" / "cifar10"), budget="cpu", table_only=True))
    for width, method, seed in product(("W3", "W3A3"), METHODS, range(3)):
        cell = table.results(Cell("mobilenetv2_035", width, method, seed))
        before, after, others = cell["before"], cell["after"], cell["after_other_draws"]
        mean = fmean([after, *others])
        draws = ", ".join(f"{draw:.2f}" for draw in others)
        assert f"| {seed} | {before:.2f} | {after:.2f} | {mean:.2f} | {draws} |" in PAGES


def test_the_documented_rows_of_resting_scales_are_those_of_the_files():
    resting: dict[tuple[str, str], list[dict[str, float]]] = {}
    for file in sorted((DOCS / "studies" / "cifar10" / "extra").iterdir()):
        measured = json.loads(file.read_text(encoding="utf-8"))
        assert all(f"{measured[key]:.2f}" in PAGES for key in ("before", "after")), file.name
        if file.stem.endswith("as_weights"):
            resting.setdefault((measured["width"], measured["method"]), []).append(measured)
    whole = {kind: seeds for kind, seeds in resting.items() if len(seeds) == 3}
    assert len(whole) == 6
    for (width, method), seeds in whole.items():
        draws = [[seed["after"], *seed.get("after_other_draws", [])] for seed in seeds]
        columns = ([seed["before"] for seed in seeds], [fmean(of_seed) for of_seed in draws])
        before, after = (f"{fmean(column):.2f} ± {stdev(column):.2f}" for column in columns)
        name = {"lsq": "LSQ"}.get(method, f"LSQ, {method}")
        line = re.escape(f"| {width}, {name} | {before} | {after} | ") + rf"[^|]+ \| {len(draws[0])} \|"
        assert re.search(line, PAGES.replace("**", "")), (width, method)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got no finished cell"):
        run(Cifar10Settings(output_dir=str(tmp_path), table_only=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "tpu"}, "got unknown key 'tpu' in --budget"),
        ({"methods": ["dampenning"]}, "Did you mean 'dampening'"),
        ({"widths": ["W2"]}, "got unknown key 'W2'"),
        ({"networks": ["resnet18"]}, "got unknown key 'resnet18'"),
        ({"scale_lr_scheduler_type": "as_weight"}, "Did you mean 'as_weights'"),
        (
            {"budget": "gpu", "networks": ["efficientnet_lite0"], "widths": ["W4A4"]},
            "no row in common, expected some of mobilenetv2_100: W4A4, W3A3, W3; efficientnet_lite0: W3A3",
        ),
        ({"seeds": [7]}, "expected some of 0 to 1 in budget smoke"),
        ({"dataset_name": None}, "expected one source of images"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Cifar10Settings(**{**SMOKE, **options})


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_every_method_gets_as_many_trials(budget):
    assert budget.trials.keys() == METHODS.keys()
    assert len({len(trials) for trials in budget.trials.values()}) == 1
    assert all((t.strength is None) == (m == "lsq") for m, trials in budget.trials.items() for t in trials)


def test_widths():
    assert Cell("n", "W4A4", "lsq", 0).bits == (4, 4)
    assert Cell("n", "W3", "lsq", 0).bits == (3, None)
    with pytest.raises(ValueError, match="got width 'W3A', expected one such as W4A4"):
        _ = Cell("n", "W3A", "lsq", 0).bits


def images(count=6, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


SAME = Normaliser(torch.zeros(3), torch.full((3,), 1 / 255))


@pytest.mark.parametrize("mirror", [False, True])
def test_batches_are_crops_of_the_padded_images(mirror):
    data = images()
    batches = training_batches(data, SAME, 3, seed=0, mirror=mirror)
    flips = 0
    for _ in range(20):
        pixels, labels = next(batches)
        assert pixels.shape == (3, 3, 8, 8)
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(pixels, labels, strict=True):
            padded = torch.nn.functional.pad(data.pixels[label].permute(2, 0, 1), (PADDING,) * 4).float()
            windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            plain = bool(torch.isclose(windows, image).flatten(1).all(1).any())
            flipped = bool(torch.isclose(windows, image.flip(-1)).flatten(1).all(1).any())
            assert plain or flipped
            flips += flipped and not plain
    assert (flips > 0) == mirror


def test_an_epoch_has_each_image_once_and_a_seed_repeats():
    first, second = (training_batches(images(), SAME, 3, seed=1, mirror=True) for _ in range(2))
    labels = torch.cat([next(first)[1], next(first)[1]])
    assert labels.sort().values.tolist() == list(range(6))
    assert torch.equal(next(second)[1], labels[:3])
    with pytest.raises(ValueError, match="got batch_size=7 and 6 training images"):
        next(training_batches(images(), SAME, 7, seed=0, mirror=False))


def test_held_out_images_are_not_trained_on():
    args = DataArguments(dataset_name="digits")
    loaded = load_small_images(args, size=8, held_out=100, device=torch.device("cpu"))
    assert (len(loaded.train), len(loaded.held_out), len(loaded.test)) == (1337, 100, 360)
    assert loaded.classes == 10
    everything = load_small_images(args, size=8, held_out=0, device=torch.device("cpu")).train
    assert torch.equal(torch.cat([loaded.held_out.labels, loaded.train.labels]), everything.labels)
    with pytest.raises(ValueError, match="got 1437 training images, expected more than the 1437 to hold out"):
        load_small_images(args, size=8, held_out=1437, device=torch.device("cpu"))
