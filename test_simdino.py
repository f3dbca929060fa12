# SPDX-License-Identifier: MIT
"""What the three scripts promise. Numbers marked `official` came from running the code of
github.com/RobinWu218/SimDINO at commit 8149fc4 on the same inputs, by the lines beside them."""

import argparse
import ast
import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps, features
from torch import nn
from torchvision import datasets

import eval_linear
import simdino
import simdinov2
from simdino import SimDINOLoss, coding_rate, effective_rank

SCRIPT = Path(simdino.__file__)
EVAL = Path(eval_linear.__file__)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models as small as these lose by a second thread, here and in the processes they start."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def waves(*shape, a):
    """Float64 numbers in [-1, 1] that any machine computes alike."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(i * i * a).view(shape)


def rows(*shape, a):
    return F.normalize(waves(*shape, a=a), dim=-1)


def fingerprint(x):
    """One number that depends on every entry of x."""
    return (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)).sum().item()


# ----------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("n, d", [(5, 12), (12, 12), (40, 12)])
def test_coding_rate_is_the_formula_of_the_paper(n, d):
    z = rows(3, 2, n, d, a=0.37)
    expected = torch.logdet(torch.eye(d) + d / (n * 0.3) * z.mT @ z) / 2
    torch.testing.assert_close(coding_rate(z, 0.3), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda z: coding_rate(z, 0.3), z[0, 0].requires_grad_())


def test_coding_rate_of_orthogonal_and_of_equal_rows():
    n, d, eps_sq = 8, 16, 0.5
    orthogonal = torch.eye(d, dtype=torch.float64)[:n]
    equal = orthogonal[:1].expand(n, d)
    most, least = n / 2 * math.log(1 + d / (n * eps_sq)), math.log(1 + d / eps_sq) / 2
    assert coding_rate(orthogonal, eps_sq).item() == pytest.approx(most, rel=1e-12)
    assert coding_rate(equal, eps_sq).item() == pytest.approx(least, rel=1e-12)


def official_loss(student, teacher, eps, expa_type, gpus=1):
    """Loss, comp and expa of the official code on so many GPUs, the mean over them, by its formula.

    A GPU forms the second moments of its own rows, and divides by the number of rows of all.
    """
    views, n, d = student.shape
    pairs = [(t, s) for t in (0, 1) for s in range(views) if s != t]
    comp = 0
    for t, s in pairs:
        lengths = teacher[t].norm(dim=-1) * student[s].norm(dim=-1)
        comp = comp + ((teacher[t] * student[s]).sum(-1) / lengths).mean() / len(pairs)
    z = student[:2] if expa_type == 0 else (student[:2] + teacher) / 2
    moments = [own.mT @ own for view in z for own in view.split(n // gpus)]
    rates = [torch.logdet(torch.eye(d) + d / (n * eps) * moment) / 2 for moment in moments]
    expa = (d + n) / (d * n) * sum(rates) / len(rates)
    return -comp - expa, comp, expa


@pytest.mark.parametrize("expa_type", [0, 1])
@pytest.mark.parametrize("d", [16, 48])
def test_loss_equals_the_official_one_on_one_process(d, expa_type):
    student, teacher = rows(4, 24, d, a=0.37).requires_grad_(), rows(2, 24, d, a=0.11)
    expected, *terms = official_loss(student, teacher, 0.05, expa_type)
    value, stats = SimDINOLoss(0.05, None, expa_type=expa_type)(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert [x.item() for x in stats.values()] == pytest.approx([x.item() for x in terms], rel=1e-9)
    theirs, own = (torch.autograd.grad(loss, student)[0] for loss in (expected, value))
    assert (own - theirs).norm() < 1e-12 * theirs.norm()

    student32 = student.detach().float().requires_grad_()
    value32, _ = SimDINOLoss(0.05, None, expa_type=expa_type)(student32, teacher.float())
    assert value32.item() == pytest.approx(value.item(), rel=1e-5)
    own32 = torch.autograd.grad(value32, student32)[0]
    assert (own32 - own).norm() < 1e-5 * own.norm()


def test_defaults_equal_the_published_run_on_8_gpus_of_64():
    student, teacher = rows(4, 512, 256, a=0.37).requires_grad_(), rows(2, 512, 256, a=0.11)
    expected = official_loss(student, teacher, 0.05, 1, gpus=8)[0]
    value = SimDINOLoss()(student, teacher)[0]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    theirs, own = (torch.autograd.grad(loss, student)[0] for loss in (expected, value))
    assert (own - theirs).norm() < 1e-11 * theirs.norm()
    # The same in 8 rounds of 64, if gamma is that of the 512.
    loss_fn = SimDINOLoss(gamma=(256 + 512) / (256 * 512))
    blocks = zip(student.split(64, dim=1), teacher.split(64, dim=1))
    in_rounds = sum(loss_fn(*block)[0] for block in blocks) / 8
    torch.testing.assert_close(in_rounds, expected, rtol=1e-12, atol=0)
    own = torch.autograd.grad(in_rounds, student)[0]
    assert (own - theirs).norm() < 1e-11 * theirs.norm()


def test_coeff_and_gamma_weigh_the_terms():
    student, teacher = rows(4, 64, 32, a=0.37), rows(2, 64, 32, a=0.11)
    value, stats = SimDINOLoss(coeff=3.0, gamma=0.25)(student, teacher)
    rate = coding_rate((student[:2] + teacher) / 2, 0.4).mean()
    assert stats["expa"].item() == pytest.approx(0.25 * rate.item(), rel=1e-12)
    assert value.item() == pytest.approx(-3 * stats["comp"].item() - 0.25 * rate.item(), rel=1e-12)


def test_loss_runs_in_float32_inside_autocast_and_keeps_float64():
    student, teacher = rows(4, 64, 32, a=0.37).float(), rows(2, 64, 32, a=0.11).float()
    plain, _ = SimDINOLoss(0.05)(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = SimDINOLoss(0.05)(student, teacher)
    assert inside.dtype == torch.float32 and inside == plain
    assert SimDINOLoss()(student.bfloat16(), teacher.bfloat16())[0].dtype == torch.float32
    assert SimDINOLoss()(student.double(), teacher.double())[0].dtype == torch.float64


def test_effective_rank_counts_the_directions_in_use():
    assert effective_rank(torch.eye(32)[:16]).item() == pytest.approx(16, rel=1e-4)
    assert effective_rank(torch.eye(32)[:1].expand(16, -1)).item() == pytest.approx(1, rel=1e-4)
    z = rows(40, 12, a=0.37)
    p = torch.linalg.svdvals(z) ** 2 / 40  # of unit rows: they sum to 1
    assert effective_rank(z).item() == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)
    assert math.isfinite(effective_rank(torch.full((4, 3), math.nan)))


def test_loss_names_what_is_wrong():
    with pytest.raises(ValueError, match="eps_sq"):
        SimDINOLoss(eps_sq=0)
    with pytest.raises(ValueError, match="group_size must be at least 1, or None, not 0"):
        SimDINOLoss(group_size=0)
    with pytest.raises(ValueError, match="expa_type"):
        SimDINOLoss(expa_type=2)
    with pytest.raises(ValueError, match="group_size 64 does not divide the batch of 96 images"):
        SimDINOLoss()(rows(3, 96, 8, a=0.3), rows(2, 96, 8, a=0.2))


def test_the_loss_can_be_lifted_out_of_the_file_with_torch_alone(tmp_path):
    text = SCRIPT.read_text()
    parts = [
        n for n in ast.parse(text).body if getattr(n, "name", "") in ("coding_rate", "SimDINOLoss")
    ]
    source = "\n\n".join(["import torch", *(ast.get_source_segment(text, part) for part in parts)])
    (tmp_path / "lifted.py").write_text(source)
    spec = importlib.util.spec_from_file_location("lifted", tmp_path / "lifted.py")
    lifted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lifted)
    student, teacher = rows(4, 64, 32, a=0.37), rows(2, 64, 32, a=0.11)
    assert lifted.SimDINOLoss()(student, teacher)[0] == SimDINOLoss()(student, teacher)[0]


def test_nothing_is_gathered_where_the_group_divides_the_rows_of_a_process(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("gathered")

    monkeypatch.setattr(dist, "all_gather", refuse)
    monkeypatch.setattr(SimDINOLoss, "processes", staticmethod(lambda: 8))
    student, teacher = rows(4, 64, 256, a=0.37), rows(2, 64, 256, a=0.11)
    gamma = (256 + 512) / (256 * 512)
    for group in (1, 16, 64):
        shared = SimDINOLoss(group_size=group)(student, teacher)[1]["expa"].item()
        rates = coding_rate(((student[:2] + teacher) / 2).unflatten(1, (-1, group)), 0.4)
        assert shared == pytest.approx(gamma * rates.mean().item(), rel=1e-12)
    for group in (128, None):
        with pytest.raises(AssertionError, match="gathered"):
            SimDINOLoss(group_size=group)(student, teacher)


def definitions(script):
    """Source text of the script's top-level functions, classes and constants, by name."""
    text, found = Path(script.__file__).read_text(), {}
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [ast.unparse(target) for target in node.targets]
        found |= {name: ast.get_source_segment(text, node) for name in names if name}
    return found


def test_what_the_training_scripts_share_stands_in_each_in_the_same_words():
    v1, v2 = definitions(simdino), definitions(simdinov2)
    differs = {"Block", "VisionTransformer", "SimDINO", "OPTIONS", "build", "main"}
    differs.add("load_pretrained")
    assert [name for name in v1 if v1[name] != v2.get(name)] == [n for n in v1 if n in differs]
    assert [name for name in v2 if name in v1] == list(v1), "in the same order"
    added = {"masked_patch_loss", "LayerScale", "Network", "block_masks", "parameter_groups"}
    assert v2.keys() - v1.keys() == added | {"MaskedBlocks"}


def test_what_the_scripts_share_stands_in_each_in_the_same_words():
    v2, evaluation = map(definitions, (simdinov2, eval_linear))
    differs = {"Block", "VisionTransformer", "OPTIONS", "main"}
    differs |= {"parse_args", "FREE"}
    shared = (v2.keys() & evaluation.keys()) - differs
    assert {
        "Attention",
        "LayerScale",
        "load_image",
        "Images",
        "find_data",
        "block_keys",
        "together",
    } < shared
    assert [name for name in shared if v2[name] != evaluation[name]] == []


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------- the method's first experiments


def self_distil(gamma, momentum=0.9, steps=150, unit=True):
    """SimDINO on noisy views of 64 points: student rows, teacher rows, the teacher's mean move."""
    torch.manual_seed(0)
    points = torch.randn(64, 16)
    student = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    loss_fn, moved = SimDINOLoss(0.4, None, gamma=gamma), 0.0
    for _ in range(steps):
        views = points + 0.3 * torch.randn(4, 64, 16)
        z_s, z_t = student(views), teacher(views[:2]).detach()
        if unit:
            z_s, z_t = F.normalize(z_s, dim=-1), F.normalize(z_t, dim=-1)
        loss, _ = loss_fn(z_s, z_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = F.normalize(teacher(points), dim=-1)
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.data.lerp_(q.data, 1 - momentum)
        moved += (F.normalize(teacher(points), dim=-1) - before).norm(dim=-1).mean().item()
    with torch.no_grad():
        return student(points), teacher(points), moved / steps


def rank_of(z):
    return effective_rank(F.normalize(z, dim=-1)).item()


def test_coding_rate_prevents_collapse_and_without_it_features_collapse():
    kept, collapsed = (rank_of(self_distil(gamma, steps=800)[0]) for gamma in (None, 0.0))
    assert kept > 10, "of 16 directions nearly all are in use"
    assert collapsed < 1.5, "pulled together by nothing but each other, all features agree"


def test_without_l2_normalisation_the_rate_is_bought_by_length_not_by_diversity():
    unit, free = self_distil(None)[0], self_distil(None, unit=False)[0]
    assert free.norm(dim=-1).mean() > 3, "logdet grows with the length of the rows"
    lengths = free.norm(dim=-1)
    assert lengths.std() > 0.1 * lengths.mean()
    assert rank_of(free) < rank_of(unit)


def test_a_slower_teacher_is_steadier_and_further_behind():
    gaps, moves = [], []
    for momentum in (0.0, 0.9, 0.99):
        student, teacher, moved = self_distil(None, momentum, steps=60)
        z_s, z_t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        gaps.append((z_s - z_t).norm(dim=-1).mean().item())
        moves.append(moved)
    assert gaps[0] < 1e-6 and gaps[0] < gaps[1] < gaps[2]
    assert moves[0] > moves[1] > moves[2]


# ---------------------------------------------------------------------------------------- the model


def tiny_vit(**options):
    return simdino.VisionTransformer(32, 8, 32, 3, 4, **options)


@torch.no_grad()
def fill(model):
    """Float64 weights that any machine computes alike."""
    for i, (name, p) in enumerate(sorted(model.double().state_dict().items())):
        n = torch.arange(1, p.numel() + 1, dtype=torch.float64).view(p.shape)
        p.copy_((0.5 if p.ndim == 1 else 0.2) * torch.sin(n * n * 0.01 + i))
        p += 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0
    return model


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_weights_load_into_timm_and_give_the_same_features(arch):
    timm = pytest.importorskip("timm")
    ours = simdino.VisionTransformer(**simdino.ARCHS[arch]).eval()
    theirs = timm.create_model(f"{arch}_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


# official, in simdino/: VisionTransformer([32], 8, embed_dim=32, depth=3, num_heads=4, qkv_bias=True,
#     norm_layer=partial(nn.LayerNorm, eps=1e-6)), put through fill(model).eval() and the test's lines
@pytest.mark.parametrize(
    "height, width, features",
    [(32, 32, 1.5252037344687581), (16, 16, 2.9070248537220484), (48, 24, 2.212051347187865)],
)
def test_vit_equals_the_official_one_at_any_size(height, width, features):
    model = fill(tiny_vit()).eval()
    with torch.no_grad():
        n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
        assert fingerprint(model(torch.sin(n * n * 0.05))) == pytest.approx(features, rel=1e-9)


def test_a_list_of_sizes_gives_each_batch_its_features_in_order():
    model = tiny_vit().eval()
    views = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16, 32, 24)]
    with torch.no_grad():
        torch.testing.assert_close(model(views), torch.cat([model(view) for view in views]))


def test_stochastic_depth_keeps_the_expectation_and_drops_more_the_deeper_the_block():
    torch.manual_seed(0)
    model, x = tiny_vit(drop_path_rate=0.5), torch.zeros(4000, 3, 32, 32)
    for keep, rate in zip(model.stochastic_depth(x), (0, 0.25, 0.5), strict=True):
        assert keep.shape == (2, 4000, 1, 1)
        dropped = keep.flatten(1) == 0
        kept = keep.flatten(1)[~dropped]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
        assert dropped.double().mean(1).tolist() == pytest.approx([rate] * 2, abs=0.025), "3 sigma"
        both = dropped.all(0).double().mean().item()
        assert both == pytest.approx(rate**2, abs=0.025), "the branches independently"
    assert model.eval().stochastic_depth(x) == [None] * 3
    assert tiny_vit().stochastic_depth(x) == [None] * 3


def test_a_block_multiplies_each_branch_of_each_sample_by_what_was_drawn_for_it():
    block, x = tiny_vit().blocks[0], torch.randn(3, 5, 32)
    keep = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 2.0]])
    with torch.no_grad():
        moved = block(x, keep.view(2, 3, 1, 1))
        for i in range(3):
            y = x[i] + keep[0, i] * block.attn(block.norm1(x[i : i + 1]))[0]
            y = y + keep[1, i] * block.mlp(block.norm2(y))
            torch.testing.assert_close(moved[i], y)
        torch.testing.assert_close(block(x), block(x, torch.ones(2, 3, 1, 1)))


def test_projection_head_gives_unit_rows_in_float32():
    head = simdino.ProjectionHead(32, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.randn(5, 32))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))
    assert [k for k in head.state_dict()][::2] == ["mlp.0.weight", "mlp.2.weight", "mlp.4.weight"]


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="patch"):
        tiny_vit()(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="patch"):
        simdino.VisionTransformer(30, 8)


# ------------------------------------------------------------------------------ what SimDINOv2 adds


def tiny_vit2(**options):
    return simdinov2.VisionTransformer(32, 8, 32, 3, 4, **options)


