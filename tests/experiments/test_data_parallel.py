"""Two processes compute what one does with the whole batch."""

import copy
import doctest
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from experiments.models import AU_NORMS, ActionUnitNetwork, PerAUHead, SharedHead, SmallEncoder
from experiments.training import data_parallel
from experiments.training.data_parallel import SyncBatchNorm, convert_batch_norm_, gather, shard
from noisyq_fast import quantize_model_

# Sums over the batch are taken in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def shard_and_gather(batch):
    with torch.inference_mode():  # as in evaluation
        part = shard(batch)
        return part, gather(part)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (8, 3), (1, 2, 2), (0,)])
def test_gather_inverts_shard(ranks, shape, dtype):
    batch = (10 * torch.randn(shape)).to(dtype)
    (first, whole), (second, same) = ranks(shard_and_gather, batch)
    assert len(first) - len(second) in (0, 1)
    assert torch.equal(torch.cat([first, second]), batch)
    for gathered in (whole, same):
        assert gathered.dtype == dtype
        assert torch.equal(gathered, batch)


def gather_own(parts):
    return gather(parts[dist.get_rank()])


def test_gather_takes_any_sizes(ranks):
    parts = [torch.arange(2.0, requires_grad=True), torch.arange(5.0)]
    for gathered in ranks(gather_own, parts):
        assert gathered.tolist() == [0, 1, 0, 1, 2, 3, 4]
        assert not gathered.requires_grad


def train(batch_norm, steps):
    """Outputs, the inputs' gradients, parameters' gradients and buffers after each batch."""
    results = []
    for x, along in steps:
        x = x.clone().requires_grad_()
        batch_norm.zero_grad()
        y = batch_norm(x)
        y.backward(along.to(y.dtype))
        gradients = [parameter.grad for parameter in batch_norm.parameters()]
        buffers = [buffer.clone() for buffer in batch_norm.buffers()]
        results.append((y.detach(), x.grad, gradients, buffers))
    return results


def train_part(batch_norm, steps, sizes):
    rank = dist.get_rank()
    batch_norm = convert_batch_norm_(batch_norm)
    assert type(batch_norm) is SyncBatchNorm
    return train(batch_norm, [[t.split(sizes)[rank] for t in tensors] for tensors in steps])


def check_batch_norm(
    ranks, batch_norm, sizes, dtype=torch.float32, close=assert_close, positions=(3, 2)
):
    for parameter in batch_norm.parameters():
        nn.init.normal_(parameter)
    shape = sum(sizes), 4, *positions
    offset = torch.randn(4, *[1] * len(positions))
    steps = [[(3 * torch.randn(shape) + offset).to(dtype), torch.randn(shape)] for _ in range(3)]
    whole = train(copy.deepcopy(batch_norm), steps)
    results = zip(*ranks(train_part, batch_norm, steps, sizes), strict=True)
    for (y, grad, gradients, buffers), parts in zip(whole, results, strict=True):
        close(torch.cat([part[0] for part in parts]), y)
        close(torch.cat([part[1] for part in parts]), grad)
        # A rank's gradients are its own: all-reducing them is up to DistributedDataParallel.
        for i, gradient in enumerate(gradients):
            close(sum(part[2][i] for part in parts), gradient)
        for part in parts:
            for ours, expected in zip(part[3], buffers, strict=True):
                close(ours, expected)
        for one, other in zip(parts[0][3], parts[1][3], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [[4, 4], [1, 6], [0, 5], [5, 0]])
def test_batch_norm_equals_one_process(ranks, sizes):
    check_batch_norm(ranks, nn.BatchNorm2d(4), sizes)


@pytest.mark.parametrize("positions", [(), (5,)])
@pytest.mark.parametrize("sizes", [[4, 4], [1, 6], [0, 5]])
def test_one_dimensional_batch_norm_equals_one_process(ranks, sizes, positions):
    check_batch_norm(ranks, nn.BatchNorm1d(4), sizes, positions=positions)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}],
)
def test_options_of_batch_norm(ranks, options):
    check_batch_norm(ranks, nn.BatchNorm2d(4, **options), [2, 3])


def test_batch_norm_in_float64(ranks):
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
    check_batch_norm(ranks, nn.BatchNorm2d(4).double(), [2, 3], torch.float64, close)


def test_batch_norm_of_bfloat16(ranks):
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)
    check_batch_norm(ranks, nn.BatchNorm2d(4), [2, 3], torch.bfloat16, close)


