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


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="empty dataset"):
        evaluate_accuracy(Answers(), [], batch_size=2, collate=collate, cpu=True)
