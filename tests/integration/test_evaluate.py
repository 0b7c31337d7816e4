"""Accuracy by two routes: inside Trainer and by a plain pass."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import EvalPrediction

from hf_oscqat.integration.evaluate import accuracy_metrics, evaluate_accuracy, keep_top5

LOGITS = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0, 9, 8, 7, 6, 5], [0, 1, 2, 3, 4, 5]])
LABELS = torch.tensor([0, 5, 0])  # first, fifth and last


class Answers(nn.Module):
    """Returns the logits whose row number is the pixel value."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=LOGITS[pixel_values.flatten().long()])


def collate(examples):
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def test_metrics_count_first_and_first_five():
    top5 = keep_top5((LOGITS, None), LABELS)
    metrics = accuracy_metrics(EvalPrediction(predictions=top5.numpy(), label_ids=LABELS.numpy()))
    assert metrics == pytest.approx({"accuracy": 1 / 3, "top5_accuracy": 2 / 3})


def test_metrics_take_logits_too():
    metrics = accuracy_metrics(EvalPrediction(predictions=LOGITS.numpy(), label_ids=LABELS.numpy()))
    assert metrics == pytest.approx({"accuracy": 1 / 3, "top5_accuracy": 2 / 3})


@pytest.mark.parametrize(
    ("predictions", "labels"), [(LOGITS.argmax(-1), LABELS), (LOGITS, torch.zeros(3, 6)), (LOGITS[:2], LABELS)]
)
def test_metrics_of_something_else_are_an_error(predictions, labels):
    with pytest.raises(ValueError, match="pass compute_metrics"):
        accuracy_metrics(EvalPrediction(predictions=predictions.numpy(), label_ids=labels.numpy()))


def test_top5_of_three_classes_is_all_three():
    assert keep_top5(LOGITS[:, :3], LABELS).shape == (3, 3)


def test_a_plain_pass_measures_the_same():
    dataset = [(torch.tensor([float(i)]), LABELS[i]) for i in range(3)]
    measured = evaluate_accuracy(Answers(), dataset, batch_size=2, collate=collate, cpu=True, show_progress=False)
    assert (measured.accuracy, measured.top5_accuracy) == pytest.approx((1 / 3, 2 / 3))
    assert measured.num_images == 3
    assert measured.images_per_second > 0


def test_the_models_mode_is_restored():
    model = Answers().train()
    dataset = [(torch.tensor([0.0]), LABELS[0])]
    evaluate_accuracy(model, dataset, batch_size=2, collate=collate, cpu=True, show_progress=False)
    assert model.training


class Classifier(nn.Module):
    """Linear, with dropout and batch-norm in modes of their own; notes how it is run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.Dropout())
        self.seen = []

    def forward(self, pixel_values):
        logits = self.layers(pixel_values)
        self.seen.append((logits.dtype, torch.is_inference_mode_enabled(), self.layers[2].training))
        return SimpleNamespace(logits=logits)


class Remembered(torch.utils.data.Dataset):
    """Keeps the images that it makes."""

    def __init__(self):
        self.images = {}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.images.setdefault(index, torch.rand(4)), LABELS[index]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_model_runs_in_inference_mode_and_in_the_precision_asked_for(autocast):
    model = Classifier()
    evaluate_accuracy(
        model, Remembered(), batch_size=2, collate=collate, cpu=True, autocast=autocast, show_progress=False
    )
    assert model.seen == [(autocast or torch.float32, True, False)] * 2


def test_model_and_data_can_be_trained_on_afterwards():
    model, dataset = Classifier(), Remembered()
    evaluate_accuracy(model, dataset, batch_size=2, collate=collate, cpu=True, show_progress=False)
    assert [module.training for module in model.layers] == [True, False, True]
    batch = collate([dataset[i] for i in range(3)])
    nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
    before = model.layers[0].weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.layers[0].weight, before)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers(), *dataset.images.values()))


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="empty dataset"):
        evaluate_accuracy(Answers(), [], batch_size=2, collate=collate, cpu=True)
