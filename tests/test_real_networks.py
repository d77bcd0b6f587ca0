"""Networks of packages that people use, built small: converted, trained, evaluated, and back;
summarized and calibrated.

They run where the packages are installed, which the test extra does not do.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from noisyq_fast import (
    QuantLayer,
    calibrate,
    dequantize_model_,
    disabled,
    export_onnx,
    load_integers,
    quantize_model_,
    save_integers,
    summary,
)
from noisyq_fast.calibration import METHODS
from noisyq_fast.running import tensors_in

pytestmark = pytest.mark.usefixtures("both_arithmetics")

IMAGES = torch.randn(2, 3, 32, 32)
TOKENS = torch.randint(0, 90, (2, 12))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def package(name):
    try:
        return pytest.importorskip(name, reason=f"{name} is not installed")
    except RuntimeError as error:  # a torchvision that does not fit PyTorch
        pytest.skip(f"{name} does not work: {error}")


def torchvision(name, **options):
    def make():
        return package("torchvision.models").get_model(name, weights=None, **options), IMAGES

    return make


def vit():
    models = package("torchvision.models")
    return models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), IMAGES


def swin():
    transformer = package("torchvision.models.swin_transformer")
    return transformer.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=10), IMAGES


def beit():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return package("timm").create_model("beit_base_patch16_224", **options), IMAGES


def timm(name):
    def make():
        return package("timm").create_model(name), IMAGES

    return make


def language(config, model, **options):
    def make():
        transformers = package("transformers")
        options_of_all = getattr(transformers, config)(vocab_size=96, **options)
        return getattr(transformers, model)(options_of_all), {"input_ids": TOKENS}

    return make


def t5():
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}
    model, example = language("T5Config", "T5ForConditionalGeneration", **sizes)()
    return model, example | {"decoder_input_ids": TOKENS}


# With the layers that have 8 bits, and those that the model never calls (it reads their weights).
NETWORKS = {
    "resnet18": (torchvision("resnet18"), {"conv1", "fc"}, 0),
    "mobilenet_v3_small": (
        torchvision("mobilenet_v3_small"),
        {"features.0.0", "classifier.3"},
        0,
    ),
    "vit": (vit, {"conv_proj", "heads.head"}, 0),
    "swin": (swin, {"features.0.0", "head"}, 8),
    "beit": (beit, {"patch_embed.proj", "head"}, 2),
    "mobilenet_v3 of timm": (
        timm("tf_mobilenetv3_small_minimal_100"),
        {"conv_stem", "classifier"},
        0,
    ),
    "gpt2": (
        language("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=32),
        {"transformer.wte", "transformer.wpe", "lm_head"},
        0,
    ),
    "bert": (
        language("BertConfig", "BertForSequenceClassification", intermediate_size=64, **SMALL),
        {
            *(f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")),
            "classifier",
        },
        0,
    ),
    "llama": (
        language(
            "LlamaConfig", "LlamaForCausalLM", intermediate_size=64, num_key_value_heads=1, **SMALL
        ),
        {"model.embed_tokens", "lm_head"},
        0,
    ),
    "t5": (t5, None, 1),
}


def outputs(model, example):
    y = model(**example) if isinstance(example, dict) else model(example)
    return [x for x in tensors_in(y) if x.is_floating_point()]


@pytest.mark.parametrize(("make", "ends", "uncalled"), NETWORKS.values(), ids=NETWORKS)
def test_networks_train_and_evaluate_quantized(make, ends, uncalled):
    model, example = make()
    names = list(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model_(model, example=example)
    told = [str(w.message) for w in caught if "does not call" in str(w.message)]
    assert sum(text.partition(". Their")[0].count(",") + 1 for text in told) == uncalled

    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    if ends is not None:
        assert {name for name, layer in layers.items() if layer.weight_bits == 8} == ends
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(y.square().mean() for y in outputs(model, example) if y.requires_grad).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = outputs(model, example)
        for actual in (outputs(copy.deepcopy(model), example), outputs(model, example)):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(y.isfinite().all() for y in expected)
    for a, b in zip(outputs(model, example), expected, strict=True):
        torch.testing.assert_close(a.detach(), b)
    dequantize_model_(model)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("make", [make for make, *_ in NETWORKS.values()], ids=NETWORKS)
def test_networks_are_summarized_and_calibrated(make):
    model, example = make()
    found = [summary(model, example)]
    expected = outputs(model.eval(), example)
    # With gradients, as PyTorch counts nothing in its fast path of attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model_(model.train(), example=example)
        found.append(summary(model, example))
        for method in METHODS:
            calibrate(model, [example, example], method)
    for actual in found:
        assert actual.macs == counter.get_total_flops() // 2
        assert actual.parameters == sum(p.numel() for p in model.parameters())
    assert found[0].quantized_macs == 0
    assert 0.5 < found[1].quantized_macs / found[1].macs <= 1
    assert found[1].float_size_in_bits == found[0].size_in_bits
    assert model.training
    assert all(y.isfinite().all() for y in outputs(model.eval(), example))
    with disabled(model):
        for a, b in zip(outputs(model, example), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("make", [make for make, *_ in NETWORKS.values()], ids=NETWORKS)
def test_networks_come_back_from_integer_files(make, arithmetic, tmp_path):
    model, example = make()
    untrained, _ = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model_(model, example=example, arithmetic=arithmetic)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        calibrate(model, [example]).eval()
        assert save_integers(model, tmp_path / "model") < 0.9 * size
    again = load_integers(untrained, tmp_path / "model")
    for a, b in zip(outputs(again, example), outputs(model, example), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit", "gpt2"])
def test_networks_are_exported(name, tmp_path):
    for needed in ("onnxscript", "onnxruntime"):
        package(needed)
    model, example = NETWORKS[name][0]()
    quantize_model_(model, example=example)
    outputs(model, example)
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    form = "integer" if layers[0].arithmetic == "integer" else "qdq"
    made = export_onnx(model.eval(), example, tmp_path / "model.onnx", form)
    assert made.any_batch
    assert not made.floats
    assert made.differing / made.codes < 0.01
    assert made.difference < 0.01


def test_offloaded_weights():
    accelerate = package("accelerate")
    model = quantize_model_(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    model(x)
    expected = model.eval()(x).detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(model(x), expected)
