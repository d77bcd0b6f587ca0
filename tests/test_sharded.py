"""DistributedDataParallel and both kinds of fully sharded training: the numbers of one process."""

import copy
import warnings

import fused_networks
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from noisyq_fast import MovingAbsMax, QuantLayer, quantize_model_, sync_ranges_
from noisyq_fast.integer.batch_norm import ExactBatchNorm

BATCH, STEPS = 4, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.attention(x, x, x, need_weights=False)[0])


def make_float():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 8), Block(), Block(), nn.Flatten(), nn.Linear(24, 5, bias=False)
    )


def make_model():
    return quantize_model_(make_float(), 2, 4, first_last_bits=None)


def ranges(model):
    """By name; 0 where nothing was seen, as by the quantizers of keys in self-attention."""
    return {
        name.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): m.running_absmax.item()
        for name, m in model.named_modules()
        if isinstance(m, MovingAbsMax)
    }


def train(model, batches):
    """What the model computes in training steps and then in evaluation, and its ranges."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for x in batches:
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    with torch.no_grad():
        outputs.append(model.eval()(batches[0]))
    return outputs, ranges(model)


def ddp(model):
    return DistributedDataParallel(sync_ranges_(model), broadcast_buffers=False)


def fsdp1(model):
    return FullyShardedDataParallel(
        sync_ranges_(model),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def fsdp1_flat(model):
    return FullyShardedDataParallel(
        sync_ranges_(model),
        auto_wrap_policy=ModuleWrapPolicy({Block, nn.Embedding}),
        device_id=torch.device("cpu"),
    )


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in (model[1], model[2]):
        fully_shard(block, mesh=mesh)
    return fully_shard(sync_ranges_(model), mesh=mesh)


def fsdp2_layers(model):
    """Each layer by itself, out of its memory between forward and backward."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[1].linear, model[2].linear, model[4]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(sync_ranges_(model), mesh=mesh)


WRAPPINGS = [ddp, fsdp1, fsdp1_flat, fsdp2, fsdp2_layers]


def train_part(wrap, batches):
    parts = [x.chunk(2)[dist.get_rank()] for x in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(wrap(make_model()), parts)


@pytest.mark.parametrize("wrap", WRAPPINGS, ids=lambda f: f.__name__)
def test_the_numbers_are_those_of_one_process(ranks, wrap):
    batches = [torch.randint(7, (2 * BATCH, 3)) for _ in range(STEPS)]
    outputs, expected_ranges = train(make_model(), batches)
    (first, of_first), (second, of_second) = ranks(train_part, wrap, batches)
    assert of_first == of_second
    assert of_first == pytest.approx(expected_ranges, rel=1e-3)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), outputs[0])
    # Sums are taken in another order, which can move a value to the next step of the quantizer.
    float_outputs, _ = train(make_float(), batches)
    for a, b, expected, of_float in zip(first, second, outputs, float_outputs, strict=True):
        difference = (torch.cat([a, b]) - expected).abs().mean()
        assert difference < 0.1 * (of_float - expected).abs().mean()


