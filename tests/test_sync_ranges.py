"""sync_ranges_: ranks agree to the bit with one process that has the whole batch."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from assert_same import assert_same
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noisyq_fast import (
    MovingAbsMax,
    QuantGroupedLinear,
    QuantLinear,
    quantize_model_,
    sync_ranges_,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*got values below 0")

NAN, INF = float("nan"), float("inf")
QUANTIZERS = [
    {},
    {"ste": "clipped"},
    {"activation_grid": "affine"},
    {"activation_grid": "unsigned", "ste": "clipped"},
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def quantize_parts(sync, quantizer, steps):
    """Quantized inputs, their gradients and the range, for this rank's part of each batch."""
    make = QuantLinear if steps[0][0].dim() == 2 else QuantGroupedLinear
    layer = make(*steps[0][0].shape[1:], 3, averaging_constant=0.3, **quantizer)
    if sync:
        sync_ranges_(layer)
    outputs = []
    for parts in steps:
        x = parts[dist.get_rank() if sync else 0].clone().requires_grad_()
        y = layer.quantized_input(x)
        y.backward(2 * torch.ones_like(x))
        outputs.append((y.detach(), x.grad, layer.input_quantizer.range))
    return outputs


def check_against_one_process(ranks, quantizer, steps):
    whole = quantize_parts(False, quantizer, [[torch.cat(parts)] for parts in steps])
    of_ranks = zip(*ranks(quantize_parts, True, quantizer, steps), strict=True)
    for (y, grad, running), parts in zip(whole, of_ranks, strict=True):
        assert_same(torch.cat([y for y, _, _ in parts]), y)
        assert_same(torch.cat([grad for _, grad, _ in parts]), grad)
        for _, _, range_of_rank in parts:
            assert torch.equal(range_of_rank.view(torch.int32), running.view(torch.int32))
    return whole


def growing_batches(sizes, dtype=torch.float32):
    return [[(torch.randn(size, 6) * (step + 1)).to(dtype) for size in sizes] for step in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_equals_one_process(ranks, quantizer, dtype):
    check_against_one_process(ranks, quantizer, growing_batches([5, 5], dtype))


@pytest.mark.parametrize("sizes", [[1, 7], [0, 4], [4, 0], [0, 0]])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_unequal_and_empty_parts(ranks, quantizer, sizes):
    check_against_one_process(ranks, quantizer, growing_batches(sizes))


def test_an_empty_batch_between_others_is_no_observation(ranks):
    steps = growing_batches([2, 2])
    steps[1] = [torch.empty(0, 6)] * 2
    whole = check_against_one_process(ranks, {}, steps)
    assert torch.equal(whole[0][2], whole[1][2])


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_batch_that_is_not_finite_on_one_rank_is_no_observation(ranks, quantizer, rank, bad):
    steps = growing_batches([3, 3])
    for step in (0, 2):
        steps[step][rank][1, 2] = bad
    whole = check_against_one_process(ranks, quantizer, steps)
    assert whole[0][0].isnan().all()
    assert whole[0][2].isnan().all()
    assert torch.equal(whole[1][2], whole[2][2])


@pytest.mark.parametrize("sizes", [[3, 3], [2, 5], [0, 4], [0, 0]])
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, {"input_ranges": "shared"}])
def test_a_range_for_each_group(ranks, quantizer, sizes):
    loudness = torch.tensor([[1.0], [100.0]])
    steps = [[torch.randn(n, 2, 6) * loudness * step for n in sizes] for step in (2, 1, 3)]
    check_against_one_process(ranks, quantizer, steps)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_group_that_is_not_finite_on_one_rank_leaves_the_others(ranks, quantizer, bad):
    steps = [[torch.randn(3, 2, 6) for _ in range(2)] for _ in range(3)]
    for step in (0, 2):
        steps[step][1][2, 0, 4] = bad
    whole = check_against_one_process(ranks, quantizer, steps)
    assert whole[0][0].isnan().all((0, 2)).tolist() == [True, False]
    ranges = [running.reshape(-1, 2) for _, _, running in whole]  # of an affine grid two rows
    assert ranges[0].isnan().all(0).tolist() == [True, False]
    before, after = ranges[1:]
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).all()


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5)
    )
    return quantize_model_(model)


def ranges(model):
    return [m.range.item() for m in model.modules() if isinstance(m, MovingAbsMax)]


def train_data_parallel(images):
    model = make_model()
    # Otherwise rank 0's ranges would be sent to all.
    wrapped = DistributedDataParallel(sync_ranges_(model), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for batch in images:
            wrapped(batch[dist.get_rank()]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return ranges(model), all_reduce.call_count


def test_every_layer_of_a_data_parallel_model_agrees(ranks):
    images = torch.randn(3, 2, 4, 2, 6, 6)
    (first, count), (second, _) = ranks(train_data_parallel, images)
    assert first == second
    assert count == 3 * 3


def evaluate_on_one_rank(images):
    model = sync_ranges_(make_model())
    model(images[dist.get_rank()])
    if dist.get_rank() == 0:  # alone: a collective here would wait for rank 1
        before = ranges(model)
        with mock.patch.object(dist, "all_reduce", side_effect=AssertionError):
            model.eval()(100 * images[0])
        assert ranges(model) == before


def test_evaluation_does_not_communicate(ranks):
    ranks(evaluate_on_one_rank, torch.randn(2, 4, 2, 6, 6))


def copy_with_groups(images):
    own = images[dist.get_rank()]
    group = dist.new_group()
    both = sync_ranges_(make_model(), group)
    copied = copy.deepcopy(both)
    both(own)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        copied(own)
    assert [call.args[-1] for call in all_reduce.call_args_list] == [group] * 3
    assert ranges(copied) == ranges(both)
    alone, _ = dist.new_subgroups(group_size=1)
    local = sync_ranges_(make_model(), alone)
    local(own)
    unsynced = make_model()
    unsynced(own)
    assert ranges(local) == ranges(unsynced)
    return ranges(both), ranges(local)


def test_groups_and_copies(ranks):
    (together, alone), (same, other) = ranks(copy_with_groups, torch.randn(2, 4, 2, 6, 6))
    assert together == same
    assert alone != other


def compare_with_compiled(parts):
    layer = sync_ranges_(QuantLinear(6, 3, ste="clipped"))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for scale in (1, 2):
        x = scale * parts[dist.get_rank()]
        assert torch.equal(compiled(x), layer(x))
    assert ranges(compiled) == ranges(layer)


def test_a_layer_compiles_to_one_graph_with_the_same_numbers(ranks):
    ranks(compare_with_compiled, torch.randn(2, 5, 6))


def test_without_other_processes_nothing_changes():
    plain, synced = make_model(), sync_ranges_(make_model())
    assert list(synced.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        x = torch.randn(2, 2, 6, 6)
        assert torch.equal(plain(x), synced(x))
    assert ranges(plain) == ranges(synced)
    assert ranges(copy.deepcopy(synced)) == ranges(synced)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: got int"):
        sync_ranges_(3)
    with pytest.raises(ValueError, match="model: got Linear without quantized layers"):
        sync_ranges_(nn.Linear(2, 2))
    # What a rank that is not in a group gets from torch.distributed.new_group.
    with pytest.raises(TypeError, match="process_group: got -100"):
        sync_ranges_(make_model(), dist.GroupMember.NON_GROUP_MEMBER)
