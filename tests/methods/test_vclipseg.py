"""VCLIPSeg: a training step against the formulas in plain PyTorch, its ablations, its edges."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from semiseg.config import load_config
from semiseg.data.phantom import Phantom
from semiseg.engine import trainer
from semiseg.engine.checkpoint import load_checkpoint
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method, train
from semiseg.evaluate import evaluate
from semiseg.methods import VCLIPSeg
from semiseg.methods.method import Batch
from semiseg.models import cross_pseudo_supervision, mutual_consistency
from semiseg.text import TextEmbeddings, random_text

CPU = torch.device("cpu")
CLASSES, PATCH = 3, (32, 32, 16)
TINY = [
    "training.patch_size=[32, 32, 16]", "evaluation.stride=[32, 32, 16]", "network.filters=[2]",
    "method.iterations=2", "training.labelled_batch=2", "training.unlabelled_batch=2", "method.prompt_width=8",
    "method.text_width=12",
]  # fmt: skip
WITHOUT_TEXT = ["method.voxel_prompt=false", "method.text_consistency=false"]
ABLATIONS = {
    "vclipseg": [],
    "released": ["preset=released"],
    "without prompt": ["method.voxel_prompt=false"],
    "without consistency": ["method.text_consistency=false"],
    "two decoders, dynamic": WITHOUT_TEXT,
    "two decoders, mutual": [*WITHOUT_TEXT, "method.pseudo_label=mutual"],
    "two networks, cross": [*WITHOUT_TEXT, "method.branches=two_networks", "method.pseudo_label=cross"],
    "two networks, dynamic": [*WITHOUT_TEXT, "method.branches=two_networks"],
}


def build(*options):
    config = load_config("phantom_vclipseg", [*TINY, "network.dropout=[0.0]", *options])
    torch.manual_seed(0)
    method = build_method(config, CLASSES, CPU, random_text(CLASSES, 12, 0))
    (stage,) = method.stages(torch.Generator())
    return method, stage


def batch(dtype=torch.float32):
    labels = torch.randint(CLASSES, (2, *PATCH), dtype=torch.uint8)
    return Batch(torch.randn(2, 1, *PATCH, dtype=dtype), labels, torch.randn(2, 1, *PATCH, dtype=dtype))


class PlainVCLIPSeg:
    """Two-decoder V-Net, prompt and projection heads, written from the formulas over a method's weights."""

    def __init__(self, method):
        self.weights = {name: tensor.double() for name, tensor in method.state_dict().items()}
        self.text = method.network.prompt.text.double()
        self.heads = len(method.consistency.projections)

    def __call__(self, x):
        f, skips = x.double(), []
        for stage, convolutions in enumerate((1, 2, 3, 3, 3)):
            if stage > 0:
                skips.append(f)
                f = F.conv3d(f, self.weights[f"network.encoder.down.{stage - 1}.0.weight"], stride=2)
                f = self.normalised(f, f"network.encoder.down.{stage - 1}.1").relu()
            f = self.convolved(f, f"network.encoder.stages.{stage}", convolutions)
        f = self.prompted(f)
        return self.decoded("a", f, skips), self.decoded("b", f, skips), f

    def convolved(self, x, name, convolutions):
        for i in range(convolutions):
            x = F.conv3d(x, self.weights[f"{name}.{2 * i}.weight"], padding=1)
            x = self.normalised(x, f"{name}.{2 * i + 1}").relu()
        return x

    def normalised(self, x, name):
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        mean, variance = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), unbiased=False)
        view = (1, -1, 1, 1, 1)
        x = (x - mean.view(view)) / (variance.view(view) + 1e-5).sqrt()
        return x * scale.view(view) + shift.view(view)

    def linear(self, x, name):
        weight, bias = self.weights[f"{name}.weight"].flatten(1), self.weights[f"{name}.bias"]
        return torch.einsum("bcxyz,oc->boxyz", x, weight) + bias.view(1, -1, 1, 1, 1)

    def prompted(self, f):
        x = F.conv3d(f, self.weights["network.prompt.controller.0.weight"], padding=1)
        x = F.leaky_relu(self.normalised(x, "network.prompt.controller.1"), 0.01)
        x = self.linear(F.gelu(self.linear(x, "network.prompt.controller.2")), "network.prompt.controller.4")
        t = self.text @ self.weights["network.prompt.text_projection.weight"].T
        t = t + self.weights["network.prompt.text_projection.bias"]
        prompt = torch.einsum("bcxyz,ce->bexyz", x.softmax(1), t)
        x = F.conv3d(torch.cat([f, prompt], 1), self.weights["network.prompt.fusion.weight"], padding=1)
        return F.leaky_relu(self.normalised(x, "network.prompt.activation"), 0.01)

    def decoded(self, branch, x, skips):
        name = f"network.decoding_{branch}.decoder"
        for level, skip in enumerate(reversed(skips)):
            up = f"{name}.up.{level}"
            if branch == "a":
                x = self.normalised(
                    F.conv_transpose3d(x, self.weights[f"{up}.0.weight"], stride=2), f"{up}.1"
                )
            else:
                x = F.interpolate(x, scale_factor=2, mode="trilinear")
                x = self.normalised(F.conv3d(x, self.weights[f"{up}.1.weight"], padding=1), f"{up}.2")
            x = self.convolved(x.relu() + skip, f"{name}.stages.{level}", (3, 3, 2, 1)[level])
        return self.linear(x, f"network.decoding_{branch}.classifier")

    def projected(self, f, head):
        x = self.linear(
            self.linear(f, f"consistency.projections.{head}.0").relu(), f"consistency.projections.{head}.2"
        )
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def dice(p, y, config=None):  # [B, C, *S] both
    axes, squared = (0, 2, 3, 4), config is None or config.dice_squared
    sizes = ((p**2).sum(axes), (y**2).sum(axes)) if squared else (p.sum(axes), y.sum(axes))
    scores = (2 * (p * y).sum(axes) + 1e-5) / (sum(sizes) + 1e-5)
    return 1 - (scores if config is None or config.dice_background else scores[1:]).mean()


