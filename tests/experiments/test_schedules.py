import pytest

from experiments.training.schedules import SCHEDULES, constant, cosine, steps


@pytest.mark.parametrize("epochs", [10, 50, 200])
def test_falls_after_40_60_80_and_90_percent(epochs):
    expected = [1.0] * 4 + [0.1] * 2 + [0.01] * 2 + [0.001] + [0.0005]
    tenths = [steps(epoch, epochs) for epoch in range(epochs)]
    assert tenths == [factor for factor in expected for _ in range(epochs // 10)]


def test_cosine_starts_at_1_and_is_halved_at_half_time():
    factors = [cosine(epoch, 10) for epoch in range(10)]
    assert factors[0] == 1
    assert factors[5] == pytest.approx(0.5)
    assert factors[9] == pytest.approx(0.0244717, abs=1e-6)
    assert factors == sorted(factors, reverse=True)


def test_constant_stays():
    assert {constant(epoch, 10) for epoch in range(10)} == {1.0}


def test_every_schedule_starts_at_the_first_rate():
    assert [schedule(0, 7) for schedule in SCHEDULES.values()] == [1.0] * len(SCHEDULES)
