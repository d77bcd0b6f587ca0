"""Networks on a GPU: what they compute there, recorded steps, and that nothing waits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from captured import captured
from torch import nn
from torch._dynamo.utils import counters

from experiments.models import ResNet20
from noisyq_fast import fuse_, quantize_model_, use_backend
from noisyq_fast.quantizers import AQD, LSQ, PACT

pytestmark = pytest.mark.usefixtures("gpu_backend")

DEVICE = "cuda"


def example():
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8, device=DEVICE).reshape(2, 3, 8, 8)
    return images.to(memory_format=torch.channels_last)


def integer(model, **options):
    return quantize_model_(model, arithmetic="integer", **options)


FORMS = {
    "float": quantize_model_,
    "integer": integer,
    "integer, affine": lambda model: integer(model, activation_grid="affine"),
    "integer, fused": lambda model: fuse_(integer(model), example()),
    "integer, fused, affine": lambda model: fuse_(
        integer(model, weight_grid="full", activation_grid="affine"), example()
    ),
    "integer, fused, recompute": lambda model: fuse_(integer(model), example(), recompute=True),
    "LSQ": lambda model: quantize_model_(model, weight=LSQ(4), activation=LSQ(4)),
    "LSQ, integer, fused": lambda model: fuse_(
        integer(model, weight=LSQ(4), activation=LSQ(4)), example()
    ),
    "AQD, PACT": lambda model: quantize_model_(model, weight=AQD(4), activation=PACT(4)),
}
"""What a model is made into."""
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ALL_INTEGER = [name for name in FORMS if "integer, fused" in name]


def small_model(form=quantize_model_):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    model = form(model.to(DEVICE, memory_format=torch.channels_last))
    model(example())  # Learned quantizers start from what they see first.
    return model


def step_of(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def empty_batch():
    images = torch.empty(16, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    return images, torch.empty(16, dtype=torch.int64, device=DEVICE)


@each_form
def test_a_replayed_training_step_is_the_eager_step(form, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images, labels = empty_batch()
    models = [small_model(form)]
    models.append(copy.deepcopy(models[0]))
    start = copy.deepcopy(models[0].state_dict())
    eager_step, replayed_step = (step_of(model, images, labels) for model in models)
    images.normal_()
    labels.random_(10)
    graph, replayed_loss = captured(replayed_step)
    models[1].load_state_dict(start)
    seen = []
    for i in range(4):
        images.normal_(std=i + 1.0)
        labels.random_(10)
        graph.replay()
        assert_same(replayed_loss, eager_step())
        eager, replayed = (model.state_dict() for model in models)
        assert_same(replayed, eager)
        seen.append(sum(x.double().sum() for x in replayed.values()).item())
    assert len(set(seen)) == 4  # It trains, at each replay.


@each_form
def test_a_training_step_never_waits_for_the_device(form, no_waiting):
    images, labels = empty_batch()
    images.normal_()
    labels.random_(10)
    torch.cuda.set_sync_debug_mode("default")
    step = step_of(small_model(form), images, labels)
    step()  # Compiles, if anything does.
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.parametrize("name", ALL_INTEGER)
def test_a_forward_in_integers_equals_the_cpu(name):
    on_gpu = FORMS[name](ResNet20().to(DEVICE, memory_format=torch.channels_last))
    model = copy.deepcopy(on_gpu).to("cpu")
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    for training in (True, False):
        model.train(training)
        on_gpu.train(training)
        with torch.no_grad(), use_backend("reference"):
            expected = model(images)
        with torch.no_grad():
            actual = on_gpu(images.to(DEVICE))
        assert_same(actual.cpu(), expected)
    expected = model.state_dict()
    assert_same({name: value.cpu() for name, value in on_gpu.state_dict().items()}, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_equals_the_reference(dtype):
    model = FORMS["integer, fused"](ResNet20().to(DEVICE, memory_format=torch.channels_last))
    images = torch.randn(8, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    found = []
    for backend in ("reference", None):
        own = copy.deepcopy(model)
        with torch.no_grad(), torch.autocast(DEVICE, dtype):
            if backend is None:
                found.append(own(images))
            else:
                with use_backend(backend):
                    found.append(own(images))
    assert_same(*found)


def test_reduce_overhead():
    """torch.compile's own CUDA graphs."""
    torch.compiler.reset()
    counters.clear()
    eager = quantize_model_(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)))
    eager = eager.to(DEVICE)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for i in range(5):  # Warms up, records, then replays.
        x = torch.randn(16, 32, device=DEVICE) * (i + 1)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.square().sum().backward()
        expected = eager(x)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert_same(model[0].input_quantizer.range, eager[0].input_quantizer.range)
        for parameter, wanted in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-3, atol=1e-3)
        model.zero_grad()
        eager.zero_grad()
    assert counters["inductor"]["cudagraph_skips"] == 0