def cross_entropy(p, y):
    return -(y * p.log()).sum(1).mean()


def one_hot(labels):
    return F.one_hot(labels.long(), CLASSES).movedim(-1, 1).double()


def expected_losses(method, data, iteration):
    """Eqs. 4 to 11 as the configuration has them, in float64."""
    config, plain = method.config, PlainVCLIPSeg(method)
    a, b, f = plain(torch.cat([data.labelled_image, data.unlabelled_image]))
    a, b, y = a.softmax(1), b.softmax(1), one_hot(data.labelled_label)
    dice_a, dice_b = dice(a[:2], y, config), dice(b[:2], y, config)
    e_a, e_b = (math.exp(1 - 1 / (1 + math.exp(-loss.item()))) for loss in (dice_a, dice_b))
    pseudo = (e_a * a + e_b * b) / (e_a + e_b)
    if config.pseudo_label_form == "hard":
        pseudo = one_hot(pseudo.argmax(1))
    first = 0 if config.unlabelled_loss_over == "all" else 2
    a_u, b_u, pseudo = a[first:], b[first:], pseudo[first:]
    unlabelled = sum(dice(p, pseudo, config) + cross_entropy(p, pseudo) for p in (a_u, b_u))

    agree = y * ((a[:2].argmax(1) == data.labelled_label) & (b[:2].argmax(1) == data.labelled_label))[:, None]
    if config.mask_resampling == "area":
        mask = F.avg_pool3d(agree, 16)
    else:
        mask = agree[..., ::16, ::16, ::16]
    projected = [plain.projected(f[:2], head) for head in range(plain.heads)]
    cosines = []
    for c in range(CLASSES):
        if mask[:, c].sum() > 0:
            voxels = torch.cat([z.movedim(1, -1)[mask[:, c] > 0] for z in projected])
            weights = mask[:, c][mask[:, c] > 0].repeat(plain.heads)
            prototype = (weights[:, None] * voxels).sum(0) / weights.sum()
            cosines.append(F.cosine_similarity(prototype, plain.text[c], dim=0))
    regularisation = 1 - torch.stack(cosines).mean()

    t = iteration // config.ramp_up_step * config.ramp_up_step
    ramp_up = math.exp(-5 * (1 - min(t / config.ramp_up_iterations, 1)) ** 2)
    total = config.labelled_weight * (dice_a + dice_b) + ramp_up * unlabelled
    total = total + config.consistency_weight * regularisation
    return {
        "dice_a": dice_a, "dice_b": dice_b, "unlabelled": unlabelled, "consistency": regularisation,
        "ramp_up": torch.tensor(ramp_up), "total": total,
    }  # fmt: skip