def test_a_rank_by_itself_has_the_statistics_of_its_batch():
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm1d(4)
    steps = [[torch.randn(6, 4, 5), torch.randn(6, 4, 5)] for _ in range(2)]
    for actual, expected in zip(train(ours, steps), train(theirs, steps), strict=True):
        assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"x: got shape \[4\], takes \[B, C, ...\]"):
        ours(torch.ones(4))


def normalize_part(x):
    return convert_batch_norm_(nn.BatchNorm2d(3))(shard(x))


def test_a_mean_far_from_zero(ranks):
    x = torch.randn(8, 3, 4, 4) + 1000
    exact = nn.BatchNorm2d(3).double()(x.double()).float()
    ours = torch.cat(ranks(normalize_part, x))
    # By a unit in the last place of 1000.
    torch.testing.assert_close(ours, exact, rtol=0, atol=2**-14)


def test_one_value_per_channel_is_an_error(ranks):
    with pytest.raises(AssertionError, match="x: got 1 values per channel in training"):
        ranks(normalize_part, torch.randn(1, 3, 1, 1))


def make_model(kind="convolutions"):
    torch.manual_seed(0)
    if kind != "convolutions":
        head = SharedHead(128, 3) if kind == "shared head" else PerAUHead(128, 3, kind)
        return ActionUnitNetwork(SmallEncoder(), head).double()  # deep, with norms of few values
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )
    return model.to(memory_format=torch.channels_last)


def train_model(images, wrap, kind="convolutions", steps=3):
    """A few steps of SGD on the mean over the batch, and an evaluation."""
    model = trained = data_parallel.synchronize_(make_model(kind))
    ranks = data_parallel.size()
    if wrap and ranks > 1:
        trained = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in images.split(len(images) // steps):
        loss = trained(shard(batch)).sin().sum() / len(batch)
        optimizer.zero_grad()
        if wrap:  # takes the mean of the ranks' gradients
            (loss * ranks).backward()
        else:
            loss.backward()
            data_parallel.sum_gradients_(model)
        optimizer.step()
    with torch.no_grad():
        return model.state_dict(), gather(model.eval()(shard(images)))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", ["convolutions", "shared head", *AU_NORMS])
def test_training_equals_one_process(ranks, kind, wrap):
    images = torch.randn(15, 3, 6, 6)
    if kind != "convolutions":
        images = images.double()
    state, outputs = train_model(images, wrap, kind)
    for state_of_rank, outputs_of_rank in ranks(train_model, images, wrap, kind):
        assert list(state_of_rank) == list(state)
        for name, value in state.items():
            torch.testing.assert_close(state_of_rank[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs_of_rank, outputs, rtol=1e-4, atol=1e-4)


def synchronize_quantized():
    model = data_parallel.synchronize_(quantize_model_(make_model()))
    model(torch.full((2, 3, 6, 6), 1.0 + dist.get_rank()))
    return data_parallel.from_main(dist.get_rank()), model[0].input_quantizer.range.item()


def test_ranges_are_those_of_all_ranks(ranks):
    assert ranks(synchronize_quantized) == [(0, 2.0), (0, 2.0)]


def test_a_single_process_is_left_alone(monkeypatch):
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with data_parallel.process_group("cpu") as device:
            assert device == torch.device("cpu")
            assert not dist.is_initialized()
            assert (data_parallel.rank(), data_parallel.size()) == (0, 1)
            assert data_parallel.is_main()
    x = torch.arange(3)
    assert torch.equal(shard(x), x)
    assert torch.equal(gather(x), x)
    model = make_model()
    assert type(convert_batch_norm_(model)[1]) is nn.BatchNorm2d


def test_examples():
    assert doctest.testmod(data_parallel).failed == 0


SCRIPT = """
import sys
import torch.distributed as dist
from experiments.training import data_parallel

before = data_parallel.rank()
with data_parallel.process_group("cpu") as device:
    assert before == data_parallel.rank()
    rank, size, main = data_parallel.rank(), data_parallel.size(), data_parallel.is_main()
    sys.stdout.write(f"{rank} {size} {main} {device} {dist.get_backend()}\\n")
    if len(sys.argv) > 1 and data_parallel.is_main():
        raise SystemExit(3)
    dist.barrier()
assert not dist.is_initialized()
"""


def torchrun(folder, *arguments):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, script, *arguments],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_torchrun(tmp_path):
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 2 True cpu gloo", "1 2 False cpu gloo"]


def test_an_error_on_one_rank_ends_the_others(tmp_path):
    done = torchrun(tmp_path, "fail")
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr
