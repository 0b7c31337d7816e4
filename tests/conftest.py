"""Shared fixtures: everything here is small, deterministic and offline."""

import atexit
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from hub_server import HubServer

# Before any Hugging Face library is imported: the only Hub there is for tests is one that this process serves, and
# their cache is empty.
HUB = HubServer().start()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": tempfile.mkdtemp(prefix="hf_oscqat_tests_"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# Tests run in parallel; threads of several processes on the same cores would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers.utils import logging as transformers_logging

from hf_oscqat import OscQATConfig, calibrate, prepare_qat, reestimate_batchnorm
from hf_oscqat.hub import client

pytest_plugins = ["published"]  # imported after the environment is set

torch.set_num_threads(1)
# What torch's compiler writes for its own tools, whichever test is the first to compile something, is said to nobody.
logging.getLogger("torch.__trace").addFilter(lambda record: False)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("repeatable")
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """Make accelerate forget the last test's precision, which it keeps for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process, empty, with the token of alice, who may write in `org`; nobody waits to try again."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    HUB.reset()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    yield HUB
    HUB.reset()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(os.environ.get("OSCQAT_GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def make_net() -> Callable[[], nn.Module]:
    """Makes a float network of four layers (`stem`, `dw`, `pw`, `head`); the same weights every time."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers: dict[str, nn.Module] = {
                "stem": nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
                "bn": nn.BatchNorm2d(8),
                "act": nn.ReLU6(),
                "dw": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                "pw": nn.Conv2d(8, 6, 1),
                "pool": nn.AdaptiveAvgPool2d(1),
                "flat": nn.Flatten(),
                "head": nn.Linear(6, 5),
            }
            return nn.Sequential(OrderedDict(layers))

    return make


@pytest.fixture(scope="session")
def images() -> Tensor:
    """A batch for `make_net`."""
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def make_prepared(make_net: Callable[[], nn.Module], images: Tensor) -> Callable[..., nn.Module]:
    """Makes the network of `make_net` in training form, calibrated; takes the arguments of `OscQATConfig`."""

    def make(**kwargs: object) -> nn.Module:
        model = prepare_qat(make_net(), OscQATConfig(**kwargs))
        calibrate(model, [images])
        return model

    return make


@pytest.fixture(scope="session")
def make_wrapper() -> Callable[..., nn.Module]:
    """Makes transformers' wrapper around timm's `test_efficientnet` with random weights and five classes."""

    def make(headless: bool = False) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            cls = TimmWrapperModel if headless else TimmWrapperForImageClassification
            model = cls(TimmWrapperConfig(architecture="test_efficientnet", num_labels=5, model_args={}))
            # With fresh statistics the features of this network vanish on their way to the classifier.
            reestimate_batchnorm(model, [torch.randn(8, 3, 32, 32)])
            return model.eval()

    return make


@pytest.fixture(scope="session")
def pixel_values() -> Tensor:
    """A batch for `make_wrapper`."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="session")
def make_prepared_wrapper(make_wrapper: Callable[..., nn.Module], pixel_values: Tensor) -> Callable[..., nn.Module]:
    """Makes the model of `make_wrapper` in training form, calibrated; takes the arguments of `OscQATConfig`."""

    def make(headless: bool = False, **kwargs: object) -> nn.Module:
        model = prepare_qat(make_wrapper(headless), OscQATConfig(**kwargs))
        calibrate(model, [{"pixel_values": pixel_values}])
        return model.eval()

    return make