def check_states(batches):
    """A sharded model's full state dict is that of one process, and goes back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fsdp2(make_model())
        train(model, [x.chunk(2)[dist.get_rank()] for x in batches])
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            alone = make_model()
            alone.load_state_dict(state)
            assert ranges(alone) == ranges(model)
            assert {type(v) for v in state.values()} == {torch.Tensor}
        other = fsdp2(make_model())
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, state, options=options)
        assert ranges(other) == ranges(model)
        x = batches[0]
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_states_of_sharded_models(ranks):
    ranks(check_states, [torch.randint(7, (2 * BATCH, 3)) for _ in range(2)])


def materialize():
    """Made without memory, sharded, and filled by PyTorch."""
    with torch.device("meta"):
        model = quantize_model_(make_float(), 3, 5)
    model = fsdp2(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert set(ranges(model).values()) == {0}
    model(torch.randint(7, (BATCH, 3))).sum().backward()
    assert all((r > 0) == ("input" in name) for name, r in ranges(model).items())


def test_a_model_without_memory_is_filled_after_sharding(ranks):
    ranks(materialize)


def mixed_precision():
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in (model[1], model[2], model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    y = model(torch.randint(7, (BATCH, 3)))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(b.dtype == torch.float32 for b in model.buffers())
    policy = torch.distributed.fsdp.MixedPrecision(torch.bfloat16)
    model = FullyShardedDataParallel(
        make_model(), mixed_precision=policy, device_id=torch.device("cpu")
    )
    model(torch.randint(7, (BATCH, 3))).sum().backward()


def test_mixed_precision(ranks):
    ranks(mixed_precision)


def broadcast():
    model = DistributedDataParallel(make_model())
    for step in range(2):
        x = torch.full((BATCH, 3), dist.get_rank() + step)
        model(x).sum().backward()
    return ranges(model)


def test_ddp_may_broadcast_ranges(ranks):
    first, second = ranks(broadcast)
    assert first.keys() == second.keys()


def test_layers_stay_layers_when_copied():
    model = sync_ranges_(make_model())
    copied = copy.deepcopy(model)
    assert sum(isinstance(m, QuantLayer) for m in copied.modules()) == 8


# Integer layers and their chains.


def make_chains():
    torch.manual_seed(0)
    make, *_ = fused_networks.NETWORKS["projection, in place"]
    return fused_networks.fused(make(), first_last_bits=None)


def fsdp2_chains(model):
    """Each layer by itself. (A batch norm that is one of these gets ordinary tensors.)"""
    mesh = init_device_mesh("cpu", (2,))
    for module in [*model.modules()]:
        if isinstance(module, nn.Conv2d):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(sync_ranges_(model), mesh=mesh)


def fsdp1_chains(model):
    return FullyShardedDataParallel(
        sync_ranges_(model),
        auto_wrap_policy=ModuleWrapPolicy({fused_networks.Block}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def train_chains(wrap, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = wrap(make_chains())
    y = fused_networks.plain(model(x))
    y.sum().backward()
    gradients = {} if wrap is fsdp1_chains else named_gradients(model)
    return y.detach(), gradients, {n: b.clone() for n, b in model.named_buffers()}


def named_gradients(model):
    """Whole ones."""
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


@pytest.mark.parametrize("wrap", [ddp, fsdp1_chains, fsdp2_chains], ids=lambda f: f.__name__)
def test_chains_have_the_numbers_of_one_process(ranks, wrap):
    """Of the same batch on all ranks."""
    expected, gradients, buffers = train_chains(lambda model: model, fused_networks.X)
    for y, of_rank, moved in ranks(train_chains, wrap, fused_networks.X):
        assert torch.equal(y, expected)
        for a, b in zip(moved.values(), buffers.values(), strict=True):
            assert torch.equal(a, b)
        for name, gradient in of_rank.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4)


def train_synchronized(x):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    make, *_ = fused_networks.NETWORKS["projection, in place"]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    model = sync_ranges_(fused_networks.fused(model, first_last_bits=None))
    assert sum(isinstance(m, ExactBatchNorm) for m in model.modules()) > 1
    part = x[: len(x) - 1] if rank == 0 else x[len(x) - 1 :]  # parts of different sizes
    y = fused_networks.plain(model(part))
    y.square().sum().backward()
    gradients = named_gradients(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    ys = [None] * size
    dist.all_gather_object(ys, y.detach())
    return torch.cat(ys), gradients, {n: b.clone() for n, b in model.named_buffers()}


def test_synchronized_batch_norms_have_the_numbers_of_one_process(ranks):
    torch.manual_seed(0)
    make, *_ = fused_networks.NETWORKS["projection, in place"]
    model = fused_networks.fused(make(), first_last_bits=None)
    expected = fused_networks.plain(model(fused_networks.X))
    expected.square().sum().backward()
    buffers = dict(model.named_buffers())
    for y, gradients, moved in ranks(train_synchronized, fused_networks.X):
        assert torch.equal(y, expected)
        assert moved.keys() == buffers.keys()
        for name, buffer in moved.items():
            assert torch.equal(buffer, buffers[name]), name
        for name, gradient in named_gradients(model).items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)
