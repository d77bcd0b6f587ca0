"""What training steps keep in memory, on the CPU."""

import pytest
from comparison import COMPARISONS, Sizes
from memory import RESET, WORKS, peak_of, saved_for_backward
from training_step import FORMS


@pytest.mark.skipif(not RESET.exists(), reason="needs /proc/self/clear_refs, of Linux")
@pytest.mark.parametrize("work", WORKS, ids=["classification", "action_units"])
def test_memory(benchmark, work):
    sizes = Sizes(work.title, "float")
    for form in FORMS:
        sizes.saved[form] = saved_for_backward(work, form)
        sizes.peak[form] = peak_of(work, form)
    COMPARISONS.append(sizes)
    benchmark.extra_info.update(saved=sizes.saved, peak=sizes.peak)
    benchmark.pedantic(saved_for_backward, (work, "float"), rounds=1)
