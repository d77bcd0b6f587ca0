import pytest

from experiments.schedule import learning_rate


@pytest.mark.parametrize("epochs", [10, 50, 200])
def test_falls_after_40_60_80_and_90_percent(epochs):
    expected = [1.0] * 4 + [0.1] * 2 + [0.01] * 2 + [0.001] + [0.0005]
    tenths = [learning_rate(1.0, epoch, epochs) for epoch in range(epochs)]
    assert tenths == [rate for rate in expected for _ in range(epochs // 10)]


def test_scales_with_the_initial_rate():
    assert learning_rate(0.02, 8, 10) == pytest.approx(0.02 * 0.001)
