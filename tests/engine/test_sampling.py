from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dormouse.engine.messages import Sampling
from dormouse.engine.sampling import alternatives, check_sampling, choose, uniform
from dormouse.errors import RequestError

LOGITS = torch.tensor([0.1, 2.0, 1.0, -1.0, 1.5])
draws = st.floats(0, 1, exclude_max=True)


def test_greedy_takes_the_most_likely_token() -> None:
    assert choose(LOGITS, Sampling(max_tokens=1, temperature=0), 0.99) == 1


def test_tokens_come_as_often_as_their_probabilities() -> None:
    counts = Counter(choose(LOGITS, Sampling(max_tokens=1), uniform(7, i)) for i in range(4000))
    for token, probability in enumerate(LOGITS.softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


@given(draw=draws, top_k=st.integers(1, 8))
def test_top_k_keeps_the_k_most_likely(draw: float, top_k: int) -> None:
    assert choose(LOGITS, Sampling(max_tokens=1, top_k=top_k), draw) in LOGITS.argsort(descending=True)[:top_k]


@given(draw=draws)
def test_top_p_keeps_the_smallest_set_that_reaches_p(draw: float) -> None:
    # 0.44 + 0.27 do not reach 0.72, 0.44 + 0.27 + 0.16 do
    assert choose(LOGITS, Sampling(max_tokens=1, top_p=0.72), draw) in (1, 4, 2)
    assert choose(LOGITS, Sampling(max_tokens=1, top_p=1e-9), draw) == 1


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    draw=draws,
    temperature=st.floats(1e-6, 100),
    top_p=st.floats(1e-6, 1),
    top_k=st.integers(0, 30),
)
def test_whatever_the_settings_a_possible_token_is_chosen(
    logits: list[float], draw: float, temperature: float, top_p: float, top_k: int
) -> None:
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    row = torch.tensor(logits)
    token = choose(row, sampling, draw)
    assert (row.double() / temperature).softmax(-1)[token] > 0


@given(seed=st.integers(), position=st.integers(0, 1 << 30))
def test_the_draw_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position) != uniform(seed, position + 1)


def test_logprobs_are_of_the_raw_distribution() -> None:
    listed = alternatives(LOGITS, 3, 2)
    assert [token for token, _ in listed] == [3, 1, 4]
    assert math.exp(listed[1][1]) == pytest.approx(float(LOGITS.softmax(-1)[1]))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ("",)}, "stop"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError, match=f"^{param} is") as caught:
        check_sampling(Sampling(**{"max_tokens": 1, **wrong}))  # type: ignore[arg-type]
    assert caught.value.param == param


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(4, 0.0), Sampling(4), Sampling(4, top_p=0.9), Sampling(4, 1.0, 0.9, 3)])
def test_logits_that_are_no_numbers_harm_nobody_else_in_the_batch(value: float, sampling: Sampling) -> None:
    assert 0 <= choose(torch.full((8,), value), sampling, 0.5) < 8