def test_forward_agrees_with_plain_pytorch():
    method, _ = build()
    for name, parameter in method.named_parameters():
        if name.endswith("bias"):  # zero at the start, which would hide a missing one
            torch.nn.init.normal_(parameter, std=0.1)
    method.double()  # batch normalisation of the bottleneck's few values magnifies float32's rounding
    x = torch.randn(3, 1, *PATCH, dtype=torch.float64)
    outputs, plain = method.network.branches(x), PlainVCLIPSeg(method)
    expected = plain(x)
    projection = F.normalize(method.consistency.projections[0](outputs.bottleneck), dim=1)
    for output, value in zip(
        (*outputs, projection), (*expected, plain.projected(expected[2], 0)), strict=True
    ):
        assert (output - value).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("preset", "dtype", "tolerance"),
    [("paper", torch.float64, 1e-5), ("released", torch.float64, 1e-5), ("paper", torch.float32, 1e-3)],
)
def test_losses_are_equations_4_to_11(preset, dtype, tolerance):
    method, stage = build(f"preset={preset}", "method.consistency_weight=0.3")
    method.to(dtype)
    assert method.config.projection_heads == (1 if preset == "paper" else 2)
    data, iteration = batch(dtype), 170
    prediction = PlainVCLIPSeg(method)(torch.cat([data.labelled_image, data.unlabelled_image]))[0].argmax(1)
    # So that there is something to agree on.
    data.labelled_label[:, :, :24] = prediction[:2, :, :24].to(torch.uint8)
    expected = expected_losses(method, data, iteration)
    losses = stage.losses(data, stage.inputs(data, iteration))
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=tolerance), name
    losses["total"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_pseudo_labels_pass_no_gradient_and_the_labelled_half_is_not_in_them():
    method, stage = build(*WITHOUT_TEXT)
    method.double()
    data = batch(torch.float64)
    twin = copy.deepcopy(method.network)
    losses = stage.losses(data, stage.inputs(data, 0))
    (gradient,) = torch.autograd.grad(
        losses["unlabelled"], method.network.decoding_a.classifier.bias, retain_graph=True
    )
    logits_a, logits_b, _ = twin.branches(torch.cat([data.labelled_image, data.unlabelled_image]))
    a, b = logits_a.softmax(1), logits_b.softmax(1)
    y = one_hot(data.labelled_label)
    weights = torch.stack([dice(a[:2], y), dice(b[:2], y)])
    weights = (1 - weights.sigmoid()).softmax(0)
    pseudo = (weights[0] * a + weights[1] * b)[2:].detach()
    loss = dice(a[2:], pseudo) + cross_entropy(a[2:], pseudo)
    (expected,) = torch.autograd.grad(loss, twin.decoding_a.classifier.bias)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["method.pseudo_label=mutual", "method.sharpening_temperature=0.4"],
            lambda a, b: mutual_consistency(a, b, 0.4),
        ),
        (["method.pseudo_label=cross"], cross_pseudo_supervision),
    ],
    ids=["mutual", "cross"],
)
def test_ablations_have_losses_of_their_own(options, expected):
    _, stage = build(*WITHOUT_TEXT, *options)
    a, b = torch.randn(2, 2, CLASSES, *PATCH)
    torch.testing.assert_close(stage.unlabelled_loss(a, b, *torch.rand(2)), expected(a, b))