# official: DinoVisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=4, layerscale=0.1,
#     block_chunks=0, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
#     put through fill(model).eval() and the test's lines
@pytest.mark.parametrize(
    "height, width, masked, cls, registers, patches",
    [
        (32, 32, False, 0.10318832708893666, 0.10881147621735199, 12.799606920611724),
        (32, 32, True, -4.940383799328852, 2.5265665137142204, -5.835303549566303),
        (16, 16, False, -3.65211984147059, 1.7188289429619559, 2.5810390103845813),
        (16, 16, True, -7.136390470303309, 6.309278002187013, 16.58532088089738),
        (48, 24, False, -0.19806909711186904, -0.6574862588231296, 28.34563822408723),
        (48, 24, True, -5.481463290903153, 1.7748774067798925, 4.293637027881342),
    ],
)
def test_v2_vit_equals_the_official_one_masked_and_not(
    height, width, masked, cls, registers, patches
):
    n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    masks = torch.arange(2 * height * width // 64).view(2, -1) % 3 == 1 if masked else None
    with torch.no_grad():
        tokens = fill(tiny_vit2()).eval().forward_features(torch.sin(n * n * 0.05), masks)
    ours = [fingerprint(x) for x in tokens.values()]
    assert list(tokens) == ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"]
    # The official model interpolates positions in float32.
    assert ours == pytest.approx(
        [cls, registers, patches], rel=1e-9 if height == width == 32 else 1e-6
    )


@pytest.mark.parametrize("height, width", [(32, 32), (16, 16), (48, 24)])
def test_v2_weights_give_the_same_features_in_timm_masked_and_not(height, width):
    timm = pytest.importorskip("timm")
    ours, options = fill(tiny_vit2()).eval(), {"no_embed_class": True, "dynamic_img_size": True}
    options |= {"num_classes": 0, "init_values": 0.1, "reg_tokens": 4}
    theirs = timm.models.VisionTransformer(
        32, 8, embed_dim=32, depth=3, num_heads=4, **options
    ).eval()
    state = ours.state_dict()
    mask_token, state["reg_token"] = state.pop("mask_token"), state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]  # timm's positions: patches
    state["pos_embed"] = state["pos_embed"][:, 1:]
    theirs.double().load_state_dict(state, strict=True)
    x, masks = waves(2, 3, height, width, a=0.3), waves(2, height * width // 64, a=0.7) > 0.2
    for hidden in (torch.zeros_like(masks), masks):
        grid = hidden.view(2, height // 8, width // 8, 1)
        hook = theirs.patch_embed.register_forward_hook(
            lambda module, args, out, grid=grid: torch.where(grid, mask_token, out)
        )
        with torch.no_grad():
            tokens = ours.forward_features(x, hidden).values()
            tokens = torch.cat([t if t.ndim == 3 else t[:, None] for t in tokens], dim=1)
            expected = theirs.forward_features(x)
        # timm interpolates positions in float32.
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
        hook.remove()


def test_forward_takes_lists_of_images():
    model = tiny_vit2().eval()
    x = [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    with torch.no_grad():
        assert model.forward_features(x[0])["x_norm_regtokens"].shape == (2, 4, 32)
        assert torch.equal(model(x), torch.cat([model(images) for images in x]))


def test_masked_patches_are_hidden_from_the_student():
    model, x = fill(tiny_vit2()).eval(), waves(1, 3, 32, 32, a=0.3)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True  # rows 8 to 15, columns 8 to 15
    other = x.clone()
    other[..., 8:16, 8:16] = 0.5
    with torch.no_grad():
        a, b = (model.forward_features(image, masks)["x_norm_patchtokens"] for image in (x, other))
        assert torch.equal(a, b)
        assert not torch.equal(model(x), model(other))


def test_depth_that_computes_only_the_kept_samples_keeps_the_expectation():
    torch.manual_seed(0)
    block = tiny_vit2().blocks[0]
    x, n = torch.randn(5, 7, 32), 1000
    with torch.no_grad():
        branch = block.ls1(block.attn(block.norm1(x)))
        block.ls2.gamma.zero_()
        keeps = torch.rand(n, 5).argsort(-1)[:, :4]
        moved = torch.stack([block(x, torch.stack([keep, keep])) - x for keep in keeps])
        assert (moved[:, :, 0, 0] == 0).sum(1).eq(1).all(), "one of five samples skips the branch"
        assert (moved.mean(0) - branch).norm() < 0.06 * branch.norm(), "4 sigma of 1000 draws"


def test_v2_drops_a_uniform_share_in_training_only():
    torch.manual_seed(0)
    model, seen = tiny_vit2(drop_path_rate=0.25), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model(torch.randn(8, 3, 32, 32))
    model.eval()(torch.randn(8, 3, 32, 32))
    assert seen == [6, 6, 6, 8, 8, 8]
    keep = model.train().stochastic_depth(torch.zeros(200, 3, 32, 32))
    assert keep.shape == (3, 2, 150)
    drawn = [frozenset(samples.tolist()) for samples in keep.flatten(0, 1)]
    assert all(len(samples) == 150 for samples in drawn), "no sample twice"
    assert len(set(drawn)) == 6, "drawn anew for each branch"
    assert len(model.stochastic_depth(torch.zeros(1, 3, 32, 32))[0][0]) == 1, "never none"


def test_masked_patch_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches():
    masks = waves(6, 16, a=0.3) > 0.4
    masks[2] = False  # counts among the 6 and adds nothing
    student, teacher = rows(31, 12, a=0.37).requires_grad_(), rows(31, 12, a=0.11)
    cosine = (student * teacher).sum(-1) / student.norm(dim=-1)
    expected, counts = 0, masks.sum(1).tolist()
    assert sum(counts) == 31
    for own in cosine.split(counts):
        expected = expected - (own.mean() if len(own) else 0) / 6
    loss = simdinov2.masked_patch_loss(student, teacher, masks)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # 1 / count is in float32
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    assert (ours - theirs).norm() < 1e-7 * theirs.norm()
    with torch.autocast("cpu", torch.bfloat16):
        half = simdinov2.masked_patch_loss(student.float(), teacher.float(), masks)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=1e-5)
    nothing = simdinov2.masked_patch_loss(student[:0], teacher[:0], torch.zeros_like(masks))
    assert nothing.item() == 0


def regions(mask):
    """Sizes of the connected regions of a mask of 14 x 14 patches."""
    left, sizes = set(mask.nonzero().flatten().tolist()), []
    while left:
        stack, size = [left.pop()], 0
        while stack:
            i, size = stack.pop(), size + 1
            beside = [i - 1] * (i % 14 > 0) + [i + 1] * (i % 14 < 13)
            near = {i - 14, i + 14, *beside} & left
            stack += near
            left -= near
        sizes.append(size)
    return sizes


def test_block_masks_have_the_statistics_of_the_official_generator():
    draws = [simdinov2.block_masks(128, 14, 0.5, (0.1, 0.5), (0, seed)) for seed in range(30)]
    masks = torch.stack(draws)
    ratio = masks.float().mean(-1)
    assert (ratio > 0).sum(1).eq(64).all(), "half of the crops of every batch"
    assert 0.45 < (ratio[:, :64] > 0).float().mean() < 0.55, "any half"
    ratio = ratio[ratio > 0]
    # official: generator = MaskingGenerator((14, 14), max_num_patches=98), and of 1,920 masks
    #     [generator(int(196 * random.uniform(low, high))) for low, high in zip(bounds, bounds[1:])]
    #     with bounds = np.linspace(0.1, 0.5, 65), 30 times, these means and quantiles
    assert ratio.mean().item() == pytest.approx(0.2971, abs=0.002)
    quantiles = ratio.quantile(torch.tensor([0, 0.1, 0.5, 0.9, 1])).tolist()
    assert quantiles == pytest.approx([0.092, 0.138, 0.296, 0.459, 0.495], abs=0.006)
    sizes = [regions(mask) for mask in masks[:10].flatten(0, 1) if mask.any()]
    assert np.mean([*chain(*sizes)]) == pytest.approx(24.3, rel=0.07)
    assert np.mean([len(own) for own in sizes]) == pytest.approx(2.40, rel=0.07)


class FakeImages:
    """In place of Images: two views, a label and no problem for each key."""

    seed = 3

    def __getitem__(self, key):
        return [torch.full((3, 4, 4), key), torch.full((3, 4, 4), -key)], 7, f"problem {key}"


def test_masks_are_drawn_for_a_block_from_the_seed_and_its_first_key():
    blocks = simdinov2.MaskedBlocks(FakeImages(), 6, 0.5, (0.1, 0.5))
    views, problems, masks, index = blocks[[5, 2, 9]]
    assert [view[:, 0, 0, 0].tolist() for view in views] == [[5, 2, 9], [-5, -2, -9]]
    assert list(problems) == ["problem 5", "problem 2", "problem 9"]
    assert masks.shape == (6, 36) and masks.any(1).sum() == 3
    assert torch.equal(masks, simdinov2.block_masks(6, 6, 0.5, (0.1, 0.5), (3, 5)))
    assert torch.equal(masks.flatten()[index], torch.ones(len(index), dtype=torch.bool))
    assert len(index) == masks.sum()
    assert torch.equal(blocks[[5, 1, 1]][2], masks) and not torch.equal(blocks[[6, 2, 9]][2], masks)


def test_parameter_groups_scale_and_decay_as_the_official_ones():
    # official, by its rule: 0.9 ** (depth + 1 - layer), the embeddings being layer 0, block i layer
    # i + 1, all else depth + 1; the patch embedding times 0.2; no decay of biases, norms and gammas
    head = simdinov2.ProjectionHead(32, 16, 8)
    student = nn.Module()
    student.backbone, student.head = tiny_vit2(), head
    groups = simdinov2.parameter_groups(student, 0.9, 0.2)
    ours = {p: (g["lr_scale"], g["decays"]) for g in groups for p in g["params"]}
    names = dict(student.named_parameters())
    assert len(ours) == len(names) == sum(len(group["params"]) for group in groups)
    for name, p in names.items():
        layer, block = 4, re.search(r"blocks\.(\d)", name)
        if block:
            layer = int(block[1]) + 1
        elif re.search("_token|pos_embed|patch_embed", name):
            layer = 0
        scale = 0.9 ** (4 - layer) * (0.2 if "patch_embed" in name else 1)
        decays = not re.search("bias|norm|gamma", name)
        assert ours[p] == (pytest.approx(scale), decays), name


def test_v2_recipe_is_the_official_one():
    args = simdinov2.parse_args(["--data_path", "x"])
    assert (args.batch_size, args.batch_size_per_gpu) == (1024, 128)
    assert (args.group_size, args.eps_sq, args.lr) == (128, 0.4, 0.004)
    assert (args.drop_path_rate, args.layerscale, args.num_register_tokens) == (0.2, 0.1, 4)
    assert (args.layerwise_decay, args.patch_embed_lr_mult) == (0.9, 0.2)
    assert (args.momentum_teacher, args.clip_grad, args.ibot_loss_weight) == (0.9, 3.0, 1.0)
    assert (args.mask_sample_probability, args.mask_ratio_min_max) == (0.5, [0.1, 0.5])


# ----------------------------------------------------------------------------------------- the data


def photo(width=48, height=32):
    """A smooth colour image."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(0.1 * x + k) * np.cos(0.15 * y) for k in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_load_image_reads_what_pillow_reads(tmp_path, mode, extension):
    path = tmp_path / f"image.{extension}"
    try:
        photo().convert(mode).save(path)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {extension} of mode {mode}")
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    image = simdino.load_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 48)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 2


@pytest.mark.parametrize("kind, extension", [("<u2", "png"), ("<i4", "tiff"), ("<f4", "tiff")])
def test_load_image_stretches_more_than_8_bits_from_lowest_to_highest(tmp_path, kind, extension):
    pixels = np.arange(32 * 48).reshape(32, 48) * 10 + 500
    Image.fromarray(pixels.astype(kind)).save(tmp_path / f"deep.{extension}")
    image = simdino.load_image(tmp_path / f"deep.{extension}")
    expected = np.linspace(0, 255, 32 * 48).reshape(32, 48)
    assert np.abs(image.numpy() - expected).max() <= 0.5
    Image.fromarray(np.full((4, 4), 7, kind)).save(tmp_path / f"flat.{extension}")
    assert not simdino.load_image(tmp_path / f"flat.{extension}").any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_load_image_applies_exif_orientation(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{extension}"
    photo().save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path))).astype(int)
    image = simdino.load_image(path).permute(1, 2, 0).numpy()
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 2


def test_images_are_drawn_by_seed_epoch_and_index_and_say_what_took_whose_place(tmp_path):
    names = [b"%d.png" % i for i in range(5)]
    for i in range(5):
        Image.new("L", (4, 4), 10 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"rubbish")

    def transform(image):
        return image[0, 0, 0].item(), torch.rand(()).item()

    images = simdino.Images(tmp_path, names, [0, 1, -1, 3, 4], transform, seed=6)
    first = [images[key] for key in range(10)]
    assert [label for (_, label, _) in first[3:5] + first[8:10]] == [3, 4, 3, 4]
    assert [value for ((value, _), _, _) in first[3:5]] == [30, 40]
    assert len({drawn for ((_, drawn), _, _) in first}) == 10, "anew each epoch"
    torch.rand(3)
    again = simdino.Images(tmp_path, names, [0, 1, -1, 3, 4], transform, seed=6)
    assert [again[key] for key in reversed(range(10))] == first[::-1]
    other = simdino.Images(tmp_path, names, [0, 1, -1, 3, 4], transform, seed=7)
    assert other[3][0][1] != first[3][0][1]
    for key, ((value, _), label, problem) in enumerate(first):
        assert (f"{tmp_path}/2.png' (" in problem) == (key % 5 == 2) == bool(problem)
        assert value == 10 * label, "of the image that took the place"
    assert [problem for (_, _, problem) in first if problem] == [first[2][2], first[7][2]]


def test_find_data_tells_train_from_val_and_why_there_is_no_val(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    touch("flat/b.png", "flat/a.JPG", "flat/notes.txt", "flat/.c.png")
    train, val, why = simdino.find_data(tmp_path / "flat")
    assert train == (tmp_path / "flat", [b"a.JPG", b"b.png"], [-1, -1])
    assert val is None and "no val/ or test/" in why
    touch(
        "r/train/x/deep/1.png", "r/train/y/1.png", "r/train/2.png", "r/val/y/1.png", "r/val/3.png"
    )
    train, val, why = simdino.find_data(tmp_path / "r")
    assert train[0] == tmp_path / "r/train"
    assert dict(zip(*train[1:])) == {b"2.png": -1, b"x/deep/1.png": 0, b"y/1.png": 1}
    assert val == (tmp_path / "r/val", [b"y/1.png"], [1])
    touch("r/val/z/1.png")
    assert simdino.find_data(tmp_path / "r")[1] is None
    assert "z are not in" in simdino.find_data(tmp_path / "r")[2]


def test_multicrop_cuts_shares_and_aspects_in_range():
    y, x = np.mgrid[:200, :250]
    image = torch.from_numpy(np.stack([x, y, 0 * x])).to(torch.uint8)  # pixels tell where they are
    crop, shares, aspects = simdino.MultiCrop(64, 32, (0.4, 1.0), (0.05, 0.4), 6), [], []

    def extent(channel, size):  # of what the crop shows, from its next to outermost pixels
        return (channel[-2] - channel[1]).item() * size / (size - 3)

    torch.manual_seed(0)
    for _ in range(150):
        views = crop(image)
        assert [tuple(view.shape) for view in views] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 6
        for view in views:
            w = extent(view[0].float().mean(0), view.shape[-1])
            h = extent(view[1].float().mean(1), view.shape[-1])
            shares.append(w * h / (200 * 250))
            aspects.append(w / h)
    shares = np.array(shares).reshape(150, 8)
    assert 0.36 < shares[:, :2].min() < 0.5 and 0.85 < shares[:, :2].max() < 1.06
    assert 0.04 < shares[:, 2:].min() < 0.07 and 0.36 < shares[:, 2:].max() < 0.43
    assert abs(shares[:, 2:].mean() - 0.225) < 0.01, "uniform in area"
    assert 0.68 < min(aspects) < 0.78 and 1.28 < max(aspects) < 1.45


def test_multicrop_resizes_as_torchvision_does(monkeypatch):
    tensor = torch.from_numpy(np.array(photo(96, 96))).permute(2, 0, 1)
    # Aspect 1 and the full area: the crop is the whole image.
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.full(shape, 0.5, **kind))
    image = simdino.MultiCrop(40, 40, (1.0, 1.0))(tensor)[0]
    bicubic = TF.InterpolationMode.BICUBIC
    expected = TF.resize(tensor, [40, 40], bicubic, antialias=True)
    assert (image.int() - expected.int()).abs().max() <= 1
    with_pillow = np.array(photo(96, 96).resize((40, 40), Image.BICUBIC)).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - with_pillow).max() <= 1


@pytest.mark.parametrize("height, width", [(1, 1), (1, 20000), (300, 1), (3, 7)])
def test_crops_of_degenerate_images(height, width):
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    assert all((view == 77).all() for view in simdino.MultiCrop(32, 16)(image))
    assert simdino.center_crop(image, 32).shape == (3, 32, 32)


def test_center_crop_is_resize_256_crop_224():
    image = torch.from_numpy(np.array(photo(500, 375))).permute(2, 0, 1)
    expected = TF.center_crop(
        TF.resize(image, 256, TF.InterpolationMode.BICUBIC, antialias=True), [224, 224]
    )
    difference = (simdino.center_crop(image, 224).int() - expected.int()).abs()
    assert difference.float().mean() < 1
    small = image[:, :32, :32]
    assert torch.equal(simdino.center_crop(small, 32), small)


@pytest.mark.parametrize("blur, solarize", [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)])
def test_photometric_equals_torchvision_image_by_image(monkeypatch, blur, solarize):
    draws, uniform, permutation = [], simdino.uniform, torch.randperm(4)
    monkeypatch.setattr(
        simdino, "uniform", lambda *a, **k: draws.append(uniform(*a, **k)) or draws[-1]
    )
    monkeypatch.setattr(torch, "randperm", lambda n: permutation)
    torch.manual_seed(0)
    n, used = 60, Counter()
    pixels = torch.randint(256, (n, 3, 24, 32), dtype=torch.uint8)
    pixels[::3] = pixels[::3, :1]  # gray
    pixels[1::3] = 255 * (pixels[1::3] > 127)  # saturated
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        draws.clear()
        permutation = torch.tensor(order)
        ours = simdino.photometric(pixels, blur, solarize)
        assert all(draw.shape == (n, 1, 1, 1) for draw in draws)
        for i, x in enumerate(pixels / 255):
            drawn = iter([draw[i].item() for draw in draws])

            def happens(operation, probability, drawn=drawn):
                yes = next(drawn) < probability
                used[operation] += yes
                return yes

            if happens("flip", 0.5):
                x = TF.hflip(x)
            jitter = happens("jitter", 0.8)
            for k in order:
                operation = (
                    TF.adjust_brightness,
                    TF.adjust_contrast,
                    TF.adjust_saturation,
                    TF.adjust_hue,
                )[k]
                factor = next(drawn)
                x = operation(x, factor) if jitter else x
            if happens("gray", 0.2):
                x = TF.rgb_to_grayscale(x, 3)
            blurred, sigma = happens("blur", blur), next(drawn)
            if blurred:
                x = TF.gaussian_blur(x, 13, sigma)
            if solarize and happens("solarize", solarize):
                x = TF.solarize(x, 128 / 255)
            assert next(drawn, None) is None
            expected = TF.normalize(x, simdino.MEAN, simdino.STD)
            # A value that rounding moves over the threshold of solarisation changes by much.
            wrong = ((ours[i] - expected).abs() > 1e-4).float().mean()
            assert wrong <= (0.01 if solarize else 0)
    assert used["jitter"] > used["flip"] > used["gray"] > 0
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]  # of brightness, …, hue
    for k, draw in zip(order, draws[2:6]):
        low, high = ranges[k]
        assert low <= draw.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < draw.max() <= high
    assert 0.1 <= draws[8].min() < 0.3 and 1.8 < draws[8].max() <= 2, "sigma"


def test_augment_blurs_and_solarizes_each_kind_of_view_as_often_as_dino(monkeypatch):
    seen = []
    monkeypatch.setattr(
        simdino, "photometric", lambda x, blur, solarize=0.0: seen.append((blur, solarize)) or x
    )
    views = [torch.full((2, 3, 8 - 4 * (i > 1), 8 - 4 * (i > 1)), i) for i in range(5)]
    out = simdino.augment(views)
    assert seen == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    assert all(torch.equal(a, b) for a, b in zip(out, views, strict=True))
    assert len(simdino.augment(views[:2])) == 2
    monkeypatch.undo()
    torch.manual_seed(0)
    pixels = [view.byte() for view in views]
    torch.manual_seed(5)
    first = simdino.augment(pixels)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, simdino.augment(pixels), strict=True))
    assert all(view.dtype == torch.float32 for view in first)


def test_blur_of_images_smaller_than_its_radius_keeps_the_mean_of_a_row():
    x = torch.rand(3, 3, 4, 2)
    out = simdino.gaussian_blur(x, torch.tensor([0.1, 1.0, 2.0]).view(3, 1, 1, 1))
    torch.testing.assert_close(out[0], x[0])
    assert out[2].std() < x[2].std() and torch.isfinite(out).all()
    torch.testing.assert_close(simdino.gaussian_blur(0 * x + 0.3, torch.ones(3)), 0 * x + 0.3)


def test_built_in_images_tell_nothing_by_brightness_and_are_always_the_same():
    for kind in range(10):
        images = [
            simdino.draw_pattern(kind, np.random.default_rng((0, kind, i))) for i in range(40)
        ]
        means = [np.mean(image) for image in images]
        assert abs(np.mean(means) - 128) < 6
    again = simdino.draw_pattern(9, np.random.default_rng((0, 9, 39)))
    assert np.array_equal(np.asarray(again), np.asarray(images[-1]))


# ------------------------------------------------------------------------------- the training step


def build(script, *flags):
    """The model that these flags make."""
    args = script.parse_args(list(map(str, [*TINY, *flags])))
    return script.build(args, torch.device("cpu"))


def block_of(script, own, seed=0):
    """A block, as step() takes it, of the images own (a slice) of 16."""
    sizes = enumerate([32, 32, 16, 16])
    pixels = [127 * (1 + waves(16, 3, size, size, a=0.3 + k)) for k, size in sizes]
    masks = waves(2, 16, 16, a=0.7) > 0.4
    masks[:, ::3] = False
    masks = masks[:, own].flatten(0, 1)
    hidden = [masks, masks.flatten().nonzero().flatten()] if script is simdinov2 else []
    return seed, [x[own].byte() for x in pixels], *hidden


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.params])


def test_a_step_clips_takes_adamws_and_moves_the_teacher(script):
    model = build(script, "--drop_path_rate", 0, "--clip_grad", 0.02)
    block, lr, decay, momentum = block_of(script, slice(8)), 1e-3, 0.1, 0.9
    before = [p.detach().clone() for p in model.params]
    figures, z_s, z_t = model.step([block], lr, decay, momentum)
    clipped = [p.grad.clone() for p in model.params]
    assert z_s.shape == (4, 8, 256) and z_t.shape == (2, 8, 256) and not z_s.requires_grad
    names = [name for name, _ in model.student.named_parameters()]
    for name, p, q, g, t in zip(
        names, before, model.params, clipped, model.teacher.parameters(), strict=True
    ):
        decays = decay * (p.ndim > 1)
        expected = p * (1 - lr * decays) - lr * g / (g.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(q.detach(), expected, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(t, momentum * p + (1 - momentum) * q, rtol=1e-5, atol=1e-8)

    free = build(script, "--drop_path_rate", 0, "--clip_grad", 0)
    free.step([block], lr, decay, momentum)
    grads = [p.grad for p in free.params]
    parts = [[i] for i in range(len(names))]  # v1: each tensor by itself; v2: backbone and head
    if script is simdinov2:
        heads = [name.startswith("head") for name in names]
        parts = [[i for i, head in enumerate(heads) if head == kind] for kind in (False, True)]
    cut = 0
    for part in parts:
        norm = torch.cat([grads[i].flatten() for i in part]).norm()
        cut += bool(norm > 0.02)
        for i in part:
            expected = grads[i] * min(1, 0.02 / (norm + 1e-6))
            torch.testing.assert_close(clipped[i], expected, rtol=1e-4, atol=1e-9)
    assert cut, "some gradient was too long"

    loss, comp, expa, *patch = figures.tolist()
    assert loss == pytest.approx(-comp - expa + sum(patch), abs=1e-6)
    rate = coding_rate((z_s[:2] + z_t) / 2, 0.4).mean().item()
    assert expa == pytest.approx((256 + 8) / (256 * 8) * rate, rel=1e-5)


def test_gammas_n_is_the_batch_size_not_that_of_a_round(script):
    for n, own, group in (512, 64, 64), (32, 8, 4), (8, 8, 8):
        flags = ["--batch_size", n, "--batch_size_per_gpu", own, "--group_size", group]
        model = build(script, *flags)
        assert model.rounds == n // own
        assert model.loss_fn.gamma == pytest.approx((256 + n) / (256 * n), rel=1e-12)
    assert build(script, "--gamma", 0.5).loss_fn.gamma == 0.5


def test_checkpointed_gradients_are_the_same_to_the_last_bit(script):
    plain, thrifty = (
        build(script, "--drop_path_rate", 0.4, "--clip_grad", 0, *more)
        for more in ([], ["--grad_checkpointing"])
    )
    runs = []
    for block in thrifty.student.backbone.blocks:
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    for seed in (3, 4):  # of stochastic depth: the second of the two differs
        for model in plain, thrifty:
            model.optimizer.param_groups[0]["lr"] = 0
            model.step([block_of(script, slice(8), seed)], 0.0, 0.0, 1.0)
        assert torch.equal(gradient_of(plain), gradient_of(thrifty))
        assert gradient_of(plain).isfinite().all() and gradient_of(plain).norm() > 0
        runs.append(gradient_of(plain))
    assert not torch.equal(runs[-1], next(x for x in runs if torch.is_tensor(x)))
    assert sum(run == 1 for run in runs if not torch.is_tensor(run)) == 2 * 2 * 2 * 4, "run twice"


# ------------------------------------------------------------------- one run, any number of processes

WORLD_CASES = {  # images that a process takes at a time by number of processes; group; all drawn
    "groups inside a process": ({1: 4, 2: 4, 4: 4}, 2, True),
    "groups across processes": ({1: 8, 2: 4, 4: 4}, 8, False),
    "the whole batch": ({1: 16, 2: 8, 4: 4}, 0, False),
}
WORLD_RUN = "--batch_size 8 --batch_size_per_gpu 2 --group_size 2 --epochs 4 --eval_freq 4"


def world_gradient(script, case, rank, world):
    """Figures and gradient of one real step in float64 on 16 images, those of this process."""
    own, group, drawn = WORLD_CASES[case][0][world], *WORLD_CASES[case][1:]
    flags = ["--batch_size", 16, "--batch_size_per_gpu", own, "--group_size", group]
    model = build(script, *flags, "--clip_grad", 0, "--drop_path_rate", 0.3 if drawn else 0)
    if world > 1:
        model.model = nn.parallel.DistributedDataParallel(
            model.student, gradient_as_bucket_view=True
        )
    blocks = range(rank, 16 // own, world)
    blocks = [block_of(script, slice(own * m, own * (m + 1)), 5 + m) for m in blocks]
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:  # what is drawn for blocks of other sizes would differ
            patch.setattr(script, "augment", lambda views: [x / 255 - 0.5 for x in views])
        figures = model.step(blocks, 0.0, 0.0, 1.0)[0]
    if world > 1:
        dist.all_reduce(figures)
    return (figures / world).tolist(), gradient_of(model)


def world_gradients(rank=0, world=1):
    """world_gradient of each script and case."""
    torch.set_default_dtype(torch.float64)  # of weights, draws and pixels
    try:
        return {
            (script.__name__, case): world_gradient(script, case, rank, world)
            for script in (simdino, simdinov2)
            for case in WORLD_CASES
        }
    finally:
        torch.set_default_dtype(torch.float32)


def world_worker(rank, world, ports, pictures, folder):
    """One of several processes: the gradients, and both scripts' runs."""
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = str(ports.pop())
    dist.init_process_group("gloo")
    gradients = world_gradients(rank, world)
    time.sleep(0.2)  # or, with torch 2.6, gloo may wait for its threads, and they for Python's lock
    dist.destroy_process_group()
    if rank == 0:
        torch.save(gradients, folder / "gradients")
    base = [*TINY, *shlex.split(WORLD_RUN), "--data_path", pictures, "--output_dir"]
    for script in simdino, simdinov2:
        for name, more in ("whole", []), ("half", ["--max_steps", 5]):
            if name == "half" and world != 2:
                continue
            os.environ["MASTER_PORT"] = str(ports.pop())
            with pytest.MonkeyPatch.context() as patch:
                train(patch, *base, folder / script.__name__ / name, *more, script=script)


@pytest.fixture(scope="module")
def worlds(pictures, tmp_path_factory):
    """By number of processes: the folder of their runs, and their gradients."""
    results = {}
    context = torch.multiprocessing.get_context("spawn")
    for world in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{world}")
        if world == 1:
            torch.save(world_gradients(), folder / "gradients")
            for script in simdino, simdinov2:
                with pytest.MonkeyPatch.context() as patch:
                    flags = [*TINY, *shlex.split(WORLD_RUN), "--data_path", pictures]
                    output = folder / script.__name__ / "whole"
                    train(patch, *flags, "--output_dir", output, script=script)
        else:
            ports, processes = [free_port() for _ in range(5)], []
            for rank in range(world):
                with pytest.MonkeyPatch.context() as patch:  # as torchrun does
                    patch.setenv("MASTER_ADDR", "127.0.0.1")
                    patch.setenv("RANK", str(rank))
                    patch.setenv("LOCAL_RANK", str(rank))
                    patch.setenv("WORLD_SIZE", str(world))
                    arguments = rank, world, ports, pictures, folder
                    processes.append(context.Process(target=world_worker, args=arguments))
                    processes[-1].start()
            deadline = time.monotonic() + 300
            while any(process.is_alive() for process in processes):
                if time.monotonic() > deadline or any(process.exitcode for process in processes):
                    for process in processes:  # one that waits for another would not end
                        process.kill()
                time.sleep(0.05)
            assert [process.exitcode for process in processes] == [0] * world
        results[world] = folder, torch.load(folder / "gradients", weights_only=True)
    return results


@pytest.mark.parametrize("case", WORLD_CASES)
def test_gradients_do_not_depend_on_the_number_of_processes(script, worlds, case):
    figures, gradient = worlds[1][1][script.__name__, case]
    for world in (2, 4):
        figures2, gradient2 = worlds[world][1][script.__name__, case]
        assert gradient2.dtype == torch.float64
        assert figures2 == pytest.approx(figures, rel=1e-9)
        assert (gradient2 - gradient).norm() < 1e-9 * gradient.norm()


def losses_of(folder):
    """Mean losses of the epochs that are over."""
    return [entry["train_loss"] for entry in log_of(folder)]


def check_same_run(folder, other):
    """The same run to rounding: that of float32, grown by 12 steps."""
    assert losses_of(other) == pytest.approx(losses_of(folder), abs=2e-5)
    assert log_of(other)[-1]["knn"] == pytest.approx(log_of(folder)[-1]["knn"], abs=100 / 12 + 0.1)
    ours, theirs = (weights_of(x) for x in (other, folder))
    assert ours["step"] == theirs["step"] == 12
    for part in "student", "teacher":
        for name, p in theirs[part].items():
            # AdamW makes full steps of gradients that are 0 but for rounding, as of keys' biases.
            moved = (ours[part][name] - p).abs().max()
            assert moved < 5e-6, (part, name)


def test_a_run_is_the_same_on_any_number_of_processes(script, worlds):
    alone, two, four = (worlds[world][0] / script.__name__ / "whole" for world in (1, 2, 4))
    for shared in two, four:
        check_same_run(alone, shared)
        met = [[entry["bad_images"] for entry in log_of(x)] for x in (alone, shared)]
        assert met[0] == met[1] and max(met[0]) == 1, "on whichever process it was met"


def test_a_run_of_two_processes_is_resumed_by_one(script, worlds, pictures, monkeypatch):
    half = worlds[2][0] / script.__name__ / "half"
    assert weights_of(half)["step"] == 5
    flags = [*TINY, *shlex.split(WORLD_RUN), "--data_path", pictures, "--output_dir", half]
    train(monkeypatch, *flags, script=script)
    check_same_run(worlds[1][0] / script.__name__ / "whole", half)


# ------------------------------------------------------------------------------------- the training

TINY = shlex.split(
    "--arch vit_nano --patch_size 8 --hidden_dim 32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --batch_size_per_gpu 8 --epochs 4 --warmup_epochs 1 --num_workers 0 "
    "--drop_path_rate 0.1 --lr 0.001 --eval_freq 2 --saveckp_freq 2"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageNet-style root: 3 kinds, 30 images to train on (one unreadable), 12 to judge by."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in ("train", 10), ("val", 4):
        for kind in range(3):
            folder = root / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((kind, i, count))
                image = simdino.draw_pattern(kind, rng, 40)
                image.save(folder / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    (root / "train" / "kind1" / "4.jpg").write_bytes(b"\xff\xd8 not an image")
    return root


@pytest.fixture(scope="module", params=[simdino, simdinov2], ids=["v1", "v2"])
def script(request):
    return request.param


def train(monkeypatch, *flags, script=simdino):
    """script.main() with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    script.main()


def weights_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def same(a, b):
    """Equality to the last bit of nested state dicts."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def finished(script, pictures, tmp_path_factory):
    """A run never interrupted, what it printed, and its folder."""
    output = tmp_path_factory.mktemp("finished")
    flags = [*TINY, "--data_path", pictures, "--output_dir", output]
    command = list(map(str, [sys.executable, script.__file__, *flags]))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_log_and_terminal_say_what_happened(script, finished):
    output, printed = finished
    entries = log_of(output)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    official = {"epoch", "train_loss", "train_comp_loss", "train_expa_loss", "train_lr", "train_wd"}
    ours = {"rank", "dist", "knn", "img_s", "data_wait", "mem_gb", "bad_images"}
    for entry in entries:
        patch_loss = {"train_ibot_loss"} if script is simdinov2 else set()
        assert entry.keys() == official | ours | patch_loss
        sum_of_terms = -entry["train_comp_loss"] - entry["train_expa_loss"]
        sum_of_terms += entry.get("train_ibot_loss", 0)
        assert entry["train_loss"] == pytest.approx(sum_of_terms, abs=1e-5)
        assert 1 <= entry["rank"] <= 16 and 0 <= entry["dist"] <= 2
        assert entry["img_s"] > 0 and 0 <= entry["data_wait"] <= 1
        assert (entry["mem_gb"] is None) != torch.cuda.is_available()
    assert [entry["knn"] is None for entry in entries] == [True, False, True, False]
    met = [entry["bad_images"] for entry in entries]
    assert set(met) <= {0, 1} and sum(met) >= 1, "an epoch leaves 6 of the 30 images out"
    lines = printed.splitlines()
    assert "1 x CPU" in lines[0] or torch.cuda.is_available()
    assert "8 images = 1 rounds x 1 processes x 8; 12 steps" in lines[0]
    assert sum("4.jpg" in line for line in lines) == 1, "the unreadable file is named once"
    assert sum(line.startswith("k-NN accuracy after epoch ") for line in lines) == 2
    assert sum(bool(re.match(r"epoch \d/4 step \d+/12 loss .* ETA", line)) for line in lines) >= 4


def test_checkpoint_opens_safely_and_its_teacher_loads_into_timm(script, finished):
    output, _ = finished
    state = weights_of(output)
    parts = {"student", "teacher", "optimizer", "scaler", "step", "epoch", "args", "log", "figures"}
    assert state.keys() == parts
    assert (state["step"], state["epoch"], state["figures"]) == (12, 4, [])
    assert type(state["args"]) is dict and state["args"]["arch"] == "vit_nano"
    assert state["log"] == log_of(output)
    assert all(name.split(".")[0] in ("backbone", "head") for name in state["teacher"])
    assert not same(state["student"], state["teacher"])
    assert {p.name for p in output.glob("checkpoint*")} == {
        "checkpoint.pth",
        "checkpoint0000.pth",
        "checkpoint0002.pth",
    }
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(32, 8, num_classes=0, embed_dim=96, depth=4, num_heads=3)
    if script is simdinov2:
        model = script.VisionTransformer(32, 8, **script.ARCHS["vit_nano"])
    backbone = {k[9:]: v for k, v in state["teacher"].items() if k.startswith("backbone.")}
    model.load_state_dict(backbone, strict=True)


def test_a_run_killed_and_resumed_with_other_workers_ends_with_the_same_bits(
    script, finished, pictures, tmp_path
):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    command = list(map(str, [sys.executable, script.__file__, *flags]))
    for epochs_done, workers in (1, 2), (2, 1):
        process = subprocess.Popen(
            [*command, "--num_workers", str(workers)], stdout=subprocess.DEVNULL
        )
        log, deadline = tmp_path / "log.txt", time.time() + 120
        while not (log.exists() and log.read_text().count("\n") >= epochs_done):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours, theirs = weights_of(tmp_path), weights_of(finished[0])
    for part in ("student", "teacher", "optimizer"):
        assert same(ours[part], theirs[part]), part
    timeless = ("epoch", "train_loss", "train_comp_loss", "train_expa_loss", "rank", "knn")
    for a, b in zip(log_of(tmp_path), log_of(finished[0]), strict=True):
        assert [a[key] for key in timeless] == [b[key] for key in timeless]


def test_max_steps_stops_inside_an_epoch_and_the_rest_follows(
    script, finished, pictures, tmp_path, monkeypatch
):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    train(monkeypatch, *flags, "--max_steps", 4, script=script)
    state = weights_of(tmp_path)
    assert (state["step"], state["epoch"], len(state["figures"])) == (4, 1, 1)
    train(monkeypatch, *flags, script=script)
    assert same(weights_of(tmp_path)["teacher"], weights_of(finished[0])["teacher"])
    for a, b in zip(log_of(tmp_path), log_of(finished[0]), strict=True):
        assert (a["epoch"], a["train_loss"]) == (b["epoch"], b["train_loss"])


def test_torchrun_starts_it(pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--max_steps", 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += ["--master_addr", "127.0.0.1", "--master_port", free_port(), SCRIPT, *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert weights_of(tmp_path)["step"] == 1
    assert "16 images = 1 rounds x 2 processes x 8" in result.stdout
    assert result.stdout.count("k-NN accuracy after") == 1, "by the first process alone"


def test_schedules_reproduce_the_official_log():
    # assets/SimDNIOv1_vitb16.txt, official: epoch, train_lr, train_wd; 2502 steps of 512 images
    lr = simdino.cosine_schedule(5e-4 * 512 / 256, 1e-6, 100 * 2502, 10 * 2502)
    wd = simdino.cosine_schedule(0.04, 0.4, 100 * 2502)
    assert len(lr) == len(wd) == 250200 and lr[0] == 0
    for epoch, train_lr, train_wd in (
        (0, 4.99820136696111e-05, 0.04002958960483863),
        (5, 0.0005500019984811545, 0.04268741890020718),
        (9, 0.0009500179863303882, 0.047963999953206556),
        (10, 0.0009998986293786, 0.04971127240897121),
        (30, 0.0008774605824675117, 0.11650238635897699),
        (50, 0.0005786384895696651, 0.22282607096534862),
        (75, 0.00017281778159634602, 0.34925663154705805),
        (99, 1.1014922368712136e-06, 0.3999703748959069),
    ):
        steps = slice(epoch * 2502, (epoch + 1) * 2502)
        assert lr[steps].mean() == pytest.approx(train_lr, rel=1e-9)
        assert wd[steps].mean() == pytest.approx(train_wd, rel=1e-9)


def test_the_schedules_are_those_of_the_flags(script, finished):
    # 12 steps of 8 images, 3 an epoch, warm-up of one: linspace(0, peak, 3), then half a cosine of 9
    entries = log_of(finished[0])
    peak = 0.001 * (8 / 256 if script is simdino else math.sqrt(8 / 1024))
    lr = [0, peak / 2, peak] + [
        1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)
    ]
    wd = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    for entry, own, decay in zip(entries, np.reshape(lr, (4, 3)), np.reshape(wd, (4, 3))):
        assert entry["train_lr"] == pytest.approx(own.mean(), rel=1e-9)
        assert entry["train_wd"] == pytest.approx(decay.mean(), rel=1e-9)


def test_a_step_takes_the_same_blocks_whatever_the_world_and_the_start():
    args = argparse.Namespace(batch_size=12, batch_size_per_gpu=3, seed=0)

    def steps(world, start=0):
        """Keys of each step from start to 8: blocks in order of round and process."""
        ranks = [simdino.block_keys(50, args, start, 8, rank, world) for rank in range(world)]
        rounds = [[*chain(*parts)] for parts in zip(*ranks, strict=True)]
        at = range(0, len(rounds), 4 // world)
        return [[*chain(*rounds[i : i + 4 // world])] for i in at]

    alone = steps(1)
    assert len(alone) == 8 and all(len(step) == 12 for step in alone)
    assert steps(2) == alone and steps(4) == alone
    assert steps(1, start=5) == alone[5:] and steps(2, start=5) == alone[5:]
    epochs = [[*chain(*alone[:4])], [*chain(*alone[4:])]]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert set(np.array(epochs[0]) // 50) == {0} and set(np.array(epochs[1]) // 50) == {1}
    assert epochs[0] != [key - 50 for key in epochs[1]], "in another order"
    args.seed = 1
    assert steps(1) != alone


def test_knn_counts_weighted_votes():
    train = F.normalize(torch.randn(200, 8), dim=-1), torch.arange(200) % 5
    val = F.normalize(torch.randn(60, 8), dim=-1), torch.arange(60) % 5
    hits = 0
    for z, y in zip(*val):
        cosines = sorted(((z @ t).item(), label.item()) for t, label in zip(*train))[-20:]
        votes = [sum(math.exp(c / 0.07) for c, label in cosines if label == k) for k in range(5)]
        hits += int(np.argmax(votes)) == y
    assert simdino.knn_accuracy(train, val) == pytest.approx(100 * hits / 60)


@pytest.mark.parametrize("world", [1, 3])
def test_every_image_is_judged_once_in_batches_of_one_size(monkeypatch, world):
    images = [(torch.full((3, 2, 2), i % 200).byte(), i, "bad" * (i == 7)) for i in range(700)]
    monkeypatch.setattr(simdino, "WORLD", world)
    found, sizes = [], set()

    def encode(x):
        sizes.add(len(x))
        return x.mean((2, 3))

    for rank in range(world):
        monkeypatch.setattr(simdino, "RANK", rank)
        found.append(simdino.embed(encode, images, 0, torch.device("cpu")))
    assert len({len(part) for part in found}) == 1, "to be gathered"
    found = torch.cat(found)
    labels = found[:, -1]
    assert sorted(labels[labels >= 0].tolist()) == [i for i in range(700) if i != 7]
    assert len(sizes) == 1 and sizes.pop() <= 256
    torch.testing.assert_close(found[:, :-1].norm(dim=-1), torch.ones(len(found)))


def test_official_flags_mean_what_they_mean_there(monkeypatch):
    # By the formula of official_loss: eps times the images of all GPUs / those of a group
    official = "--arch vit_base --patch_size 16 --local_crops_number 10 --eps 0.05 --coeff 1 "
    official = shlex.split(official + "--data_path x --output_dir y --batch_size_per_gpu 64")
    args = simdino.parse_args(official)
    assert (args.batch_size, args.group_size) == (64, 64)
    assert args.eps_sq == pytest.approx(0.05), "one GPU: eps^2 = eps on the whole batch of 64"
    monkeypatch.setattr(simdino, "WORLD", 8)
    args = simdino.parse_args(official)
    assert (args.batch_size, args.group_size) == (512, 64)
    assert args.eps_sq == pytest.approx(0.4)
    recipe = args.lr, args.epochs, args.warmup_epochs, args.momentum_teacher, args.clip_grad
    assert recipe == (5e-4, 100, 10, 0.996, 3.0)
    assert simdino.parse_args([*official, "--group_size", "32"]).eps_sq == pytest.approx(0.8)
    for world, images, eps_sq in ((8, 128, 0.4), (16, 64, 0.8), (2, 256, 0.1)):
        monkeypatch.setattr(simdino, "WORLD", world)
        args = simdino.parse_args([*official, "--batch_size_per_gpu", str(images)])
        assert (args.group_size, args.eps_sq) == (images, pytest.approx(eps_sq))


SMALL_IMAGES = "--data_path x --small_images"


def test_small_images_have_the_defaults_of_the_built_in_data(script):
    built_in, small = (vars(script.parse_args(flags.split())) for flags in ("", SMALL_IMAGES))
    differ = {key for key in built_in if built_in[key] != small[key]}
    assert differ == {"data_path", "small_images"}
    assert script.parse_args([*SMALL_IMAGES.split(), "--patch_size", "4"]).patch_size == 4


def test_the_published_batch_is_the_default_for_any_number_of_gpus(monkeypatch):
    for world in 1, 2, 4, 8:
        for script, batch, own in (simdino, 512, 64), (simdinov2, 1024, 128):
            monkeypatch.setattr(script, "WORLD", world)
            args = script.parse_args(["--data_path", "x"])
            assert (args.batch_size, args.batch_size_per_gpu, args.group_size) == (batch, own, own)
            args.arch, args.hidden_dim = "vit_nano", 32
            assert script.build(args, torch.device("cpu")).rounds == 8 // world
    monkeypatch.setattr(simdino, "WORLD", 16)  # more than rounds: each takes less
    args = simdino.parse_args(shlex.split("--data_path x --group_size 32"))
    assert (args.batch_size, args.batch_size_per_gpu, args.group_size) == (512, 32, 32)
    args = simdino.parse_args(shlex.split("--data_path x --batch_size_per_gpu 8 --group_size 64"))
    assert (args.batch_size, args.group_size) == (128, 64), "a step of one round, groups across"


@pytest.mark.parametrize(
    "world, flags, flag, fit",  # flags that do not fit; those that a reader would then give
    [
        (1, "--batch_size 100 --batch_size_per_gpu 64", "--batch_size", "64 or 128"),
        (3, "--batch_size 64 --group_size 1", "--batch_size", "63 or 126"),
        (
            4,
            "--batch_size 200 --batch_size_per_gpu 16 --group_size 16",
            "--batch_size",
            "192 or 256",
        ),
        (2, "--batch_size 96 --group_size 1", "--batch_size", None),
        (1, "--batch_size_per_gpu 48 --batch_size 96 --group_size 32", "--group_size", "48 or 24"),
        (4, "--batch_size_per_gpu 8 --group_size 12", "--group_size", "8 or 16 or 32"),
    ],
)
def test_sizes_that_do_not_fit_name_numbers_that_do(monkeypatch, script, world, flags, flag, fit):
    monkeypatch.setattr(script, "WORLD", world)
    flags = flags.split()
    if fit is None:
        assert script.parse_args(flags).batch_size_per_gpu == 48, "each takes a share"
        return
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(flags)
    message, numbers = stopped.value.code, fit.split(" or ")
    assert flag in message and (flag == "--group_size" or fit in message)
    for number in numbers:
        at = flags.index(flag) + 1
        fitting = script.parse_args([*flags[:at], number, *flags[at + 1 :]])
        assert getattr(fitting, flag[2:]) == int(number)
    if flag == "--group_size":
        own = int(flags[flags.index("--batch_size_per_gpu") + 1])
        assert f"divide {own}" in message and str(world * own) in message


@pytest.mark.parametrize("count", [30, 100, 511])
@pytest.mark.parametrize("world", [1, 4, 7])
def test_a_folder_smaller_than_a_step_names_a_batch_size_that_would_do(
    monkeypatch, pictures, count, world
):
    names = [b"kind0/0.png"] * count
    found = (pictures / "train", names, [-1] * count), None, ""
    monkeypatch.setattr(simdino, "WORLD", world)
    monkeypatch.setattr(simdino, "find_data", lambda root: found)
    flags = ["--data_path", str(pictures), "--batch_size_per_gpu", "64"]
    flags += ["--batch_size", str(64 * 8 * world)]
    with pytest.raises(SystemExit) as stopped:
        simdino.open_images(simdino.parse_args(flags), pictures)
    wanted = rf"has {count} images, .*: try --batch_size (\d+)$"
    number = re.search(wanted, stopped.value.code)[1]
    args = simdino.parse_args([*flags, "--batch_size", number])
    assert count / 2 < args.batch_size == int(number) <= count
    simdino.open_images(args, pictures)


def test_what_is_compiled_is_one_graph_a_shape_and_never_runs_uncompiled(
    monkeypatch, script, pictures, tmp_path
):
    graphs, calls, compile_any = Counter(), Counter(), torch.compile

    def backend(graph, inputs, name):
        graphs[name] += 1

        def run(*arguments):
            calls[name] += 1
            return graph(*arguments)

        return run

    backends = {}  # one for all blocks, or dynamo would keep their graphs apart

    def counting(function, **options):
        name = function.__name__
        return compile_any(
            function, backend=backends.setdefault(name, partial(backend, name=name)), **options
        )

    monkeypatch.setattr(torch, "compile", counting)
    for name in ("blend", "grayscale", "adjust_hue", "normalize"):  # main replaces them
        monkeypatch.setattr(script, name, getattr(script, name))
    torch._dynamo.reset()
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--compile"]
    train(monkeypatch, *flags, "--drop_path_rate", 0.3, "--max_steps", 4, script=script)
    torch._dynamo.reset()
    # A graph break would make more calls, a limit of recompilations fewer. Each step is 3 calls of
    # 4 blocks (the student's global and local views, the teacher's global ones) and 3 photometrics;
    # k-NN takes two sets of images.
    expected = {"_call_impl": 4 * (4 * 3 + 2), "blend": 4 * 9, "grayscale": 4 * 9}
    assert calls == expected | {"adjust_hue": 4 * 3, "normalize": 4 * 3 + 2}
    assert graphs["_call_impl"] == 5
    assert math.isfinite(log_of(tmp_path)[-1]["train_loss"])
    names = weights_of(tmp_path)["teacher"]
    assert all(re.match(r"(backbone|head)\.(?!.*_orig_mod)", name) for name in names)


def test_two_processes_compile_what_one_does(script, pictures, tmp_path):
    count = """
import atexit, collections, torch
graphs, calls, compile_any = collections.Counter(), collections.Counter(), torch.compile
def counting(function, **options):
    name = "blocks" if function.__name__ == "_call_impl" else "colours"
    return compile_any(function, backend=backends[name], **options)
def backend(name):
    def compiled(graph, inputs):
        graphs[name] += 1
        return lambda *x: calls.update([name]) or graph(*x)
    return compiled
backends = {name: backend(name) for name in ("blocks", "colours")}
torch.compile = counting
atexit.register(lambda: print("counted", RANK, graphs["blocks"], calls["blocks"]))
"""
    flags = [
        *TINY,
        "--data_path",
        pictures,
        "--output_dir",
        tmp_path,
        "--compile",
        "--batch_size",
        8,
    ]
    flags += ["--group_size", 4, "--drop_path_rate", 0.3, "--max_steps", 4]
    statuses, outputs = ends(launch(script, *flags, world=2, sabotage=count), 300)
    assert statuses == [0, 0], outputs
    for rank in range(2):  # 5 graphs; 4 steps of 3 passes and k-NN's 2, through 4 blocks
        assert f"counted {rank} 5 {4 * (4 * 3 + 2)}" in outputs[rank]


# ----------------------------------------------------------------------------- when things go wrong


def expect_stop(monkeypatch, *flags, script=simdino):
    """Run, expect one line and a status of 1 or 2; -> the line."""
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, *flags, script=script)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--arch", "resnet"], "--arch"),
        (["--local_crops_size", "15"], "--local_crops_size 15 is not a multiple of --patch_size 8"),
        (["--global_crops_size", "0"], "--global_crops_size 0"),
        (["--global_crops_scale", "0.9", "0.1"], "--global_crops_scale"),
        (["--eps_sq", "0"], "--eps_sq"),
        (["--eps", "-1"], "--eps -1"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0"),
        (["--batch_size_per_gpu", "8", "--batch_size", "0"], "--batch_size 0"),
        (["--group_size", "-1"], "--group_size -1"),
        (["--momentum_teacher", "1.5"], "--momentum_teacher"),
        (["--lr", "nan"], "--lr"),
        (["--gamma", "x"], "--gamma"),
        (["--batch_size_per_gpu", "64"], "has 30 images, fewer than a step: try --batch_size 30"),
        (["--batch_size_per_gpu", "9", "--group_size", "6"], "--group_size 6 does not fit"),
        (["--batch_size", "12"], "--batch_size 12 is not made of rounds of 1 x 8 images: 8 or 16"),
        (["--warmup_epochs", "4"], "--warmup_epochs"),
        (["--seed", "-1"], "--seed"),
        (["--data_path", "/nowhere"], "/nowhere is not a folder"),
        (["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_bad_arguments_get_one_line(monkeypatch, pictures, tmp_path, flags, named):
    base = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out"]
    assert named in expect_stop(monkeypatch, *base, *flags)


def test_folders_without_readable_images_get_one_line(monkeypatch, tmp_path):
    flags = [*TINY, "--output_dir", tmp_path / "out", "--data_path", tmp_path / "data"]
    (tmp_path / "data").mkdir()
    assert "has 0 images" in expect_stop(monkeypatch, *flags)
    for i in range(20):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(b"rubbish")
    assert "can be read" in expect_stop(monkeypatch, *flags)


def test_flat_folders_and_class_folders_train_without_labels(
    monkeypatch, capsys, pictures, tmp_path
):
    class_folders = pictures / "train"
    flat = class_folders / "kind0"
    for name, folder in (("a", class_folders), ("b", flat)):
        flags = [*TINY, "--output_dir", tmp_path / name, "--data_path", folder]
        train(monkeypatch, *flags, "--max_steps", 1)
        assert log_of(tmp_path / name)[0]["knn"] is None
        assert re.search("no k-NN accuracy: .*no val/ or test/", capsys.readouterr().out)


class Code:
    """Opened without weights_only, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_checkpoints_that_cannot_be_resumed_are_left_as_they_are(
    monkeypatch, script, finished, pictures, tmp_path
):
    good = (finished[0] / "checkpoint.pth").read_bytes()
    path, flags = tmp_path / "checkpoint.pth", [*TINY, "--data_path", pictures]
    flags += ["--output_dir", tmp_path]
    torch.save({"student": Code(tmp_path / "mark")}, tmp_path / "hostile")
    torch.save([1, 2], tmp_path / "other")
    hostile, other = ((tmp_path / name).read_bytes() for name in ("hostile", "other"))
    for content in (b"", b"junk", good[: len(good) // 2], good[:-10], hostile, other):
        path.write_bytes(content)
        assert f"cannot resume {path}" in expect_stop(monkeypatch, *flags, script=script)
        assert path.read_bytes() == content
    assert not (tmp_path / "mark").exists()
    path.write_bytes(good)
    for flag, value in ("--arch", "vit_tiny"), ("--patch_size", "16"), ("--hidden_dim", "16"):
        message = expect_stop(monkeypatch, *flags, flag, value, script=script)
        assert f"its {flag[2:]} is" in message and f"not {value}" in message
        assert path.read_bytes() == good


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    monkeypatch, script, pictures, tmp_path
):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    train(monkeypatch, *flags, "--max_steps", 3, script=script)
    before, augment = (tmp_path / "checkpoint.pth").read_bytes(), script.augment
    with monkeypatch.context() as patch:
        patch.setattr(script, "augment", lambda views: [x + math.nan for x in augment(views)])
        message = expect_stop(patch, *flags, script=script)
    assert "the loss is not finite at step 4" in message and "--lr" in message
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    output = tmp_path / "new"
    message = expect_stop(
        monkeypatch, *flags, "--output_dir", output, "--lr", "1e30", script=script
    )
    assert "not finite" in message and "--lr" in message
    assert not (output / "checkpoint.pth").exists()


def test_half_precision_and_one_group_train_on_a_cpu_too(monkeypatch, script, pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--group_size", 0, "--epochs", 2]
    for amp in ("bf16", "fp16"):
        train(monkeypatch, *flags, "--output_dir", tmp_path / amp, "--amp", amp, script=script)
        assert log_of(tmp_path / amp)[-1]["knn"] is not None
        assert bool(weights_of(tmp_path / amp)["scaler"]) == (amp == "fp16")


def test_the_teacher_stays_outside_the_graph(monkeypatch, script, pictures, tmp_path):
    seen, foreach_lerp = [], torch._foreach_lerp_

    def spy(teacher, student, weight):
        foreach_lerp(teacher, student, weight)
        seen.extend(p.requires_grad for p in teacher)

    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--max_steps", 2]
    train(monkeypatch, *flags, script=script)
    assert seen and not any(seen)


def test_a_folder_that_cannot_be_written_gets_one_line(monkeypatch, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "file"]
    assert "--output_dir" in expect_stop(monkeypatch, *flags)


def test_collapse_is_announced_and_its_cause_named(monkeypatch, capsys, script, pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "a", "--gamma", 0]
    train(monkeypatch, *flags, script=script)
    assert "warning: collapse: try a smaller --eps_sq, a larger --gamma" in capsys.readouterr().out
    (tmp_path / "flat").mkdir()
    for i in range(16):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "flat" / f"{i}.png")
    flags = [*TINY, "--data_path", tmp_path / "flat", "--output_dir", tmp_path / "b", "--gamma", 0]
    train(monkeypatch, *flags, script=script)
    assert "warning: collapse: the images are (nearly) constant" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu(monkeypatch, script, pictures, tmp_path, amp):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--amp", amp, "--compile"]
    train(monkeypatch, *flags, script=script)
    assert all(math.isfinite(entry["train_loss"]) for entry in log_of(tmp_path))
    assert all(
        name.split(".")[0] in ("backbone", "head") for name in weights_of(tmp_path)["teacher"]
    )


# -------------------------------------------------------------------------------- faults: the labels


def tree(root, *paths):
    """Images of one pixel at these paths below root, 8 in a path that ends with a slash."""
    for path in paths:
        for name in [f"{path}{i}.png" for i in range(8)] if path.endswith("/") else [path]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1)).save(root / name, format="png")
    return root


def found(root, script=simdino):
    """-> names to train on, labels to judge by (None: none), why there are none."""
    (_, names, _), val, why = script.find_data(root)
    return [name.decode() for name in names], val and val[2], why


def test_hidden_and_system_folders_and_files_do_not_exist(tmp_path, script):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    hidden = ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN", "lost+found"
    tree(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "val") for name in hidden))
    tree(tmp_path, "train/a/._1.png", "train/a/.hidden.png", "val/b/.deep/x/1.png")
    assert found(tmp_path, script)[:2] == (["a/1.png", "b/1.png"], [0, 1])


def test_a_label_is_the_first_folder_below_the_split(tmp_path, script):
    tree(tmp_path, "train/a/x/1.png", "train/a/y/z/1.png", "train/b/x/1.png", "train/0.png")
    tree(tmp_path, "val/b/1.png", "val/a/y/1.png", "val/0.png", "test/a/1.png")
    (_, names, labels), val, _ = script.find_data(tmp_path)
    assert names == [b"0.png", b"a/x/1.png", b"a/y/z/1.png", b"b/x/1.png"]
    assert labels == [-1, 0, 0, 1]
    assert val == (tmp_path / "val", [b"a/y/1.png", b"b/1.png"], [0, 1])


@pytest.mark.parametrize(
    "paths, reason",
    [
        (["train/", "val/"], "fewer than two class folders"),
        (["train/Cat/", "train/Dog/", "val/cat/1.png", "val/Dog/1.png"], "cat are not in"),
        (["train/a/", "train/b/", "validation/a/1.png"], "no val/ or test/"),
        (["train/a/", "train/b/"], "no val/ or test/"),
        (["train/a/", "val/a/1.png"], "fewer than two class folders"),
        (["train/a/", "train/b/", "val/1.png"], "no images in class folders"),
        (["a/", "b/"], "no val/ or test/"),
    ],
)
def test_where_there_is_no_accuracy_one_line_says_why(monkeypatch, capsys, tmp_path, paths, reason):
    tree(tmp_path / "data", *paths)
    flags = [*TINY, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    train(monkeypatch, *flags, "--max_steps", 1)
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if "accuracy" in line]
    assert len(said) == 1 and said[0].startswith("no k-NN accuracy: ") and reason in said[0]
    assert [entry["knn"] for entry in log_of(tmp_path / "out")] == [None]


@pytest.mark.parametrize(
    "train_name, val_name",
    [("train2017", "val2017"), ("training", "validation"), ("Train", "Val"), ("TRAIN", "TEST")]
    + [("train_images", "val_images"), ("train-2", "valid")],
)
def test_splits_under_other_names_are_not_trained_on(
    monkeypatch, tmp_path, train_name, val_name, script
):
    tree(tmp_path / "data", f"{train_name}/a/", f"{val_name}/a/", f"{val_name}/b/")
    flags = [*TINY, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    message = expect_stop(monkeypatch, *flags, script=script)
    assert train_name in message and val_name in message


# ---------------------------------------------------------------------------------- faults: the runs


@pytest.fixture(scope="module")
def begun(script, pictures, tmp_path_factory):
    """The folder of a run of 3 steps that may go on; tests copy it."""
    output = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = [*TINY, "--data_path", pictures, "--output_dir", output, "--max_steps", 3]
        train(monkeypatch, *flags, script=script)
    return output


def test_the_same_command_with_another_method_does_not_resume(
    monkeypatch, capsys, script, begun, pictures, tmp_path
):
    output = Path(shutil.copytree(begun, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    flags = [*TINY, "--data_path", pictures, "--output_dir", output]
    for change in (
        "--seed 1",
        "--lr 0.1",
        "--eps_sq 4",
        "--gamma 0.5",
        "--hidden_dim 16",
        "--group_size 4",
        "--expa_type 0",
        "--momentum_teacher 0.95",
        "--local_crops_number 3",
        "--drop_path_rate 0",
        "--weight_decay 0.1",
    ):
        message = expect_stop(monkeypatch, *flags, *change.split(), script=script)
        flag, value = change[2:].split()
        assert f"{flag} is " in message and value in message and "--output_dir" in message
    all_three = ["--seed", 1, "--lr", 0.1, "--eps_sq", 4]
    message = expect_stop(monkeypatch, *flags, *all_three, script=script)
    assert all(f"{flag} is " in message for flag in ("seed", "lr", "eps_sq"))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "k-NN accuracy" not in capsys.readouterr().out


def test_another_data_set_of_as_many_images_is_another_run(
    monkeypatch, script, begun, pictures, tmp_path
):
    output, other = Path(shutil.copytree(begun, tmp_path / "out")), tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "train" / "kind0" / "0.png").rename(other / "train" / "kind0" / "new.png")
    before = (output / "checkpoint.pth").read_bytes()
    flags = [*TINY, "--output_dir", output, "--data_path", other]
    assert "image_list is " in expect_stop(monkeypatch, *flags, script=script)
    assert (output / "checkpoint.pth").read_bytes() == before


def test_what_leaves_the_method_as_it_is_may_differ(monkeypatch, script, begun, pictures, tmp_path):
    output = Path(shutil.copytree(begun, tmp_path / "out"))
    moved = shutil.copytree(pictures, tmp_path / "moved")
    flags = [*TINY, "--output_dir", output, "--data_path", moved, "--max_steps", 4]
    flags += ["--epochs", 5, "--num_workers", 1, "--saveckp_freq", 1, "--eval_freq", 0]
    train(monkeypatch, *flags, "--grad_checkpointing", "--amp", "bf16", script=script)
    assert weights_of(output)["step"] == 4


def test_judging_never_and_running_again_change_no_figure(
    monkeypatch, capsys, script, pictures, tmp_path
):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    train(monkeypatch, *flags, "--eval_freq", 0, "--max_steps", 6, script=script)
    assert [entry["knn"] for entry in log_of(tmp_path)] == [None, None]
    train(monkeypatch, *flags, "--max_steps", 7, script=script)
    entries = log_of(tmp_path)
    assert [entry["knn"] is None for entry in entries] == [True, False, False]
    capsys.readouterr()
    train(monkeypatch, *flags, "--max_steps", 7, script=script)
    assert log_of(tmp_path) == entries and weights_of(tmp_path)["log"] == entries
    assert "k-NN accuracy after" not in capsys.readouterr().out


CLAIM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import simdino
simdino.claim(Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(
    monkeypatch, script, pictures, tmp_path
):
    pytest.importorskip("fcntl")
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--max_steps", 1]
    command = [sys.executable, "-c", CLAIM, Path(script.__file__).parent, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == b"held\n"
        message = expect_stop(monkeypatch, *flags, script=script)
        assert "another run" in message and str(tmp_path) in message
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        first.kill()
    train(monkeypatch, *flags, script=script)
    assert weights_of(tmp_path)["step"] == 1


# -------------------------------------------------------------------------- faults: work is not lost


def test_an_epoch_is_saved_before_it_is_judged(monkeypatch, script, pictures, tmp_path):
    """k-NN of a val/ that cannot be read any more loses nothing, and is made up for."""
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    flags = [*TINY, "--data_path", data, "--output_dir", tmp_path / "out"]
    knn = script.knn

    def broken(*arguments):
        for path in (data / "val").rglob("*.*"):
            path.write_bytes(b"rubbish")
        return knn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "knn", broken)
        message = expect_stop(patch, *flags, script=script)
    assert "can be read" in message
    assert weights_of(tmp_path / "out")["step"] == 6
    assert [entry["knn"] for entry in log_of(tmp_path / "out")] == [None, None]
    shutil.copytree(pictures / "val", data / "val", dirs_exist_ok=True)
    train(monkeypatch, *flags, script=script)
    train(monkeypatch, *flags[:-1], tmp_path / "whole", script=script)
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert same(ours["student"], theirs["student"]) and same(ours["teacher"], theirs["teacher"])
    accuracies = [[entry["knn"] for entry in state["log"]] for state in (ours, theirs)]
    assert accuracies[0] == accuracies[1] and accuracies[0][1] is not None


def test_an_exception_in_knn_ends_the_run_after_the_save(monkeypatch, script, pictures, tmp_path):
    def broken(*_):
        raise RuntimeError("no k-NN today")

    monkeypatch.setattr(script, "embed", broken)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    assert "no k-NN today" in expect_stop(monkeypatch, *flags, script=script)
    assert weights_of(tmp_path)["step"] == 6


def test_a_val_of_unreadable_images_is_found_at_the_start(monkeypatch, script, pictures, tmp_path):
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    for path in (data / "val").rglob("*.*"):
        path.write_bytes(b"rubbish")
    flags = [*TINY, "--data_path", data, "--output_dir", tmp_path / "out"]
    message = expect_stop(monkeypatch, *flags, script=script)
    assert "can be read" in message and str(data / "val") in message
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_a_folder_that_cannot_be_written_is_found_at_the_start(
    monkeypatch, capsys, script, pictures, tmp_path
):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    for output in tmp_path / "file", tmp_path / "file" / "below", tmp_path / "locked":
        flags = [*TINY, "--data_path", pictures, "--output_dir", output]
        message = expect_stop(monkeypatch, *flags, script=script)
        assert f"--output_dir {output} (" in message
    assert "step 1" not in capsys.readouterr().out


def test_a_disk_without_room_for_a_checkpoint_is_found_at_the_start(
    monkeypatch, capsys, script, pictures, tmp_path
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path]
    message = expect_stop(monkeypatch, *flags, script=script)
    assert str(tmp_path) in message and "room" in message
    assert "epoch 1" not in capsys.readouterr().out


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    monkeypatch, script, begun, pictures, tmp_path
):
    """The limit on a file's size makes a write fail half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    output = Path(shutil.copytree(begun, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    flags = [*TINY, "--data_path", pictures, "--output_dir", output, "--max_steps", 5]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        message = expect_stop(monkeypatch, *flags, script=script)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message and str(output / "checkpoint.pth") in message
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    train(monkeypatch, *flags, script=script)
    assert weights_of(output)["step"] == 5


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of 8 MB, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_with_room_for_one_checkpoint_keeps_it(monkeypatch, pictures, small_disk):
    flags = [*TINY, "--data_path", pictures, "--output_dir", small_disk]
    message = expect_stop(monkeypatch, *flags)
    assert "cannot write" in message and str(small_disk) in message
    assert weights_of(small_disk)["step"] == 3
    assert {path.name for path in small_disk.iterdir()} == {".lock", "checkpoint.pth", "log.txt"}


def test_long_epochs_are_saved_every_quarter_of_an_hour(monkeypatch, script, pictures, tmp_path):
    clock, saves, write = [0.0], [], script.write

    def monotonic():  # a minute at each look
        clock[0] += 60
        return clock[0]

    def spy(path, dump):
        saves.append(path.name)
        write(path, dump)

    fake = SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(script, "time", fake)
    monkeypatch.setattr(script, "write", spy)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--batch_size_per_gpu", 1]
    train(monkeypatch, *flags, "--batch_size", 1, "--epochs", 2, "--eval_freq", 0, script=script)
    first_epoch = saves.index("checkpoint0000.pth")
    assert saves[:first_epoch].count("checkpoint.pth") == 1, "30 steps are 3 looks: no save is due"

    clock[0], saves[:] = 0.0, []
    fake.monotonic = lambda: clock.__setitem__(0, clock[0] + 1000) or clock[0]
    flags[flags.index("--output_dir") + 1] = tmp_path / "slow"
    train(monkeypatch, *flags, "--batch_size", 1, "--epochs", 2, "--eval_freq", 0, script=script)
    first_epoch = saves.index("checkpoint0000.pth")
    assert saves[:first_epoch].count("checkpoint.pth") >= 3


def launch(script, *flags, world=1, launcher=False, stdout=subprocess.PIPE, sabotage="", **env):
    """Processes of a run, one a rank, or the launcher alone. sabotage: code run before main."""
    folder, name = Path(script.__file__).parent, script.__name__
    start, port = [script.__file__], str(free_port())
    if sabotage:
        code = f"import os, sys\nsys.path.insert(0, {str(folder)!r})\nimport {name} as script\n"
        code += f"RANK = script.RANK\n{sabotage}\n"
        start = ["-c", code + "sys.excepthook = script.last_words\nscript.main()"]
    command = [sys.executable]
    if launcher:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command += ["--master_addr", "127.0.0.1", "--master_port", port]
    command += [*start, *map(str, flags)]
    ranks = []
    for rank in range(1 if launcher else world):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
        variables |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        variables = env if launcher or world == 1 else variables | env
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        process = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**clean, **variables},
            start_new_session=True,
        )
        ranks.append(process)
    return ranks


def ends(ranks, seconds=120):
    """Statuses and outputs of processes that all must end by themselves."""
    outputs = []
    try:
        for process in ranks:
            outputs.append(process.communicate(timeout=seconds)[0])
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [process.returncode for process in ranks], outputs


def wait_for(path, ranks, seconds=120):
    """Until the file is there; the processes must live until then."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert all(process.poll() is None for process in ranks) and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(
    monkeypatch, script, pictures, tmp_path, number, status
):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out"]
    flags += ["--epochs", 4000, "--eval_freq", 0, "--saveckp_freq", 0]
    ranks = launch(script, *flags)
    wait_for(tmp_path / "out" / "log.txt", ranks)
    ranks[0].send_signal(number)
    statuses, (printed,) = ends(ranks)
    assert statuses == [status]
    assert "Traceback" not in printed and printed.count(number.name) == 1
    step = weights_of(tmp_path / "out")["step"]
    last = printed.splitlines()[-1]
    assert last.startswith(number.name)
    assert ": saved " not in last or f"at step {step}" in last
    flags += ["--max_steps", step + 2]
    train(monkeypatch, *flags, script=script)
    train(monkeypatch, *flags, "--output_dir", tmp_path / "whole", script=script)
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert ours["step"] == step + 2
    for part in ("student", "teacher", "optimizer"):
        assert same(ours[part], theirs[part]), part


def test_two_processes_agree_on_a_signal_and_go_on_to_the_same_bits(pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--batch_size", 8, "--batch_size_per_gpu", 4]
    flags += ["--epochs", 4000, "--eval_freq", 0, "--saveckp_freq", 0, "--output_dir"]
    out, whole = tmp_path / "out", tmp_path / "whole"

    # One of two gets it
    ranks = launch(simdino, *flags, out, world=2)
    wait_for(out / "log.txt", ranks)
    ranks[1].send_signal(signal.SIGINT)
    statuses, printed = ends(ranks)
    first = weights_of(out)["step"]
    if statuses[0] == 130:  # it came within a step, not between two epochs
        assert statuses == [130, 130]
        assert "".join(printed).count("SIGINT: saved") == 1
    assert 0 not in statuses and "Traceback" not in "".join(printed)

    # The launcher gets it, and hands it on
    before = (out / "checkpoint.pth").stat().st_mtime_ns
    ranks = launch(simdino, *flags, out, world=2, launcher=True)
    deadline = time.monotonic() + 120
    while (out / "checkpoint.pth").stat().st_mtime_ns == before:
        assert ranks[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    ranks[0].send_signal(signal.SIGTERM)
    statuses, (printed,) = ends(ranks)
    assert statuses != [0] and printed.count("SIGTERM: ") == 1
    second = weights_of(out)["step"]
    assert second > first

    flags += [out, "--max_steps", second + 2]
    pair = [launch(simdino, *flags, "--output_dir", f, world=2) for f in (out, whole)]
    assert [ends(ranks)[0] for ranks in pair] == [[0, 0], [0, 0]]
    ours, theirs = weights_of(out), weights_of(whole)
    assert ours["step"] == second + 2
    for part in ("student", "teacher", "optimizer"):
        assert same(ours[part], theirs[part]), part


# ----------------------------------------------------------------- faults: what is printed, and names


def test_what_is_printed_into_a_file_is_there_when_the_run_is_killed(script, pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out", "--epochs", 4000]
    with (tmp_path / "printed").open("w") as file:
        ranks = launch(script, *flags, "--eval_freq", 0, stdout=file)
        wait_for(tmp_path / "out" / "log.txt", ranks)
        ranks[0].kill()
        ranks[0].wait()
    printed = (tmp_path / "printed").read_text()
    assert "4000 epochs of 30 images" in printed and "epoch 1/4000 step 3/12000" in printed


def test_names_that_are_no_valid_text_are_read_and_printed_on_an_ascii_terminal(
    script, pictures, tmp_path
):
    data = tmp_path / "d\u00e9j\u00e0"
    data.mkdir()
    good = (pictures / "train" / "kind0" / "1.jpg").read_bytes()
    names = [b"caf\xe9.jpg", b"\xff\xfe.jpg", "\u00e9t\u00e9.jpg".encode(), "\u96ea.jpg".encode()]
    try:
        for name in names + [b"%d.jpg" % i for i in range(6)]:
            with open(os.path.join(os.fsencode(data), name), "wb") as file:
                file.write(good)
        for name in (b"bad\xe9.jpg", "bad\u96ea.png".encode()):
            with open(os.path.join(os.fsencode(data), name), "wb"):
                pass
    except OSError:
        pytest.skip("needs a file system that takes any name")
    flags = [*TINY, "--data_path", data, "--output_dir", tmp_path / "out", "--epochs", 2]
    flags += ["--batch_size", 12, "--batch_size_per_gpu", 12]
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    ranks = launch(script, *flags, PYTHONCOERCECLOCALE="0", **ascii_only)
    statuses, (printed,) = ends(ranks)
    assert statuses == [0], printed
    assert printed.isascii() and "of 12 images" in printed
    assert len([line for line in printed.splitlines() if "unreadable" in line]) == 2
    assert [entry["bad_images"] for entry in log_of(tmp_path / "out")] == [2, 2]


# --------------------------------------------------------------------------- faults: images, folders


def test_the_replacements_of_unreadable_images_are_spread(tmp_path, script):
    for i in range(200):
        (tmp_path / f"a{i:03}.png").write_bytes(b"")
        Image.new("RGB", (2, 1), (i, 0, 0)).save(tmp_path / f"b{i:03}.png")
    images = script.Images(tmp_path, script.find_images(tmp_path), [-1] * 400, lambda x: x)
    taken = [images[i][0][0, 0, 0].item() for i in range(200)]
    assert len(set(taken)) > 100, "of 200 draws from 200, about 126 are different"
    assert max(map(taken.count, taken)) < 10
    assert [images[i][0][0, 0, 0].item() for i in range(200)] == taken
    assert [images[400 + i][0][0, 0, 0].item() for i in range(200)] != taken, "another epoch"
    assert images[7][2].count("a007.png") >= 1 and images[207][2] == ""


def test_unreadable_images_cost_few_reads_however_many_they_are(monkeypatch, tmp_path, script):
    reads = []

    def load_image(path):
        reads.append(path)
        if "bad" in path:
            raise OSError(path)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    monkeypatch.setattr(script, "load_image", load_image)
    names = [b"bad%d" % i for i in range(5000)] + [b"good%d" % i for i in range(5000)]
    images = script.Images(tmp_path, names, [-1] * 10_000, lambda x: x)
    for i in range(100):
        images[i]
    assert len(reads) < 1000, "about 300: each needs two draws on average"
    reads.clear()
    with pytest.raises(OSError, match="can be read"):
        script.Images(tmp_path, names[:5000], [-1] * 5000, lambda x: x)[0]
    assert len(reads) <= 1000


def test_the_first_unreadable_images_are_named_with_the_reason_and_all_are_counted(
    monkeypatch, capsys, script, pictures, tmp_path
):
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    for path in (data / "train" / "kind0").iterdir():
        path.write_bytes(b"")
    Image.new("RGB", (300, 300)).save(data / "train" / "kind1" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    flags = [*TINY, "--data_path", data, "--output_dir", tmp_path / "out", "--eval_freq", 0]
    flags += ["--batch_size", 30, "--batch_size_per_gpu", 30]
    train(monkeypatch, *flags, script=script)
    printed = capsys.readouterr().out.splitlines()
    assert [entry["bad_images"] for entry in log_of(tmp_path / "out")] == [12] * 4
    named = [line for line in printed if "kind" in line]
    assert 1 <= len(named) <= 5 and all(re.search(r"kind.*\(.+\)", line) for line in named)
    assert sum("12 images" in line for line in printed) == 4, "the count, each epoch"


@pytest.mark.parametrize("name", ["guard.png", "truncated.png", "empty.jpg", "bands.tif"])
def test_the_reason_why_an_image_is_unreadable_is_said(monkeypatch, tmp_path, name):
    path, reason = tmp_path / name, r"cannot identify|truncated"
    if name == "bands.tif":  # 8 samples of 8 bits in a pixel, 1 x 1
        entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 8, 200), (259, 3, 1, 1)]
        entries += [
            (262, 3, 1, 1),
            (273, 4, 1, 220),
            (277, 3, 1, 8),
            (278, 3, 1, 1),
            (279, 4, 1, 8),
        ]
        body = b"".join(
            tag.to_bytes(2, "little")
            + kind.to_bytes(2, "little")
            + count.to_bytes(4, "little")
            + value.to_bytes(4, "little")
            for tag, kind, count, value in entries
        )
        head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
        body = (head + body + bytes(4)).ljust(200, b"\0") + b"\x08\0" * 8
        path.write_bytes(body.ljust(220, b"\0") + bytes(range(8)))
        reason = r"mode|identify"
    elif name == "guard.png":
        Image.new("L", (300, 300)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        reason = "exceeds limit"
    elif name == "truncated.png":
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    else:
        path.write_bytes(b"")
    with pytest.raises(OSError, match=reason) as error:
        simdino.load_image(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_unreadable_images_are_left_out_of_the_accuracy(capsys, script, pictures, tmp_path):
    def accuracy(root):
        splits = [script.Images(*split, lambda x: x[:, :40, :40]) for split in judged(root)]
        backbone = torch.nn.Flatten()
        model = SimpleNamespace(teacher=SimpleNamespace(backbone=backbone))
        model.device, model.autocast = torch.device("cpu"), contextlib.nullcontext()
        return script.knn(model, splits, 0)

    def judged(root):
        return script.find_data(root)[:2]

    broken, fewer = (
        Path(shutil.copytree(pictures, tmp_path / name)) for name in ("broken", "fewer")
    )
    for i in range(3):
        for split in "train", "val":
            name = f"{split}/kind{i}/{i}.{('png', 'jpg', 'webp')[i % 3]}"
            (broken / name).write_bytes(b"rubbish")
            (fewer / name).unlink()
    (fewer / "train" / "kind1" / "4.jpg").unlink()
    assert accuracy(broken) == accuracy(fewer)
    assert re.search(r"\b[37] images", capsys.readouterr().out), "their number is said"


def stretched(values):
    return np.round(255 * (values - values.min()) / (values.max() - values.min())).astype(int)


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_16_bit_images_are_stretched_to_their_own_range(tmp_path, script, top, extension):
    values = np.linspace(top // 8, top, 48).round().reshape(6, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{extension}")
    pixels = script.load_image(tmp_path / f"x.{extension}")
    assert pixels.shape == (3, 6, 8) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels[1].numpy(), stretched(values.astype(float)))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1024.0, 3071.0), (0.2, 0.20001)])
def test_float_and_ct_images_are_stretched_to_their_own_range(tmp_path, script, low, high):
    values = np.linspace(low, high, 48).reshape(6, 8).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = script.load_image(tmp_path / "x.tif")
    assert np.array_equal(pixels[2].numpy(), stretched(values.astype(float)))
    if low == -1024:
        Image.fromarray(values.round().astype(np.int32)).save(tmp_path / "i.tif")
        pixels = script.load_image(tmp_path / "i.tif")
        assert np.array_equal(pixels[0].numpy(), stretched(values.round().astype(float)))
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "nan.tif")
    assert script.load_image(tmp_path / "nan.tif").float().std() > 30


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_a_constant_image_of_many_bits_loads(tmp_path, script, mode):
    dtype = np.uint16 if mode == "I;16" else np.float32
    Image.fromarray(np.full((3, 4), 7, dtype)).save(tmp_path / "x.tif")
    assert script.load_image(tmp_path / "x.tif").unique().numel() == 1


def test_a_collapse_of_constant_images_names_them(monkeypatch, capsys, script, pictures, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(24):
        Image.new("L", (40, 40), 128).save(tmp_path / "data" / f"{i}.png")
    for data, constant in (tmp_path / "data", True), (pictures / "train", False):
        flags = [*TINY, "--data_path", data, "--output_dir", tmp_path / data.name, "--gamma", 0]
        train(monkeypatch, *flags, script=script)
        said = [line for line in capsys.readouterr().out.splitlines() if "collapse" in line]
        assert said and all(("constant" in line) is constant for line in said)
        assert all(("--eps_sq" in line) is not constant for line in said)


def test_links_lead_to_no_image_twice_and_to_an_end(tmp_path, script):
    data = tree(tmp_path / "parent" / "data", "a/1.png", "b/1.png", "b/c/2.png")
    (data / "latest").symlink_to(".")
    (data / "a" / "up").symlink_to("..")
    (data / "b" / "out").symlink_to("../..")
    (data / "again").symlink_to("b")
    for folder in data, data / "b" / "c":
        (folder / "itself").symlink_to("itself")
        (folder / "gone.png").symlink_to("nowhere.png")
    assert found(data, script)[0] == ["a/1.png", "b/1.png", "b/c/2.png"]


def test_a_linked_folder_of_images_is_found(tmp_path, script):
    tree(tmp_path, "elsewhere/1.png", "data/a/1.png")
    (tmp_path / "data" / "b").symlink_to("../elsewhere")
    assert script.find_images(tmp_path / "data") == [b"a/1.png", b"b/1.png"]


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "jfif", "png", "webp", "bmp", "tif", "gif"])
def test_images_of_all_usual_extensions_are_found_and_read(tmp_path, script, extension):
    path = tmp_path / f"x.{extension}"
    form = {"jpg": "jpeg", "jfif": "jpeg", "tif": "tiff"}.get(extension.lower(), extension)
    Image.new("RGB", (4, 3), (200, 0, 0)).save(path, format=form)
    (tmp_path / f"._x.{extension}").write_bytes(b"Mac OS X")
    (tmp_path / "notes.txt").write_text("no image")
    assert script.find_images(tmp_path) == [os.fsencode(path.name)]
    assert script.load_image(path).shape == (3, 3, 4)


def test_avif_images_are_found_and_read_where_pillow_does(tmp_path, script):
    if not features.check("avif"):
        (tmp_path / "x.avif").write_bytes(b"")
    else:
        Image.new("RGB", (16, 8), (200, 0, 0)).save(tmp_path / "x.avif")
        assert script.load_image(tmp_path / "x.avif").shape == (3, 8, 16)
    assert script.find_images(tmp_path) == [b"x.avif"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_no_image(tmp_path, script):
    tree(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert script.find_images(tmp_path) == [b"a.png"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_that_cannot_be_listed_is_named(monkeypatch, script, pictures, tmp_path, split):
    scandir, closed = os.scandir, str(pictures / split / "kind2")

    def guarded(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out"]
    message = expect_stop(monkeypatch, *flags, script=script)
    assert "cannot list" in message and closed in message and "Permission denied" in message


# -------------------------------------------------------------- faults: elsewhere, several processes


def test_the_scripts_run_where_resource_and_fcntl_are_missing(script, pictures, tmp_path):
    missing = "import sys\nsys.modules['resource'] = sys.modules['fcntl'] = None\n"
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--max_steps", "1"]
    code = missing + f"import runpy\nrunpy.run_path({script.__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert weights_of(tmp_path)["step"] == 1


FAULTS = {  # name: (code run before main, words of the line, further flags)
    "no image can be read by a worker of rank 1": (
        """
        if RANK == 1:
            load, calls = script.load_image, []
            def load_image(path):
                calls.append(path)
                if len(calls) > 20:
                    raise OSError('the disk is gone')
                return load(path)
            script.load_image = load_image
        """,
        "the disk is gone",
        ["--num_workers", "1"],
    ),
    "rank 0 cannot write": (
        """
        def save(*_):
            raise OSError(28, 'No space left on device')
        import torch
        torch.save = save
        """,
        "No space left on device",
        [],
    ),
    "k-NN raises on rank 1": (
        """
        embed = script.embed
        def broken(*arguments):
            if RANK == 1:
                raise OSError('k-NN fails')
            return embed(*arguments)
        script.embed = broken
        """,
        "k-NN fails",
        ["--eval_freq", "1"],
    ),
    "rank 1 finds other images": (
        """
        if RANK == 1:
            find = script.find_images
            script.find_images = lambda root: find(root)[1:]
        """,
        "do not find the same images",
        [],
    ),
    "rank 1 finds far fewer images": (
        """
        if RANK == 1:
            find = script.find_images
            script.find_images = lambda root: find(root)[:3]
        """,
        "fewer than a step",
        [],
    ),
    "rank 1 cannot list a folder": (
        """
        if RANK == 1:
            scandir = os.scandir
            def guarded(path):
                if str(path).endswith('kind2'):
                    raise PermissionError(13, 'Permission denied')
                return scandir(path)
            os.scandir = guarded
        """,
        "cannot list",
        [],
    ),
    "rank 0 cannot claim the folder": (
        """
        def claim(output):
            script.stop('the folder is taken')
        script.claim = claim
        """,
        "the folder is taken",
        [],
    ),
    "rank 1 raises in the set-up": (
        """
        def build(*_):
            raise OSError('no model today')
        if RANK == 1:
            script.build = build
        """,
        "no model today",
        [],
    ),
    "rank 1 raises in a step": (
        """
        step = script.SimDINO.step
        def broken(self, *arguments):
            if RANK == 1 and arguments[1] > 0:
                raise OSError('no step today')
            return step(self, *arguments)
        script.SimDINO.step = broken
        """,
        "no step today",
        [],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_ends_one_process_ends_all_with_its_line(pictures, tmp_path, fault):
    """No launcher is there to kill the others: each ends by itself."""
    sabotage, words, more = FAULTS[fault]
    sabotage = textwrap.dedent(sabotage)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out", *more]
    flags += ["--batch_size", 8, "--batch_size_per_gpu", 4]
    statuses, printed = ends(launch(simdino, *flags, world=2, sabotage=sabotage))
    assert all(statuses), printed
    said = [line for text in printed for line in text.splitlines() if words in line]
    said = [line for line in said if re.search(r"simdino\.py: |OSError: ", line)]
    assert len(said) == 1, "\n".join(printed)


def test_a_process_that_is_killed_ends_the_others_and_the_launcher(script, pictures, tmp_path):
    sabotage = "if RANK == 1:\n    script.knn = lambda *_: os.kill(os.getpid(), 9)"
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path / "out"]
    flags += ["--batch_size", 8, "--batch_size_per_gpu", 4]
    statuses, printed = ends(launch(script, *flags, world=2, sabotage=sabotage))
    assert statuses[1] == -9 and statuses[0] not in (0, None)
    assert "Traceback" not in printed[0] and "process 0 ends" in printed[0]
    assert weights_of(tmp_path / "out")["step"] == 6


def test_a_data_worker_that_dies_ends_the_process_with_a_line(script, pictures, tmp_path):
    sabotage = (
        "load, calls = script.load_image, []\n"
        "def load_image(path):\n"
        "    calls.append(path)\n"
        "    if len(calls) > 40:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return load(path)\n"
        "script.load_image = load_image"
    )
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--num_workers", 1]
    statuses, (printed,) = ends(launch(script, *flags, "--eval_freq", 0, sabotage=sabotage))
    assert statuses == [1]
    last = printed.splitlines()[-1]
    assert "--num_workers 0" in last and "--shm-size" in last, printed
    assert "Traceback" not in printed


def test_a_worker_that_raises_ends_the_process_with_its_line(script, pictures, tmp_path):
    sabotage = """
load, calls = script.load_image, []
def load_image(path):
    calls.append(path)
    if len(calls) > 40:
        raise OSError("the disk is gone")
    return load(path)
script.load_image = load_image
"""
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--num_workers", 2]
    statuses, (printed,) = ends(launch(script, *flags, "--eval_freq", 0, sabotage=sabotage))
    assert statuses == [1], printed
    said = [line for line in printed.splitlines() if line.startswith(f"{script.__name__}.py: ")]
    assert len(said) == 1 and "the disk is gone" in said[0], printed
    assert "Traceback" not in printed


# ------------------------------------------------------------------------------------- faults: fp16


def test_fp16_that_never_has_finite_gradients_stops(monkeypatch, script, pictures, tmp_path):
    small = partial(torch.amp.GradScaler, init_scale=1.0)  # instead of 16 steps down from 65,536
    monkeypatch.setattr(torch.amp, "GradScaler", small)
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--eval_freq", 0]
    flags += ["--amp", "fp16", "--coeff", 1e30, "--batch_size", 2, "--batch_size_per_gpu", 2]
    message = expect_stop(monkeypatch, *flags, "--max_steps", 2, script=script)
    assert "no finite gradients by step 2" in message and "--amp bf16" in message
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_run_resumes_in_another_precision_and_back(monkeypatch, script, pictures, tmp_path):
    flags = [*TINY, "--data_path", pictures, "--output_dir", tmp_path, "--eval_freq", 0]
    flags += ["--batch_size", 2, "--batch_size_per_gpu", 2]
    for steps, amp in enumerate(("off", "fp16", "off", "bf16", "fp16"), start=1):
        train(monkeypatch, *flags, "--amp", amp, "--max_steps", steps, script=script)
        state = weights_of(tmp_path)
        assert state["step"] == steps and bool(state["scaler"]) is (amp == "fp16")


# ------------------------------------------------------------------------ evaluation: the weights


def weights(version, width=128, depth=4):
    """A backbone's weights by our names, the same on any machine: patch 8, grid of 4 x 4."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 8, 8), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    if version == 2:
        shapes["register_tokens"] = (1, 4, width)
    for i in range(depth):
        block = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,)}
        block |= {"norm2.bias": (width,), "attn.qkv.weight": (3 * width, width)}
        block |= {"attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)}
        block |= {"attn.proj.bias": (width,), "mlp.fc1.weight": (4 * width, width)}
        block |= {"mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width)}
        block["mlp.fc2.bias"] = (width,)
        if version == 2:
            block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tensors = {}
    for i, name in enumerate(sorted(shapes)):
        n = torch.arange(1, math.prod(shapes[name]) + 1, dtype=torch.float64).view(shapes[name])
        tensor = (0.5 if n.ndim == 1 else 0.2) * torch.sin(n * n * 0.01 + i)
        tensors[name] = (tensor + bool(re.search(r"norm\d?\.weight", name))).float()
    return tensors


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def chunked(tensors):
    """As FSDP's chunks of 2 blocks name them: blocks.1.3.norm1.weight."""
    return {
        re.sub(r"blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", name): tensor
        for name, tensor in tensors.items()
    }


def checkpoint(kind):
    v1, v2, mask = weights(1), weights(2), {"mask_token": torch.ones(1, 128)}
    head = simdino.ProjectionHead(128, 16, 8).state_dict()
    official = prefixed("module.backbone.", v1) | prefixed("module.head.", head)
    ours = prefixed("backbone.", v1) | prefixed("head.", head)
    ours_v2 = prefixed("backbone.", v2 | mask) | prefixed("head.", head)
    official_v2 = prefixed("backbone.", chunked(v2) | mask) | prefixed("dino_head.", head)
    arguments = argparse.Namespace(arch="vit_base", lr=0.1)
    optimizer = {"param_groups": [{"lr": np.float64(0.1)}]}
    return {
        "ours, v1": {"student": {}, "teacher": ours, "step": 3, "args": {"arch": "vit_x"}},
        "ours, v2": {"student": {}, "teacher": ours_v2, "step": 3, "args": {"arch": "vit_x"}},
        "official v1, with its arguments": {
            "teacher": official,
            "optimizer": optimizer,
            "args": arguments,
        },
        "DINO, with prototypes": {
            "teacher": official | {"module.head.last_layer.weight_v": torch.ones(9, 8)}
        },
        "official v1, flat": v1,
        "official v1, compiled": prefixed("_orig_mod.", v1),
        "official v2, chunked": {"teacher": official_v2},
        "official v2, flat": v2 | mask,
        "timm's classifier": v1 | {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)},
    }[kind]


@pytest.mark.parametrize(
    "kind, version, left_out",
    [
        ("ours, v1", 1, ["head.mlp"]),
        ("ours, v2", 2, ["head.mlp", "mask_token"]),
        ("official v1, with its arguments", 1, ["head.mlp"]),
        ("official v1, flat", 1, []),
        ("official v1, compiled", 1, []),
        ("official v2, chunked", 2, ["head.mlp", "mask_token"]),
        ("official v2, flat", 2, ["mask_token"]),
        ("timm's classifier", 1, ["head.bias", "head.weight"]),
    ],
)
def test_weights_of_every_format_give_the_official_features(tmp_path, kind, version, left_out):
    torch.save(checkpoint(kind), tmp_path / "weights.pth")
    model, dropped = eval_linear.load_backbone(tmp_path / "weights.pth", num_heads=2)
    assert dropped == left_out
    expected = {  # official: CLS of the last 4 blocks and mean patch of the last, in float64
        (1, 32): -3.0275591342386177,
        (1, 48): 1.681385036146514,  # positions interpolated as in DINO
        (2, 32): 16.930229918759338,
        (2, 48): 26.813735525931996,  # positions interpolated with antialiasing
    }
    for size in (32, 48):
        n = torch.arange(2 * 3 * size * size).view(2, 3, size, size)
        features = eval_linear.encode(model, (n * n * 7 % 251).byte())
        assert features.shape == (2, 5 * 128)
        assert fingerprint(features.double()) == pytest.approx(expected[version, size], abs=1e-3)


@pytest.mark.parametrize("script", [simdino, simdinov2])
def test_a_checkpoint_gives_the_features_it_gave_in_training(tmp_path, script):
    source = script.VisionTransformer(32, 8, **script.ARCHS["vit_nano"]).eval()
    for p in source.parameters():
        nn.init.normal_(p, std=0.1)
    torch.save({"teacher": prefixed("backbone.", source.state_dict())}, tmp_path / "w.pth")
    model, _ = eval_linear.load_backbone(tmp_path / "w.pth")
    for size in (32, 48):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(model.get_intermediate_layers(x)[0][:, 0], source(x))


def test_attention_weights_are_those_the_last_block_used(tmp_path):
    torch.save(weights(2), tmp_path / "w.pth")
    model, seen = eval_linear.load_backbone(tmp_path / "w.pth", num_heads=2)[0], {}
    x = torch.randn(2, 3, 32, 32)
    attention, attn = model.get_last_selfattention(x), model.blocks[-1].attn
    assert attention.shape == (2, 2, 21, 21)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 21))
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    model.get_intermediate_layers(x)
    v = attn.qkv(seen["x"]).unflatten(-1, (3, attn.num_heads, -1))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(attn.proj((attention @ v).transpose(1, 2).flatten(2)), seen["out"])


@pytest.mark.parametrize(
    "name, size",
    [
        ("vit_tiny_patch16_224", 224),
        ("vit_small_patch14_dinov2", 112),
        ("vit_small_patch14_reg4_dinov2", 112),
    ],
)
def test_weights_of_timm_give_its_features(tmp_path, name, size):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=size).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model, _ = eval_linear.load_backbone(tmp_path / "timm.pth")
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        tokens = model.get_intermediate_layers(x)[0]
        torch.testing.assert_close(tokens, theirs.forward_features(x), rtol=1e-4, atol=1e-4)


def stopped(action, *arguments, **options):
    """Expect action to end the program; -> its one line."""
    with pytest.raises(SystemExit) as end:
        action(*arguments, **options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def test_keys_that_do_not_fit_are_listed(tmp_path):
    path, tensors = tmp_path / "weights.pth", weights(1)
    del tensors["blocks.2.norm1.bias"], tensors["norm.weight"]
    tensors |= {"fc_norm.weight": torch.ones(128), "blocks.0.mlp.w12.weight": torch.ones(2)}
    tensors["cls_token"] = torch.ones(1, 2, 128)
    torch.save(tensors, path)
    message = stopped(eval_linear.load_backbone, path, num_heads=2)
    assert 'Missing key(s) in state_dict: "blocks.2.norm1.bias", "norm.weight".' in message
    assert '"blocks.0.mlp.w12.weight"' in message.split("Unexpected key(s)")[1]
    assert "size mismatch for cls_token" in message


def test_weights_under_another_name_are_asked_for(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"net": weights(1, 96), "epoch": 3}, path)
    assert "it has: net, epoch" in stopped(eval_linear.load_backbone, path)
    eval_linear.load_backbone(path, "net")
    assert "under epoch" in stopped(eval_linear.load_backbone, path, "epoch")
    torch.save({"model": weights(1, 96), "epoch": 3}, path)  # as DeiT and MAE have them
    eval_linear.load_backbone(path)


def test_the_number_of_heads_is_asked_for_where_no_standard_says_it(tmp_path):
    path = tmp_path / "weights.pth"
    for width, heads in (96, 3), (192, 3), (384, 6):
        torch.save(weights(1, width), path)
        assert eval_linear.load_backbone(path)[0].blocks[0].attn.num_heads == heads
    assert eval_linear.load_backbone(path, num_heads=8)[0].blocks[0].attn.num_heads == 8
    assert "--num_heads 7" in stopped(eval_linear.load_backbone, path, num_heads=7)
    torch.save(weights(1, 160), path)
    assert "160 wide" in stopped(eval_linear.load_backbone, path)
    assert eval_linear.load_backbone(path, num_heads=5)[0].blocks[0].attn.num_heads == 5


@pytest.mark.parametrize("version", [1, 2])
def test_timm_loads_an_exported_backbone_strictly_by_the_line_printed(
    monkeypatch, tmp_path, capsys, version
):
    pytest.importorskip("timm")
    torch.save({"teacher": prefixed("backbone.", weights(version, 96))}, tmp_path / "w.pth")
    out = tmp_path / "timm.pth"
    evaluate(monkeypatch, "--weights", tmp_path / "w.pth", "--export", out)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("model = timm.") and "strict=True" in line
    (tmp_path / "line.py").write_text("import timm, torch\n" + line)
    names = runpy.run_path(tmp_path / "line.py")
    model, _ = eval_linear.load_backbone(tmp_path / "w.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.get_intermediate_layers(x)[0][:, 0]
        torch.testing.assert_close(names["model"].eval()(x), expected, rtol=1e-5, atol=1e-4)
    flags = ["--weights", tmp_path / "w.pth", "--export"]
    assert "a new .pth" in stopped(evaluate, monkeypatch, *flags, out), "never written over"
    assert "a new .pth" in stopped(evaluate, monkeypatch, *flags, tmp_path / "x.safetensors")
    again, _ = eval_linear.load_backbone(out)  # and back
    torch.testing.assert_close(again.get_intermediate_layers(x)[0][:, 0], expected)


def test_a_backbone_without_registers_is_exported_too(monkeypatch, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    model = simdinov2.VisionTransformer(32, 8, 96, 4, 3, num_register_tokens=0).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(safetensors(model.state_dict()))
    for name in "w.pth", "w.safetensors":
        out = tmp_path / f"{name}.pth"
        evaluate(monkeypatch, "--weights", tmp_path / name, "--export", out)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
        shape |= {"num_classes": 0, "init_values": 1, "reg_tokens": 0, "no_embed_class": True}
        theirs, x = timm.models.VisionTransformer(**shape).eval(), torch.randn(1, 3, 32, 32)
        theirs.load_state_dict(torch.load(out, weights_only=True), strict=True)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    assert "reg_tokens=0, no_embed_class=True" in capsys.readouterr().out


def safetensors(tensors):
    """The format, written from its description."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for name, x in tensors.items():
        raw = x.contiguous().view(torch.uint8).numpy().tobytes()
        entry = {"dtype": kinds[x.dtype], "shape": list(x.shape)}
        header[name] = entry | {"data_offsets": [len(numbers), len(numbers) + len(raw)]}
        numbers += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_are_read(tmp_path, dtype):
    tensors = {name: x.to(dtype) for name, x in weights(2, 96).items()}
    (tmp_path / "w.safetensors").write_bytes(safetensors(tensors))
    read, mlp, left_out = eval_linear.read_weights(tmp_path / "w.safetensors")
    assert same(read, tensors) and not mlp and not left_out
    (tmp_path / "w.safetensors").write_bytes(safetensors(tensors)[:-1000])
    assert "w.safetensors" in stopped(eval_linear.read_weights, tmp_path / "w.safetensors")


# ------------------------------------------------------------------- training from existing weights


def start(script, path, monkeypatch, size=32, width=128, hidden=16):
    """A backbone and a head that load_pretrained has filled; what it said."""
    backbone = script.VisionTransformer(size, 8, embed_dim=width, depth=4, num_heads=2)
    head = script.ProjectionHead(width, hidden, 8)
    lines = []
    monkeypatch.setattr(script, "say", lambda text, **_: lines.append(text))
    script.load_pretrained(path, backbone, head)
    return backbone, head, lines[0]


@pytest.mark.parametrize(
    "kind, script, head",
    [
        ("ours, v1", simdino, True),
        ("official v1, with its arguments", simdino, True),
        ("DINO, with prototypes", simdino, True),
        ("official v1, flat", simdino, False),
        ("official v1, compiled", simdino, False),
        ("timm's classifier", simdino, False),
        ("ours, v2", simdinov2, True),
        ("official v2, chunked", simdinov2, True),
        ("official v2, flat", simdinov2, False),
    ],
)
def test_training_starts_from_weights_of_every_format(tmp_path, monkeypatch, kind, script, head):
    saved = checkpoint(kind)
    torch.save(saved, tmp_path / "w.pth")
    backbone, mlp, said = start(script, tmp_path / "w.pth", monkeypatch)
    expected = weights(1 if script is simdino else 2)
    for name, tensor in backbone.state_dict().items():
        assert name == "mask_token" or torch.equal(tensor, expected[name]), name
    assert ("backbone and head" in said) == head
    whole = saved.get("teacher", {})
    stored = {name.split("head.")[1]: x for name, x in whole.items() if "head.mlp" in name}
    assert not head or same(dict(mlp.state_dict()), stored)
    assert "head.weight" in said or "classifier" not in kind
    assert "head.last_layer" in said or "prototypes" not in kind

    _, other, said = start(script, tmp_path / "w.pth", monkeypatch, hidden=24)
    assert "the head starts anew" in said and ("head.mlp" in said) == head
    assert all(x.isfinite().all() for x in other.parameters())


@pytest.mark.parametrize(
    "name, script",
    [("vit_tiny_patch16_224", simdino), ("vit_small_patch14_reg4_dinov2", simdinov2)],
)
def test_training_starts_from_timm_with_its_features(tmp_path, monkeypatch, name, script):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=112).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    shape = simdino.ARCHS["_".join(name.split("_")[:2])]
    backbone = script.VisionTransformer(112, theirs.patch_embed.patch_size[0], **shape).eval()
    head = script.ProjectionHead(shape["embed_dim"])
    script.load_pretrained(tmp_path / "timm.pth", backbone, head)
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", [simdino, simdinov2])
def test_positions_of_another_grid_are_interpolated(tmp_path, monkeypatch, script):
    torch.save(weights(1 if script is simdino else 2), tmp_path / "w.pth")
    backbone, _, _ = start(script, tmp_path / "w.pth", monkeypatch, size=48)
    cls, grid = weights(1)["pos_embed"].split([1, 16], dim=1)
    if script is simdino:
        grid = grid.unflatten(1, (4, 4)).movedim(3, 1)
        expected = TF.resize(grid, [6, 6], TF.InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(backbone.pos_embed[:, 1:], expected.flatten(2).mT)
        assert torch.equal(backbone.pos_embed[:, :1], cls)
    assert backbone.pos_embed.shape == (1, 37, 128)


def test_weights_that_do_not_fit_are_refused_with_what_misses_and_is_left_over(
    tmp_path, monkeypatch
):
    torch.save(weights(2), tmp_path / "v2.pth")
    message = stopped(start, simdino, tmp_path / "v2.pth", monkeypatch)
    assert "Unexpected" in message and "register_tokens" in message and "ls1.gamma" in message
    torch.save(weights(1), tmp_path / "v1.pth")
    message = stopped(start, simdinov2, tmp_path / "v1.pth", monkeypatch)
    assert "Missing" in message and "register_tokens" in message and "blocks.0.ls1.gamma" in message
    assert "size mismatch" in stopped(start, simdino, tmp_path / "v1.pth", monkeypatch, width=64)
    assert "missing" in stopped(start, simdino, tmp_path / "nowhere.pth", monkeypatch)


def test_a_run_from_weights_is_another_run_and_resumes_without_them(
    monkeypatch, script, pictures, tmp_path, capsys
):
    flags = [*TINY, "--data_path", pictures, "--eval_freq", 0, "--max_steps"]
    train(monkeypatch, *flags, 3, "--output_dir", tmp_path / "first", script=script)
    first = tmp_path / "first" / "checkpoint.pth"
    out = ["--output_dir", tmp_path / "second"]
    pretrained = ["--pretrained_weights", first]
    train(monkeypatch, *flags, 1, *out, *pretrained, "--lr", 1e-12, script=script)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("1 x ") and "backbone and head" in "".join(printed)
    assert weights_of(tmp_path / "second")["step"] == 1
    for name, x in weights_of(tmp_path / "second")["student"].items():
        torch.testing.assert_close(x, torch.load(first, weights_only=True)["teacher"][name])
    train(monkeypatch, *flags, 2, *out, *pretrained, "--lr", 1e-12, script=script)
    assert "at step 1" in capsys.readouterr().out, "resume wins"
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, *flags, 3, *out, "--lr", 1e-12, script=script)
    assert "pretrained_weights" in stop.value.code


def test_files_that_are_no_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"teacher": Code(tmp_path / "mark")}, path)
    hostile = path.read_bytes()
    torch.save({"fc.weight": torch.ones(2, 2)}, path)
    resnet = path.read_bytes()
    for content in (b"", b"rubbish", hostile, resnet, resnet[:-20]):
        path.write_bytes(content)
        assert str(path) in stopped(eval_linear.load_backbone, path)
        assert path.read_bytes() == content
    assert not (tmp_path / "mark").exists()
    torch.save([1, 2], path)
    assert "has: list" in stopped(eval_linear.load_backbone, path)


# ---------------------------------------------------------------------------- evaluation: k-NN


def test_knn_counts_weighted_votes_for_every_k_even_beyond_the_bank():
    torch.manual_seed(0)
    labels = torch.arange(150) % 5
    bank = F.normalize(torch.randn(150, 8) + 0.5 * F.one_hot(labels, 8), dim=-1)
    z, y = F.normalize(torch.randn(300, 8) + F.one_hot(labels, 8).repeat(2, 1), dim=-1), labels
    y = y.repeat(2)
    got = eval_linear.knn_accuracies((bank, labels), (z, y), (1, 10, 20, 200))
    for k, accuracy in got.items():
        hits = 0
        for query, label in zip(z, y):
            cosines = sorted(((query @ t).item(), c.item()) for t, c in zip(bank, labels))[-k:]
            votes = [sum(math.exp(c / 0.07) for c, own in cosines if own == i) for i in range(5)]
            hits += int(np.argmax(votes)) == label
        assert accuracy == pytest.approx(100 * hits / 300)
    assert len(set(got.values())) > 2, "the ks differ"


def test_knn_takes_a_large_bank_in_parts_and_leaves_out_what_has_no_label():
    torch.manual_seed(0)
    n = 2**16 + 3000
    bank, labels, z = torch.randn(n, 4), torch.arange(n) % 3, torch.randn(64, 4)
    labels[::7] = -1
    y = torch.arange(64) % 3
    y[:4] = -1
    got = eval_linear.knn_accuracies((bank, labels), (z, y), (20,))[20]
    good, real = F.normalize(bank[labels >= 0], dim=-1), labels[labels >= 0]
    cosine, at = (F.normalize(z, dim=-1)[4:] @ good.mT).topk(20)
    votes = (cosine / 0.07).exp()[..., None] * F.one_hot(real[at], 3)
    assert got == pytest.approx(100 * (votes.sum(1).argmax(-1) == y[4:]).float().mean().item())


# ----------------------------------------------------------------------- evaluation: the probe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/ and val/ of 3 kinds; val's kind0 and kind1 change places; two files are damaged."""
    root = tmp_path_factory.mktemp("data")
    for split, count in ("train", 30), ("val", 8):
        for kind in range(3):
            shown = kind if split == "train" or kind == 2 else 1 - kind
            folder = root / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((shown, i, count))
                pixels = np.clip(60 * shown + 40 + rng.normal(0, 25, (32, 40, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    (root / "train" / "kind1" / "04.png").write_bytes(b"not an image")
    (root / "val" / "kind2" / "03.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"teacher": weights(2, 96)}, path)
    flags = f"--weights {path} --data_path {data} --resize_size 32 --crop_size 32 --num_workers 0 "
    return shlex.split(flags + "--batch_size_per_gpu 16 --epochs 4 --saveckp_freq 1 --seed 3")


def evaluate(monkeypatch, *flags):
    """eval_linear.main() with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", ["eval_linear.py", *map(str, flags)])
    eval_linear.main()


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def probe_of(folder):
    return torch.load(folder / "probe.pth", weights_only=True)


@pytest.fixture(scope="module", params=["cached", "crops"])
def evaluated(request, base, tmp_path_factory):
    """Flags of a run never interrupted, its folder and what it printed."""
    flags = [*base, "--cached"] if request.param == "cached" else base
    output = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        evaluate(patch, *flags, "--output_dir", output)
    return flags, output, printed.getvalue()


def test_the_probe_learns_and_is_chosen_on_held_out_images_not_on_val(evaluated, base):
    _, output, printed = evaluated
    results = results_of(output)
    held_out, best = results["probe"]["held_out"], results["probe"]["best"]
    assert len(held_out) == 52 and best in held_out
    assert held_out[best][0] == max(top1 for top1, _ in held_out.values()) > 80
    assert all(0 <= top1 <= top5 <= 100 for top1, top5 in held_out.values())
    # Two kinds change places in val: who knows them best does worst there.
    assert results["probe"]["val_top1"] < 50 and results["probe"]["val_top5"] == 100
    assert set(results["knn"]) == {"10", "20", "100", "200"} and results["knn"]["10"] < 50
    assert results["weights"] == base[1] and results["bad_images"] == 2
    assert len(results["run"]["weights_sha256"]) == 16 and results["run"]["images"] == [90, 24]
    named = [line for line in printed.splitlines() if line.startswith("unreadable, left out")]
    assert len(named) == 2 and "04.png" in named[0] and "val/kind2/03.png" in named[1]
    assert "1 of 24 images" in printed
    assert best in printed and "4 blocks + patches" in printed and "ETA" in printed


def test_a_probe_killed_and_resumed_ends_with_the_same_bits(evaluated, monkeypatch, tmp_path):
    flags, output, _ = evaluated
    write = eval_linear.write

    def write_and_die(path, dump):
        write(path, dump)
        if torch.load(path, weights_only=True)["step"] == 10:  # of 20, 5 an epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_linear, "write", write_and_die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluate(patch, *flags, "--output_dir", tmp_path)
    assert not (tmp_path / "results.json").exists() and probe_of(tmp_path)["step"] == 10
    evaluate(monkeypatch, *flags, "--output_dir", tmp_path)
    assert same(probe_of(tmp_path), probe_of(output))
    assert results_of(tmp_path) | {"seconds": 0} == results_of(output) | {"seconds": 0}


def test_candidates_side_by_side_train_as_each_would_alone(base, monkeypatch, tmp_path):
    # The reference: a torch.optim.SGD with a group for each classifier, and CosineAnnealingLR.
    flags = [*base, "--cached"]
    evaluate(monkeypatch, *flags, "--output_dir", tmp_path)
    state = probe_of(tmp_path)
    args = eval_linear.parse_args([*flags, "--output_dir", str(tmp_path)])
    model, _ = eval_linear.load_backbone(args.weights)
    train, _, _ = eval_linear.find_data(Path(args.data_path))
    images = eval_linear.Images(*train, lambda image: image[:, :, 4:36])
    rows = [images[i] for i in range(90)]
    z = eval_linear.encode(model, torch.stack([row[0] for row in rows]))
    y = torch.tensor([row[1] for row in rows])
    readable = [i for i in np.random.default_rng(3).permutation(90) if not rows[i][2]]
    part = np.array(readable[9:])
    assert len(readable) == 89
    torch.manual_seed(eval_linear.seed_from(3))
    initial = eval_linear.Probe(96, 4, 3)
    kinds = {0: z[:, 288:384], 1: z[:, 288:480], 2: z[:, :384], 3: z}
    chosen = [(kind, rate) for kind in kinds for rate in (0, 8, 12)]
    heads, groups = [], []
    for kind, rate in chosen:
        head = nn.Linear(kinds[kind].shape[1], 3)
        rows = slice(3 * rate, 3 * rate + 3)
        head.weight.data.copy_(initial.heads[kind].weight[rows])
        head.bias.data.copy_(initial.heads[kind].bias[rows])
        heads.append(head)
        lr = eval_linear.RATES[rate] * 16 / 256
        groups.append({"params": list(head.parameters()), "lr": lr})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for keys in eval_linear.block_keys(80, args, 0, 20):
        index = torch.from_numpy(part[np.array(keys) % 80])
        optimizer.zero_grad()
        for (kind, _), head in zip(chosen, heads):
            F.cross_entropy(head(kinds[kind][index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    for (kind, rate), head in zip(chosen, heads):
        ours = state["probe"][f"heads.{kind}.weight"][3 * rate : 3 * rate + 3]
        moved = (head.weight - initial.heads[kind].weight[3 * rate : 3 * rate + 3]).norm()
        assert moved > 0 and (ours - head.weight).norm() < 1e-3 * moved


@pytest.mark.parametrize("evaluated", ["crops"], indirect=True)
def test_two_processes_give_the_figures_of_one(evaluated, tmp_path):
    flags, output, _ = evaluated
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += ["--master_addr", "127.0.0.1", "--master_port", free_port(), EVAL, *flags]
    command += ["--batch_size_per_gpu", 8, "--output_dir", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    alone, shared = results_of(output), results_of(tmp_path)
    assert shared["knn"] == alone["knn"] and shared["bad_images"] == 2
    assert shared["run"] == alone["run"], "of the same global batch"
    assert result.stdout.count("the best,") == 1
    for a, b in zip(probe_of(output)["probe"].values(), probe_of(tmp_path)["probe"].values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for name, (top1, _) in alone["probe"]["held_out"].items():
        assert shared["probe"]["held_out"][name][0] == pytest.approx(top1, abs=12), "one of 9"


def test_diverged_candidates_do_not_win():
    probe = eval_linear.Probe(4, 4, 10)
    with torch.no_grad():
        for head in probe.heads:
            head.weight[-10:] = math.nan
    accuracies = eval_linear.probe_accuracies(probe, torch.randn(500, 20), torch.arange(500) % 10)
    assert len(accuracies) == 52
    assert all(accuracies[i][0] < 30 for i in range(52))


def test_without_epochs_there_is_k_nn_alone(base, monkeypatch, tmp_path, capsys):
    evaluate(monkeypatch, *base, "--epochs", 0, "--output_dir", tmp_path)
    assert "probe" not in results_of(tmp_path) and not (tmp_path / "probe.pth").exists()
    assert "k = 200" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- the pictures


def test_pictures_have_a_row_an_image_and_are_never_written_over(
    base, data, monkeypatch, tmp_path, capsys
):
    photo, out = data / "val" / "kind0" / "01.png", tmp_path / "out.png"
    before = photo.read_bytes()
    few = base[:2] + ["--resize_size", "64", "--crop_size", "64"]
    evaluate(monkeypatch, *few, "--pictures", out, photo, photo)
    assert Image.open(out).size == (5 * 172 - 4, 16 + 2 * 172 - 4)  # image, 3 heads, PCA
    pixels = np.asarray(Image.open(out)).astype(int)
    assert len(np.unique(pixels[20:180, 692:852].reshape(-1, 3), axis=0)) > 8, "of several colours"
    rows = pixels[16:184], pixels[188:356]
    assert np.array_equal(*rows), "the same image twice"
    shown = pixels[16:184, :168].mean((0, 1))
    assert np.abs(shown - np.asarray(Image.open(photo)).mean((0, 1))).max() < 3
    for wrong in ([out, photo], [photo, photo], [tmp_path / "a.jpg", photo]):
        message = stopped(evaluate, monkeypatch, *few, "--pictures", *wrong)
        assert "first the name of a new .png file" in message
    assert photo.read_bytes() == before
    message = stopped(evaluate, monkeypatch, *few, "--pictures", tmp_path / "b.png", base[1])
    assert "cannot read the image" in message and base[1] in message
    evaluate(monkeypatch, *base, "--pictures", tmp_path / "val.png")
    assert Image.open(tmp_path / "val.png").size[1] == 16 + 8 * 172 - 4


# ----------------------------------------------------------------------------- when things go wrong


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--crop_size", "30"], "--crop_size 30 is not a multiple of the patch, 8"),
        (["--crop_size", "64"], "--resize_size 32 is smaller than --crop_size 64"),
        (["--batch_size_per_gpu", "-1"], "--batch_size_per_gpu -1"),
        (["--batch_size_per_gpu", "82"], "lower --batch_size_per_gpu"),
        (["--epochs", "-1"], "--epochs -1"),
        (["--amp", "fp8"], "--amp"),
        (["--num_heads", "5"], "--num_heads 5"),
        (["--data_path", "/nowhere"], "/nowhere is not a folder"),
        (["--data_path", ""], "--data_path"),
        (["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_bad_arguments_of_the_evaluation_get_one_line(monkeypatch, base, tmp_path, flags, named):
    output = tmp_path / "out"
    assert named in stopped(evaluate, monkeypatch, *base, "--output_dir", output, *flags)
    assert not output.exists()


def test_folders_without_labels_or_images_get_one_line(monkeypatch, base, data, tmp_path):
    flags = [*base, "--output_dir", tmp_path / "out", "--data_path"]
    assert "no val/ or test/" in stopped(evaluate, monkeypatch, *flags, data / "train")
    for folder in (tmp_path / "bad" / split / name for split in ("train", "val") for name in "ab"):
        folder.mkdir(parents=True)
        for i in range(20):
            (folder / f"{i}.jpg").write_bytes(b"rubbish")
    assert "can be read" in stopped(evaluate, monkeypatch, *flags, tmp_path / "bad")


def test_results_and_probes_of_another_run_are_left_as_they_are(monkeypatch, base, tmp_path):
    flags = [*base, "--cached", "--output_dir", tmp_path, "--epochs", 1]
    evaluate(monkeypatch, *flags)
    good, results = ((tmp_path / n).read_bytes() for n in ("probe.pth", "results.json"))
    message = stopped(evaluate, monkeypatch, *flags, "--seed", 4)
    assert "results.json" in message and "its seed is 3, not 4" in message
    assert results == (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").unlink()
    torch.save({"probe": Code(tmp_path / "mark")}, tmp_path / "hostile")
    for content in (b"", good[:-20], (tmp_path / "hostile").read_bytes()):
        (tmp_path / "probe.pth").write_bytes(content)
        assert "cannot resume" in stopped(evaluate, monkeypatch, *flags)
        assert (tmp_path / "probe.pth").read_bytes() == content
    (tmp_path / "probe.pth").write_bytes(good)
    assert "another run" in stopped(evaluate, monkeypatch, *flags, "--seed", 4)
    assert "another run" in stopped(evaluate, monkeypatch, *flags, "--epochs", 0)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == []
    assert (tmp_path / "probe.pth").read_bytes() == good
    assert not (tmp_path / "mark").exists()


def test_features_that_are_not_finite_end_the_run(monkeypatch, base, streets, tmp_path):
    tensors = weights(1, 96)
    tensors["norm.bias"][3] = math.nan
    torch.save(tensors, tmp_path / "nan.pth")
    flags = [*base, "--weights", tmp_path / "nan.pth", "--output_dir", tmp_path / "out"]
    assert "not finite" in stopped(evaluate, monkeypatch, *flags)
    flags = segmenting(["--weights", tmp_path / "nan.pth"], streets, tmp_path / "out")
    assert "finite loss" in stopped(evaluate, monkeypatch, *flags)
    assert not (tmp_path / "out" / "results.json").exists()


# ------------------------------------------------------------------- evaluation: the segmentation


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """train/, val/ and masks of 3 classes that a patch's brightness tells; 9 is void."""
    root = tmp_path_factory.mktemp("streets")
    for split, count in ("train", 24), ("val", 7):
        (root / split / "a").mkdir(parents=True)
        (root / f"{split}_masks" / "a").mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((split == "val", i))
            mask = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = 40 + 80 * mask[..., None] + rng.normal(0, 9, (32, 48, 3))
            mask[:2] = 9
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / "a" / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(root / f"{split}_masks" / "a" / f"{i}.png")
    return root


def segmenting(base, streets, output, *flags):
    flags = ["--segment", "--ignore_index", 9, "--epochs", 12, "--num_workers", 0, *flags]
    flags += ["--batch_size_per_gpu", 4, "--saveckp_freq", 1]
    return [*base[:2], "--data_path", streets, "--output_dir", output, *flags]


def test_segmentation_learns_what_patches_show_and_counts_it_right(
    base, streets, monkeypatch, tmp_path, capsys
):
    evaluate(monkeypatch, *segmenting(base, streets, tmp_path))
    results = results_of(tmp_path)["segmentation"]
    assert results["miou"] > 60 and results["pixel_accuracy"] > 75 and len(results["iou"]) == 3
    assert results["best_lr"] == float(
        max(results["held_out_miou"], key=results["held_out_miou"].get)
    )
    assert Image.open(tmp_path / "segmentation.png").size == (3 * 48, 4 * 32)
    assert "[32, 48]" in capsys.readouterr().out, "rectangles"

    # Counted again, image by image, with sets of pixels
    model, _ = eval_linear.load_backbone(base[1])
    state = probe_of(tmp_path)["probe"]
    probe = eval_linear.PatchProbe(96, 3)
    probe.load_state_dict(state)
    probe.eval()
    best = eval_linear.PATCH_RATES.index(results["best_lr"])
    inside, either, right, known = [0] * 3, [0] * 3, 0, 0
    for i in range(7):
        x = eval_linear.load_image(streets / "val" / "a" / f"{i}.jpg")[None]
        true = np.array(Image.open(streets / "val_masks" / "a" / f"{i}.png"))
        with torch.no_grad():
            scores = probe(eval_linear.encode_patches(model, x))[best]
            scores = F.interpolate(scores, (32, 48), mode="bilinear")[0]
        given = scores.argmax(0).numpy()
        valid = true != 9
        right, known = right + (given == true)[valid].sum(), known + valid.sum()
        for c in range(3):
            inside[c] += ((given == c) & (true == c))[valid].sum()
            either[c] += ((given == c) | (true == c))[valid].sum()
    iou = [100 * a / b for a, b in zip(inside, either)]
    assert results["iou"] == pytest.approx(iou, abs=0.3)
    assert results["miou"] == pytest.approx(np.mean(iou), abs=0.3)
    assert results["pixel_accuracy"] == pytest.approx(100 * right / known, abs=0.3)


def test_a_slow_probe_is_saved_every_15_minutes(base, monkeypatch, tmp_path):
    steps, clock, write, fake = [], [0.0], eval_linear.write, SimpleNamespace(**vars(time))
    fake.monotonic = lambda: clock.__setitem__(0, clock[0] + 400) or clock[0]

    def writing(path, dump):
        write(path, dump)
        if path.name == "probe.pth":
            steps.append(torch.load(path, weights_only=True)["step"])

    monkeypatch.setattr(eval_linear, "write", writing)
    monkeypatch.setattr(eval_linear, "time", fake)
    flags = ["--cached", "--batch_size_per_gpu", 2, "--epochs", 1, "--output_dir", tmp_path]
    evaluate(monkeypatch, *base, *flags)
    assert steps[-1] == 40 and {10, 20, 30} & set(steps), "40 steps are looked at every 10"


def test_constant_channels_of_patch_tokens_stay_finite():
    z = 20 + 1e-3 * torch.randn(4, 5, 6, 8)
    probe = eval_linear.PatchProbe(8, 3)
    assert probe.losses(z, torch.zeros(4, 40, 48, dtype=torch.long)).isfinite().all()


def test_knn_of_fewer_images_than_processes(monkeypatch):
    monkeypatch.setattr(eval_linear, "RANK", 3)
    train, val = torch.randn(30, 4), torch.randn(2, 4)
    bank, queries = (train, torch.arange(30) % 2), (val, torch.tensor([0, 1]))
    assert set(eval_linear.knn_accuracies(bank, queries).values()) == {0.0}, "its share is empty"


def test_segmentation_scores_of_a_matrix_worked_by_hand():
    counts = torch.tensor([[8.0, 2, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]).double()
    scores = eval_linear.segmentation_scores(counts)
    assert scores["iou"] == [pytest.approx(100 * 8 / 14), pytest.approx(100 * 4 / 7), None, 0]
    assert scores["miou"] == pytest.approx(100 * (8 / 14 + 4 / 7) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 12 / 18)


def test_a_segmentation_killed_and_resumed_and_one_of_two_processes_are_the_same(
    base, streets, monkeypatch, tmp_path
):
    evaluate(monkeypatch, *segmenting(base, streets, tmp_path / "whole"))
    write = eval_linear.write

    def write_and_die(path, dump):
        write(path, dump)
        if path.suffix == ".pth" and torch.load(path, weights_only=True)["step"] == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_linear, "write", write_and_die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluate(patch, *segmenting(base, streets, tmp_path / "killed"))
    evaluate(monkeypatch, *segmenting(base, streets, tmp_path / "killed"))
    assert same(probe_of(tmp_path / "killed"), probe_of(tmp_path / "whole"))

    flags = segmenting(base, streets, tmp_path / "two")
    flags[flags.index("--batch_size_per_gpu") + 1] = 2
    statuses, outputs = ends(launch(eval_linear, *flags, world=2))
    assert statuses == [0, 0], outputs
    alone = results_of(tmp_path / "whole")
    shared = results_of(tmp_path / "two")
    assert shared["run"] == alone["run"]
    assert shared["segmentation"]["iou"] == pytest.approx(alone["segmentation"]["iou"], abs=0.5)
    one, two = probe_of(tmp_path / "whole")["probe"], probe_of(tmp_path / "two")["probe"]
    for a, b in zip(one.values(), two.values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def palette_mask(value, path):
    mask = Image.fromarray(np.full((32, 48), value, dtype=np.uint8))
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(path)
    assert Image.open(path).mode == "P"


def test_data_that_cannot_be_segmented_get_one_line(base, streets, monkeypatch, tmp_path):
    def message(root, *flags):
        return stopped(evaluate, monkeypatch, *segmenting(base, root, tmp_path / "out", *flags))

    assert "multiples of the patch, 8" in message(streets, "--segment", 30, 48)
    assert "two, H and W" in message(streets, "--segment", 32)
    assert "cannot list" in message(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(streets, copy)
    mask = copy / "train_masks" / "a" / "3.png"
    mask.unlink()
    assert "1 without a mask" in message(copy) and str(mask) in message(copy)
    Image.new("RGB", (48, 32)).save(mask)
    assert "has colours" in message(copy)
    mask.write_bytes(b"no mask")
    assert "3.png" in message(copy)
    Image.new("L", (24, 16), 2).save(mask)  # of another size, and a palette: they work
    palette_mask(4, copy / "val_masks" / "a" / "2.png")
    assert "goes to class 4, train_masks/ to 2" in message(copy)
    palette_mask(1, copy / "val_masks" / "a" / "2.png")
    (copy / "val" / "a" / "5.jpg").write_bytes(b"no image")
    evaluate(monkeypatch, *segmenting(base, copy, tmp_path / "works", "--epochs", 1))
    assert results_of(tmp_path / "works")["segmentation"]["pixel_accuracy"] > 0
    palette_mask(2, copy / "val_masks" / "a" / "2.png")
    flags = segmenting(base, copy, tmp_path / "works", "--epochs", 1)
    assert "its masks" in stopped(evaluate, monkeypatch, *flags), "other masks are another run"
    for path in (copy / "val_masks" / "a").iterdir():
        palette_mask(9, path)
    assert "class -1" in message(copy), "nothing but void"
    assert "--pictures" in message(copy, "--pictures", "x.png")


# ----------------------------------------------------------------------------------- the README


BLOCKS_OF_README = re.findall(
    r"```python\n(.*?)```", (Path(simdino.__file__).parent / "README.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("number", range(len(BLOCKS_OF_README)))
def test_the_snippets_of_the_readme_run(monkeypatch, tmp_path, number):
    text, folder = BLOCKS_OF_README[number], Path(simdino.__file__).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    if "matplotlib" in text:
        pytest.importorskip("matplotlib").use("Agg")
        Path("output_simdino").mkdir()
        entry = {"train_comp_loss": 0.5, "train_expa_loss": 0.1, "rank": 3.0}
        Path("output_simdino/log.txt").write_text(2 * (json.dumps(entry) + "\n"))
    if "CIFAR10" in text:
        images = [(Image.new("RGB", (32, 32)), label) for label in (3, 5, 3)]
        monkeypatch.setattr(datasets, "CIFAR10", lambda root, train, download: images[train:])
    Path("snippet.py").write_text(text)
    names = runpy.run_path("snippet.py")
    assert "loss" not in names or names["loss"].requires_grad
    assert "savefig" not in text or Path("log.png").stat().st_size > 1000
    if "CIFAR10" in text:
        train, val, _ = simdino.find_data(Path("cifar10"))
        assert (train[2], val[2]) == ([0, 1], [0, 0, 1]), "each has its class"
