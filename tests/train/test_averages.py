import pytest
import torch
from torch import nn

from jit_accel.train.averages import Ema, decay_at


def walk(decays, steps):
    """A parameter that takes the values 1, 2, 3, ... and its averages."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        ema = Ema(model, decays)
        for step in range(1, steps + 1):
            model.weight.fill_(float(step))
            ema.update(step)
    return model, ema


def test_fixed_decay_is_the_closed_form_sum():
    _, ema = walk(["0.9"], 50)
    expected = sum((1 - 0.9) * 0.9 ** (50 - k) * k for k in range(1, 51))  # the start, 0, adds nothing
    assert ema.averages["0.9"]["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_auto_remembers_a_tenth_of_the_run():
    for step in (20, 200, 5_000):
        assert 1 / (1 - decay_at("auto", step)) == pytest.approx(step / 10)
    assert decay_at("auto", 5) == 0  # the first steps are copied
    assert decay_at("auto", 10**9) == 0.9999
    # On a weight that grows by one a step the average lags by its memory, here about 1000 / 11.
    _, ema = walk(["auto"], 1000)
    assert 1000 - ema.averages["auto"]["weight"].item() == pytest.approx(1000 / 11, rel=0.1)


def test_several_decays_are_independent():
    _, both = walk(["0.5", "auto"], 40)
    for decay in ("0.5", "auto"):
        _, alone = walk([decay], 40)
        assert torch.equal(both.averages[decay]["weight"], alone.averages[decay]["weight"])


def test_average_moves_in_float32_under_a_bf16_model():
    model = nn.Linear(4, 4).bfloat16()
    ema = Ema(model, ["0.9999"])
    assert all(average.dtype == torch.float32 for average in ema.averages["0.9999"].values())


def test_applied_weights_come_back_exactly_even_after_an_error():
    model, ema = walk(["0.9"], 10)
    before, average = model.weight.detach().clone(), ema.averages["0.9"]["weight"].clone()
    with pytest.raises(RuntimeError, match="boom"), ema.applied():
        assert torch.equal(model.weight, average)
        raise RuntimeError("boom")
    assert torch.equal(model.weight, before)
    assert torch.equal(ema.averages["0.9"]["weight"], average)