def test_random_text_has_the_configured_width_and_seed():
    config = load_config("phantom_vclipseg", ["method.text=random", "method.text_width=12", "method.text_seed=5"])
    text = VCLIPSeg.text(config, ("background", "a", "b"))
    expected = random_text(3, 12, 5)
    assert torch.equal(text.embeddings, expected.embeddings) and text.origin == expected.origin
    assert not torch.equal(text.embeddings, random_text(3, 12, 0).embeddings)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_slices_give_every_parameter_a_gradient(preset):
    options = ["network.filters=[4, 4, 8, 8, 16]", "method.prompt_width=8", "method.text_width=12"]
    config = load_config("acdc_vclipseg_small", [*options, f"preset={preset}"])
    method = build_method(config, 4, CPU, random_text(4, 12, 0))
    (stage,) = method.stages(torch.Generator())
    image, labels = torch.randn(2, 1, 64, 32), torch.randint(4, (2, 64, 32), dtype=torch.uint8)
    data = Batch(image, labels, torch.randn(3, 1, 64, 32))
    losses = stage.losses(data, stage.inputs(data, 0))
    losses["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


@pytest.mark.parametrize("options", [[], ["preset=released"]])
def test_a_batch_without_foreground(options):
    method, stage = build(*options)
    data = batch()
    data.labelled_label.zero_()
    losses = stage.losses(data, stage.inputs(data, 500))
    losses["total"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_no_voxel_where_decoders_and_truth_agree():
    method, stage = build()
    with torch.no_grad():
        for decoding, favourite in ((method.network.decoding_a, 0), (method.network.decoding_b, 1)):
            decoding.classifier.bias[favourite] = 100.0
    data = batch()
    losses = stage.losses(data, stage.inputs(data, 500))
    losses["total"].backward()
    assert losses["consistency"].item() == 0 and losses["total"].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_inference_needs_neither_decoder_b_nor_the_projection_head():
    method, _ = build()
    method.eval()
    image = torch.randn(1, 1, *PATCH)
    expected = method.network.branches(image).logits_a.softmax(1)
    del method.network.decoding_b, method.consistency
    torch.testing.assert_close(method.probabilities(image), expected)


@pytest.fixture
def small_phantom(monkeypatch):
    """A cohort of a few small cases instead of the phantom's, wherever a configuration asks for it."""
    cohort = Phantom(0, shape=PATCH, training=6, validation=1, test=1)
    monkeypatch.setattr(trainer, "open_dataset", lambda *_: cohort)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_and_comes_back_from_its_checkpoint(name, small_phantom, tmp_path):
    config = load_config("phantom_vclipseg", [*TINY, *ABLATIONS[name], f"output={tmp_path / 'run'}"])
    run = train(config)
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines() if "total" in line]
    assert len(steps) == 2 and all(math.isfinite(step["total"]) for step in steps)
    assert ("consistency" in steps[0]) == config.method.text_consistency
    assert run.text.is_file() == config.method.uses_text

    text = run.load_text()
    method = build_method(config, CLASSES, CPU, text)
    before = copy.deepcopy(method.state_dict())
    load_checkpoint(run.checkpoint(), method)
    saved = load_file(run.checkpoint())
    assert set(saved) == set(before)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in method.state_dict().items())
    trained = [key for key, parameter in method.named_parameters() if not torch.equal(parameter, before[key])]
    assert any("decoding_b" in key or "network_b" in key for key in trained)


def test_results_say_which_text_and_what_it_costs(small_phantom, monkeypatch, tmp_path):
    config = load_config("phantom_vclipseg", [*TINY, f"output={tmp_path / 'run'}"])
    run = train(config)
    opened, config = RunDirectory.open(run.path)
    # The cached embeddings are all that evaluation needs.
    monkeypatch.setattr("semiseg.methods.vclipseg.random_text", None)
    results = evaluate(config, opened)
    assert results["text"] == {"source": "random", "seed": 0}
    cost = results["cost"]
    assert 0 < cost["inference"]["parameters"] < cost["training"]["parameters"]
    assert 0 < cost["inference"]["multiply_adds"] < cost["training"]["multiply_adds"]
    assert json.loads(run.results.read_text())["text"] == results["text"]


