"""SamplingParams and Request."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from ostinato import SamplingParams
from ostinato.errors import OstinatoError, RequestError, SamplingParamsError, UnknownOptionError
from ostinato.types import MAX_LOGIT_BIAS, Request, SamplerVariant


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("n", 10**5000, id="n-huge"), pytest.param("temperature", 10**5000, id="temperature-huge"),
        ("n", 0), ("n", 1.5), ("n", True),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_p", None),
        ("top_k", -2), ("top_k", 0.5),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
        ("presence_penalty", 2.1), ("presence_penalty", math.nan), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("seed", 2**63), ("seed", "one"),
        ("max_tokens", 0), ("max_tokens", 1.0), ("min_tokens", -1), ("min_tokens", 17),
        ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21),
        ("stop", [""]), ("stop", [1]), ("bad_words", [""]),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]),
        ("allowed_token_ids", []), ("allowed_token_ids", [-5]),
        ("logit_bias", {"x": 1.0}), ("logit_bias", {1: math.nan}), ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("temperature", 10**400), ("temperature", 1e39), ("temperature", 1.1e4),
        ("temperature", Decimal(1)), ("temperature", True), ("temperature", np.float32("nan")),
        ("repetition_penalty", 1e39), ("repetition_penalty", 1e-9), ("repetition_penalty", -(10**400)),
        ("n", np.float32(1)), ("n", np.True_), ("seed", 1.0), ("max_tokens", 2**31),
        ("stop", 5), ("stop", True), ("stop", b"x"), ("stop", {"x": 1}), ("bad_words", 5),
        ("stop_token_ids", 5), ("stop_token_ids", "12"), ("stop_token_ids", np.array([1.5])),
        ("stop_token_ids", torch.tensor([-1])), ("stop_token_ids", [True]),
        ("allowed_token_ids", 5), ("allowed_token_ids", np.array(5)), ("allowed_token_ids", torch.tensor([])),
        ("logit_bias", {1.9: 1}), ("logit_bias", {True: 1}), ("logit_bias", {"5": 1, 5: 2}),
        ("logit_bias", {1: 10**400}), ("logit_bias", {1: 1e10}), ("logit_bias", {"9" * 5000: 1}),
        ("ignore_eos", 1), ("detokenize", "no"), ("skip_special_tokens", None), ("output_kind", "delta"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError, match=name) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, (OstinatoError, ValueError))


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("n", np.int64(2), 2), ("top_k", np.int32(-1), -1), ("seed", np.uint32(5), 5), ("seed", torch.tensor(5), 5),
        ("max_tokens", np.int64(3), 3), ("max_tokens", None, None), ("logprobs", np.int8(3), 3),
        ("temperature", 1, 1.0), ("temperature", np.float32(0.5), 0.5), ("temperature", np.int64(2), 2.0),
        ("temperature", 1e-320, 1e-320), ("temperature", 1e4, 1e4), ("top_p", np.float64(0.5), 0.5),
        ("repetition_penalty", 1e-3, 1e-3),
        ("stop", ["a", "b"], ("a", "b")), ("stop", np.array(["a"]), ("a",)),
        ("stop_token_ids", np.array([1, 2]), (1, 2)), ("stop_token_ids", torch.tensor([3]), (3,)),
        ("allowed_token_ids", np.array([7]), (7,)), ("allowed_token_ids", [np.int64(7)], (7,)),
        ("allowed_token_ids", range(2), (0, 1)),
        ("logit_bias", {np.int64(5): np.float32(2)}, {5: 2.0}),
    ],
)  # fmt: skip
def test_numbers_of_other_libraries_become_pythons(name: str, value: Any, plain: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert repr(kept) == repr(plain)  # equal, and of the same types


def test_a_range_is_told_as_numbers() -> None:
    with pytest.raises(SamplingParamsError, match=r"finite number of at least 0 and at most 10000, got nan"):
        SamplingParams(temperature=math.nan)
    with pytest.raises(
        SamplingParamsError, match=r"top_p must be a finite number above 0 and at most 1, got 0"
    ):
        SamplingParams(top_p=0)


def test_the_shortest_output_fits_a_position() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=2**30).min_tokens == 2**30
    with pytest.raises(SamplingParamsError, match="min_tokens"):
        SamplingParams(max_tokens=None, min_tokens=2**30 + 1)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (5, SamplingParamsError, "mapping, got 5"),
        ([("n", 1)], SamplingParamsError, "mapping"),
        ({5: 1}, UnknownOptionError, "'5'"),
        ({10**5000: 1}, UnknownOptionError, "type int"),
    ],
)
def test_what_from_dict_refuses(values: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SamplingParams.from_dict(values)


def test_stop_strings_need_text() -> None:
    with pytest.raises(SamplingParamsError, match="stop_token_ids instead"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    ("wrong", "right"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p")]
)
def test_an_unknown_field_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownOptionError, match=right):
        SamplingParams.from_dict({wrong: 1})


def test_best_of_is_refused_by_name() -> None:
    with pytest.raises(UnknownOptionError, match="best_of"):
        SamplingParams.from_dict({"best_of": 2})
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_json_keys_of_a_bias_become_token_ids() -> None:
    assert SamplingParams.from_dict(json.loads('{"logit_bias": {"5": 1}}')).logit_bias == {5: 1.0}


def test_later_changes_of_the_callers_list_change_nothing() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop_strings == ("a",)
    assert SamplingParams(stop="a").stop_strings == ("a",)


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({"temperature": 0.0}, SamplerVariant.GREEDY),
        ({}, SamplerVariant.SAMPLE),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, SamplerVariant.SAMPLE),
        ({"logprobs": 0}, SamplerVariant.FULL),
        ({"temperature": 0.0, "presence_penalty": 0.1}, SamplerVariant.FULL),
        ({"min_tokens": 1}, SamplerVariant.FULL),
        ({"bad_words": ["x"]}, SamplerVariant.FULL),
        ({"allowed_token_ids": [1]}, SamplerVariant.FULL),
        ({"logit_bias": {1: 1.0}}, SamplerVariant.FULL),
    ],
)
def test_the_smallest_sampler_that_serves(changes: dict[str, Any], variant: SamplerVariant) -> None:
    assert SamplingParams(**changes).sampler_variant is variant


def test_tokens_by_position_cross_from_prompt_to_output() -> None:
    r = Request("r", "r", (1, 2, 3), SamplingParams(), frozenset(), 16, 0)
    r.output_token_ids = [4, 5, 6]
    whole = (1, 2, 3, 4, 5, 6)
    for start in range(7):
        for stop in range(start, 7):
            assert r.token_ids(start, stop) == whole[start:stop]


def test_bad_words_ban_the_token_that_would_complete_them() -> None:
    r = Request(
        "r", "r", (1, 2), SamplingParams(), frozenset(), 16, 0, bad_word_ids=((9,), (2, 3), (1, 2, 7), (5, 6))
    )
    assert r.banned_next() == (9, 3, 7)
    assert r.host_dependent
    r.output_token_ids = [5]
    assert r.banned_next() == (9, 6)


def test_a_misspelt_field_is_refused_by_name_and_the_class_stays_a_dataclass() -> None:
    for call in (
        lambda: SamplingParams(temprature=1),  # type: ignore[call-arg]
        lambda: dataclasses.replace(SamplingParams(), temprature=1),  # type: ignore[call-arg]
    ):
        with pytest.raises(UnknownOptionError, match="'temprature'; did you mean 'temperature'") as caught:
            call()
        assert isinstance(caught.value, TypeError)
    with pytest.raises(TypeError, match="multiple values"):
        SamplingParams(1, n=1)  # type: ignore[misc]
    params = SamplingParams(2, temperature=0.5)
    assert params.n == 2
    assert dataclasses.replace(params, n=1) == SamplingParams(temperature=0.5)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert list(inspect.signature(SamplingParams).parameters) == names


def test_which_tokens_end_a_request() -> None:
    assert SamplingParams(stop_token_ids=[5]).stops([2]) == {2, 5}
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).stops([2]) == {5}
    SamplingParams(allowed_token_ids=[2, 5, 6], min_tokens=1, stop_token_ids=[5]).stops([2])
    SamplingParams(allowed_token_ids=[2], min_tokens=1, ignore_eos=True).stops([2])
    SamplingParams(allowed_token_ids=[2]).stops([2])
    with pytest.raises(RequestError, match=r"allowed_token_ids: .*min_tokens=1"):
        SamplingParams(allowed_token_ids=[2, 5], min_tokens=1, stop_token_ids=[5]).stops([2])
    with pytest.raises(RequestError, match="stop_token_ids: 65 ids"):
        SamplingParams(stop_token_ids=range(64)).stops([100])
