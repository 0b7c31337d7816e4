"""OscQATConfig: what it accepts, what it refuses and in which words, and that plain data gives it back."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers import AutoQuantizationConfig

from hf_oscqat import OscQATConfig
from hf_oscqat.remedies.dampening import Dampening, DampeningSettings
from hf_oscqat.remedies.freezing import Freezing, FreezingSettings

NOT_DEFAULT = {
    "weight_bits": 3,
    "activation_bits": None,
    "weight_granularity": "per_channel",
    "weight_scheme": "asymmetric",
    "activation_scheme": "asymmetric",
    "first_last_bits": 6,
    "overrides": {"blocks.*.conv": {"weight_bits": 8, "activation_bits": None}},
    "modules_to_not_convert": ["classifier"],
    "range_estimator": "percentile",
    "lsq_gradient_scaling": True,
    "tracker_momentum": 0.02,
    "batchnorm_reestimation_batches": 7,
    "dampening": {"weight": 0.1, "weight_final": 1.0, "anneal_start": 0.5},
    "freezing": {"threshold": 0.2, "threshold_final": None, "anneal_start": 0, "momentum": 0.01, "use_ema": False},
}

BAD_VALUES = [
    *(("weight_bits", value) for value in (0, 1, 9, 4.0, "4", True, [4])),
    *(("activation_bits", value) for value in (0, 1, 9, 4.5, "none", False)),
    *(("first_last_bits", value) for value in (1, 16, "8")),
    ("weight_granularity", "per_group"),
    ("weight_granularity", None),
    ("weight_granularity", ["per_tensor"]),
    ("weight_scheme", "affine"),
    ("activation_scheme", None),
    ("range_estimator", "mean"),
    ("range_estimator", None),
    ("gradient_estimator", "straight"),
    *(("gradient_estimator_args", value) for value in ([1.0], [], 0)),
    ("scale_domain", "natural"),
    *(("calibration_policy", value) for value in ("warn", ["no_range"], {"constant": "ignore"})),
    ("checkpoint_format", "safetensors"),
    *(("tracker_momentum", value) for value in (0, -0.1, 1.5, float("nan"), "fast", None)),
    *(("batchnorm_reestimation_batches", value) for value in (-1, 2.5, "50", None, True)),
    *(("batchnorm_total_variance", value) for value in ("no", None)),
    *(("lsq_gradient_scaling", value) for value in ("no", 3)),
    *(("modules_to_not_convert", value) for value in ("classifier", [3], 5)),
    *(("overrides", value) for value in (5, ["head"], {"head": 8}, {"head": None}, {3: {"weight_bits": 8}})),
    *(("overrides", {"head": {key: value}}) for key in ("weight_bits", "activation_bits") for value in (1, 9, "8")),
    *(("dampening", value) for value in (True, 0.1, "yes", [0.1])),
    *(("dampening", {"weight": value}) for value in (-1, "big", None, float("nan"), float("inf"))),
    *(("dampening", {"weight_final": value}) for value in (-0.1, "big", None)),
    *(("dampening", {"anneal_start": value}) for value in (-0.1, 1, 1.0, "late", None)),
    *(("freezing", value) for value in (False, 0.1, "yes")),
    *(("freezing", {"threshold": value}) for value in (-0.1, 1.1, None, "high", 0.0001, float("nan"))),
    *(("freezing", {"threshold_final": value}) for value in (-0.1, 1.1, "low", 0.0001)),
    *(("freezing", {"momentum": value}) for value in (0, 1.5, None, "fast")),
    *(("freezing", {"anneal_start": value}) for value in (1, -1, "late")),
    ("freezing", {"use_ema": "no"}),
    ("format_version", "1"),
    *(("layers", value) for value in (5, ["head"])),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda part: str(part).replace(" ", ""))
@pytest.mark.parametrize("make", [lambda d: OscQATConfig(**d), OscQATConfig.from_dict], ids=["constructor", "dict"])
def test_bad_value_is_an_error_that_says_what_is_expected(make, name, value):
    with pytest.raises(ValueError, match=r"^got .*expected") as error:
        make({name: value})
    innermost_name, innermost = name, value
    while isinstance(innermost, dict):
        innermost_name, innermost = next(iter(innermost.items()))
    assert str(innermost_name) in str(error.value)
    assert repr(innermost) in str(error.value)


@pytest.mark.parametrize(
    ("given_keys", "unknown", "meant"),
    [
        ({"weight_bit": 4}, "weight_bit", "weight_bits"),
        ({"freezin": None}, "freezin", "freezing"),
        ({"dampening": {"wieght": 1}}, "wieght", "weight"),
        ({"freezing": {"treshold": 0.1}}, "treshold", "threshold"),
        ({"calibration_policy": {"no_rang": "warn"}}, "no_rang", "no_range"),
        ({"overrides": {"head": {"weights_bits": 8}}}, "weights_bits", "weight_bits"),
    ],
)
@pytest.mark.parametrize("make", [lambda d: OscQATConfig(**d), OscQATConfig.from_dict], ids=["constructor", "dict"])
def test_unknown_key_is_an_error_that_names_the_one_that_was_meant(make, given_keys, unknown, meant):
    with pytest.raises(ValueError, match=f"unknown key {unknown!r}.*Did you mean {meant!r}.*Valid keys: "):
        make(given_keys)


def test_unknown_key_like_no_other_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown key 'zzz'.*weight_bits") as error:
        OscQATConfig(zzz=1)
    assert "Did you mean" not in str(error.value)


def test_key_of_a_newer_version_is_said_to_be_one():
    written = OscQATConfig().to_dict() | {"sharpness": 1}
    with pytest.raises(ValueError, match="got unknown key 'sharpness' in the config of a checkpoint, which a newer"):
        OscQATConfig.from_dict(written)


def test_from_dict_refuses_another_quantization_method():
    with pytest.raises(ValueError, match="got quant_method='gptq', expected 'oscqat'"):
        OscQATConfig.from_dict({"quant_method": "gptq"})


def test_keyword_arguments_win_over_the_dict():
    assert OscQATConfig.from_dict({"weight_bits": 3}, weight_bits=2).weight_bits == 2


def test_unused_kwargs_are_always_empty():
    config, unused = OscQATConfig.from_dict({"weight_bits": 3}, return_unused_kwargs=True)
    assert config == OscQATConfig(weight_bits=3)
    assert unused == {}


def test_defaults_are_those_of_the_contract():
    config = OscQATConfig()
    assert (config.weight_bits, config.activation_bits, config.first_last_bits) == (4, 4, 8)
    assert config.dampening is None
    assert config.freezing is None
    assert config.checkpoint_format == "qat"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, None])
def test_every_width_of_the_contract_is_accepted(bits):
    config = OscQATConfig(weight_bits=bits, activation_bits=bits, first_last_bits=bits)
    assert (config.weight_bits, config.activation_bits, config.first_last_bits) == (bits, bits, bits)


def test_none_means_no_overrides_and_no_exceptions():
    assert OscQATConfig(overrides=None, modules_to_not_convert=None) == OscQATConfig()


def test_settings_may_be_given_as_objects_or_as_dicts():
    as_dicts = OscQATConfig(**NOT_DEFAULT)
    as_objects = OscQATConfig(
        **NOT_DEFAULT
        | {
            "dampening": DampeningSettings(**NOT_DEFAULT["dampening"]),
            "freezing": FreezingSettings(**NOT_DEFAULT["freezing"]),
        }
    )
    assert as_dicts == as_objects


def test_empty_settings_switch_a_remedy_on_with_its_defaults():
    assert OscQATConfig(freezing={}).freezing == FreezingSettings()
    assert OscQATConfig(dampening={}).dampening == DampeningSettings()


def test_every_key_that_is_not_default_comes_back_from_json():
    config = OscQATConfig(**NOT_DEFAULT)
    data = json.loads(json.dumps(config.to_dict()))
    assert OscQATConfig.from_dict(data) == config
    assert {key: data[key] for key in NOT_DEFAULT} == NOT_DEFAULT


@pytest.mark.parametrize("given", [dict, lambda pairs: pairs, lambda pairs: [list(pair) for pair in pairs]])
def test_order_of_overrides_outlives_a_file_with_sorted_keys(given):
    pairs = [("layer1.*", {"weight_bits": 8}), ("*.conv1", {"weight_bits": 2})]
    config = OscQATConfig(overrides=given(pairs))
    again = OscQATConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert list(again.overrides.items()) == pairs
    assert again == config
    assert OscQATConfig(overrides=dict(reversed(pairs))) != config


def test_pairs_of_something_else_are_an_error():
    with pytest.raises(ValueError, match=r"expected \{name pattern"):
        OscQATConfig(overrides=[[["a"], {"weight_bits": 8}]])


def test_pattern_that_is_given_twice_is_an_error():
    with pytest.raises(ValueError, match="expected each pattern once"):
        OscQATConfig(overrides=[("a", {"weight_bits": 8}), ("a", {"weight_bits": 2})])


def test_dict_names_the_method_and_leaves_out_what_pack_writes():
    data = OscQATConfig().to_dict()
    assert data["quant_method"] == "oscqat"
    assert data.keys() >= set(NOT_DEFAULT)
    assert not {"layers", "format_version"} & data.keys()


def test_dict_of_a_packed_config_keeps_layers_and_version():
    layers = {"head": {"weight": None, "input": None}}
    config = OscQATConfig(checkpoint_format="packed", format_version=1, layers=layers)
    assert config.to_dict()["layers"] == layers
    assert config.to_dict()["format_version"] == 1
    assert OscQATConfig.from_dict(config.to_dict()) == config


def test_diff_dict_is_the_whole_dict():
    assert OscQATConfig().to_diff_dict() == OscQATConfig().to_dict()


def test_changing_the_returned_dict_does_not_change_the_config():
    config = OscQATConfig(**NOT_DEFAULT)
    data = config.to_dict()
    data["overrides"]["blocks.*.conv"]["weight_bits"] = 2
    data["modules_to_not_convert"].append("other")
    assert config == OscQATConfig(**NOT_DEFAULT)


def test_changing_what_the_constructor_got_does_not_change_the_config():
    given_keys = copy.deepcopy(NOT_DEFAULT)
    config = OscQATConfig(**given_keys)
    given_keys["overrides"]["blocks.*.conv"]["weight_bits"] = 2
    given_keys["modules_to_not_convert"].append("other")
    assert config == OscQATConfig(**NOT_DEFAULT)


@pytest.mark.parametrize("name", sorted(NOT_DEFAULT))
def test_configs_that_differ_in_one_key_are_unequal(name):
    assert OscQATConfig(**{name: NOT_DEFAULT[name]}) != OscQATConfig()


def test_config_equals_no_object_of_another_class():
    assert OscQATConfig() != OscQATConfig().to_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(clone):
    config = OscQATConfig(**NOT_DEFAULT)
    assert clone(config) == config


def test_transformers_reads_the_dict_as_this_class():
    config = OscQATConfig(**NOT_DEFAULT)
    read = AutoQuantizationConfig.from_dict(config.to_dict())
    assert type(read) is OscQATConfig
    assert read == config


def test_remedies_are_those_that_have_settings():
    config = OscQATConfig(**NOT_DEFAULT)
    dampening, freezing = config.remedies()
    assert isinstance(dampening, Dampening)
    assert dampening.settings == config.dampening
    assert isinstance(freezing, Freezing)
    assert freezing.settings == config.freezing
    assert OscQATConfig().remedies() == []
    assert [type(remedy) for remedy in OscQATConfig(freezing={}).remedies()] == [Freezing]


def test_momentum_is_that_of_freezing_where_it_is_on():
    assert OscQATConfig(tracker_momentum=0.02).momentum == 0.02
    assert OscQATConfig(tracker_momentum=0.02, dampening={}).momentum == 0.02
    assert OscQATConfig(tracker_momentum=0.02, freezing={"momentum": 0.01}).momentum == 0.01


bits = st.none() | st.integers(2, 8)
share = st.floats(0, 1, exclude_max=True)
frequency = st.floats(0.01, 1)
names = st.text(max_size=8)
valid_configs = st.fixed_dictionaries(
    {},
    optional={
        "weight_bits": bits,
        "activation_bits": bits,
        "first_last_bits": bits,
        "weight_granularity": st.sampled_from(["per_tensor", "per_channel"]),
        "weight_scheme": st.sampled_from(["symmetric", "asymmetric"]),
        "activation_scheme": st.sampled_from(["symmetric", "asymmetric"]),
        "overrides": st.dictionaries(
            names, st.fixed_dictionaries({}, optional={"weight_bits": bits, "activation_bits": bits}), max_size=3
        ),
        "modules_to_not_convert": st.lists(names, max_size=3),
        "range_estimator": st.sampled_from(["mse", "minmax", "running_minmax", "percentile"]),
        "lsq_gradient_scaling": st.booleans(),
        "tracker_momentum": st.floats(0, 1, exclude_min=True),
        "batchnorm_reestimation_batches": st.integers(0, 10**6),
        "dampening": st.none()
        | st.builds(DampeningSettings, weight=st.floats(0, 1e6), weight_final=st.floats(0, 1e6), anneal_start=share),
        "freezing": st.none()
        | st.builds(
            FreezingSettings,
            threshold=st.just(0.0) | frequency,
            threshold_final=st.none() | st.just(0.0) | frequency,
            anneal_start=share,
            momentum=st.floats(0.0001, 0.01),
            use_ema=st.booleans(),
        ),
    },
)


@given(valid_configs)
def test_any_valid_config_survives_json(given_keys):
    config = OscQATConfig(**given_keys)
    again = OscQATConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert again.dampening == config.dampening
    assert again.freezing == config.freezing
    assert again.overrides == config.overrides