def test_a_text_file_with_the_wrong_number_of_rows_stops_before_the_run_directory(small_phantom, tmp_path):
    path = tmp_path / "text.pt"
    torch.save(torch.randn(2, 12), path)
    options = [*TINY, "method.text=file", f"method.text_file={path}", f"output={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"float32 \[2, 12\], accepted is floating point \[3, width\]"):
        train(load_config("phantom_vclipseg", options))
    assert not (tmp_path / "run").exists()
    torch.save(torch.randn(3, 12), path)
    assert (
        TextEmbeddings.load(train(load_config("phantom_vclipseg", options)).text).origin["file"] == "text.pt"
    )


@pytest.mark.parametrize("name", ["la_vclipseg", "pancreas_vclipseg"])
def test_paper_protocol(name):
    config = load_config(name)
    assert (config.training.labelled_batch, config.training.unlabelled_batch) == (2, 2)
    assert (config.training.learning_rate, config.training.momentum, config.training.weight_decay) == (
        0.01,
        0.9,
        1e-4,
    )
    expected_patch = (112, 112, 80) if name == "la_vclipseg" else (96, 96, 96)
    assert config.training.patch_size == expected_patch and config.network.filters == (16,)
    method = config.method
    assert (method.iterations, method.ramp_up_iterations, method.ramp_up_step) == (15000, 6000, 1)
    assert method.learning_rate_step is None and method.branches == "two_decoders"
    assert (method.text, method.clip_model) == ("clip", "openai/clip-vit-base-patch32")
    assert method.text_prompt == "A pixel of [CLS]" and method.voxel_prompt and method.text_consistency
    assert (method.prompt_width, method.controller_widths, method.fusion_kernel) == (256, (64, 16), 3)
    assert (method.mask_resampling, method.projection_heads) == ("area", 1)
    assert (method.consistency_weight, method.labelled_weight) == (0.5, 1.0)
    assert (method.pseudo_label, method.pseudo_label_form) == ("dynamic", "soft")
    assert method.unlabelled_loss_over == "unlabelled"


def test_released_preset_sets_the_table_s_column():
    config = load_config("la_vclipseg", ["preset=released"])
    assert (config.evaluation.select, config.evaluation.validation_interval) == ("test", 200)
    assert config.evaluation.validation_stride == config.evaluation.stride == (18, 18, 4)
    assert config.network.initialisation == "pytorch"
    method = config.method
    assert method.text_prompt == "A pixel of a [CLS]." and method.ramp_up_step == 150
    assert (method.mask_resampling, method.projection_heads) == ("nearest", 2)
    assert (method.labelled_weight, method.consistency_weight) == (0.5, 0.5)
    assert (method.pseudo_label_form, method.unlabelled_loss_over) == ("hard", "all")
    assert not method.dice_squared and not method.dice_background


@pytest.mark.parametrize("name", ["phantom_vclipseg", "la_vclipseg_small", "acdc_vclipseg_small"])
def test_small_configurations_need_no_download(name):
    for preset in ("paper", "released"):
        assert load_config(name, [f"preset={preset}"]).method.text == "random"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.branches=three", "accepted are two_decoders, two_networks"),
        (
            "method.branches=two_networks",
            "accepted with method.voxel_prompt and method.text_consistency false",
        ),
        ("method.pseudo_label=none", "accepted are dynamic, mutual, cross"),
        ("method.projection_heads=3", "accepted are 1..2"),
        ("method.mask_resampling=trilinear", "accepted are area, nearest"),
        ("method.text=bert", "accepted are clip, file, random"),
        ("method.text=file", "accepted are text=file with a text_file"),
        ("method.text_file=a.npz", "accepted are text=file with a text_file"),
        ("method.text_prompt=A pixel", "accepted are texts with [CLS]"),
        ("method.fusion_kernel=2", "accepted are odd sides"),
        ("method.controller_widths=[64]", "accepted are two widths"),
        ("method.sharpening_temperature=0", "accepted are values above 0"),
        ("training.unlabelled_batch=0", "accepted by vclipseg are values above 0"),
        ("evaluation.head=prototype", "accepted here are linear"),
        ("method.voxel_promt=false", "the nearest known one is method.voxel_prompt"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(ValueError) as error:
        load_config("la_vclipseg", [override])
    assert message in str(error.value)
