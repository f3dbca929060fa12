# SPDX-License-Identifier: MIT
"""What the three scripts promise, in the order in which they promise it.

Numbers marked `official` come from the code of github.com/RobinWu218/SimDINO at commit 8149fc4, run
on the same inputs as the comments beside them say. What the scripts have in the same words is
tested in one of them. A run has processes of its own: run() starts them and waits for their end,
and at() changes a function of the script there, so that it fails or kills its process. Everything
runs on the CPU but test_training_on_a_gpu.
"""

import argparse
import copy
import csv
import errno
import inspect
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import zlib
from contextlib import contextmanager, suppress
from functools import partial, reduce
from itertools import chain, count, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from pytest import approx
from torch import nn
from torch.testing import assert_close
from torchvision.transforms.v2 import RandomResizedCrop

import eval_linear
import simdino
import simdinov2
from simdino import SimDINOLoss, coding_rate, effective_rank

SCRIPTS = [simdino, simdinov2, eval_linear]
FOLDER = Path(simdino.__file__).parent
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore")  # of images that are meant to be damaged


@pytest.fixture(scope="module", params=[simdino, simdinov2], ids=["v1", "v2"])
def script(request):
    return request.param


# ----------------------------------------------------------------------------- numbers to test with


@pytest.fixture(autouse=True)
def defaults():
    """Before and after each test."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def waves(*shape, a):
    """Float64 numbers in [-1, 1] that any machine computes alike."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(i * i * a).view(shape)


def rows(*shape, a):
    return F.normalize(waves(*shape, a=a), dim=-1)


def unit_views(n, d):
    """Student rows of 4 views and teacher rows of 2, of n images."""
    return rows(4, n, d, a=0.37).requires_grad_(), rows(2, n, d, a=0.11)


@torch.no_grad()
def fill(model):
    """Float64 weights that any machine computes alike."""
    for i, (name, p) in enumerate(sorted(model.double().state_dict().items())):
        n = torch.arange(1, p.numel() + 1, dtype=torch.float64).view(p.shape)
        p.copy_((0.5 if p.ndim == 1 else 0.2) * torch.sin(n * n * 0.01 + i))
        if re.search(r"norm\d?\.weight", name):
            p += 1
    return model


def fingerprint(x):
    """One number that depends on every entry of x."""
    return (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)).sum().item()


def check_equal(value, expected, x, accuracy=1e-12):
    """Two losses have the same value and the same gradient by x."""
    assert value.item() == approx(expected.item(), rel=accuracy)
    (ours,) = torch.autograd.grad(value, x, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, x, retain_graph=True)
    assert (ours - theirs).norm() < accuracy * theirs.norm()


# ------------------------------------------------------------------------------------- runs to test

# Processes start from a server that has imported this file: a new Python would take seconds for it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_simdino"])


@pytest.fixture(scope="session", autouse=True)
def surroundings():
    """One process, whatever started pytest, and one thread here and in the runs: more would make
    models as small as these slower."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide that a line waits in a buffer
    for script in SCRIPTS:
        script.WORLD = 1
        script.PROCESS = 0


def words(*flags):
    """A list of words: texts are split, paths and numbers are not."""
    lists = [flag.split() if isinstance(flag, str) else [str(flag)] for flag in flags]
    return list(chain(*lists))


def run(script, *flags, changes=(), **options):
    """A run of a script in processes of its own -> what they print. changes: functions that each
    process calls with the script before main(). options: those of processes()."""
    return processes(call_main, script.__name__, words(*flags), changes, **options)


def call_main(name, flags, changes):
    script = sys.modules[name]
    for change in changes:
        change(script)
    sys.argv = [script.__file__, *flags]
    script.main()


def processes(function, *arguments, world=1, status=0):
    """function(*arguments) in so many processes -> what they print. status: the exit status that
    each must have; None: any but 0."""
    port = str(free_port())
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for process in range(world):
                place = world, process, port, Path(folder, str(process))
                there = SERVER.Process(target=begin_process, args=(place, function, arguments))
                started.append(there)
                there.start()
            for process in started:
                process.join(300)
            statuses = [process.exitcode for process in started]  # None: it hangs
        finally:
            for process in started:
                process.kill()
        printed = "".join(path.read_text(errors="replace") for path in Path(folder).iterdir())
    assert None not in statuses, printed
    if status is None:
        assert all(statuses), printed
    else:
        assert statuses == [status] * world, printed
    return printed


def begin_process(place, function, arguments):
    """As torchrun starts a process. place: how many processes there are, the number of this one, a
    port, and the file to print to."""
    world, process, port, output = place
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"RANK": str(process), "WORLD_SIZE": str(world)}
    for script in SCRIPTS:
        script.WORLD = world
        script.PROCESS = process
    status = 1
    try:
        function(*arguments)
        status = 0
    finally:
        error = sys.exc_info()[1]
        if error:
            traceback.print_exception(error)
        sys.stdout.flush()
        os._exit(status)  # as the scripts do: Python would wait for their workers


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def at(name, call, act, process=0):
    """A change: before its call of this number, from 1, the function of this name does act()."""
    return partial(change_function, name, call, act, process)


def change_function(name, call, act, process, script):
    *places, last = name.split(".")
    place = reduce(getattr, places, script)
    function = getattr(place, last)
    calls = count(1)

    def changed(*arguments, **options):
        if next(calls) == call:
            act()
        return function(*arguments, **options)

    if script.PROCESS == process:
        setattr(place, last, changed)


def fail(error):
    raise error


KILL = partial(signal.raise_signal, signal.SIGKILL)
KILLED = -signal.SIGKILL  # the status


def fast_clock(script):
    """A change: 100 s pass from one look at the clock to the next, so that each epoch is saved."""
    script.time = SimpleNamespace(monotonic=count(0, 100).__next__, sleep=time.sleep)


TINY = (
    "--arch vit_nano --patch_size 8 --hidden_dim 32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --batch_size 8 --epochs 4 --warmup_epochs 1 --num_workers 0 "
    "--drop_path_rate 0.1 --lr 0.001 --eval_freq 2 --saveckp_freq 2"
)


def tiny(data, output, *more):
    """Flags of a small run."""
    return words(TINY, "--data_path", data, "--output_dir", output, *more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageNet-style root: 3 kinds, 30 images to train on, 61 to judge by; of each split, one
    file is damaged, and one of val has no label."""
    root = tmp_path_factory.mktemp("pictures")
    for split, images in ("train", 10), ("val", 20):
        for kind in range(3):
            folder = root / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for i in range(images):
                rng = np.random.default_rng((kind, i, images))
                image = simdino.draw_pattern(kind, rng, 40)
                image.save(folder / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
        (root / split / "kind1" / "4.jpg").write_bytes(b"\xff\xd8 not an image")
    shutil.copy(root / "val" / "kind0" / "0.png", root / "val" / "none.png")
    return root


@pytest.fixture(scope="module")
def finished(script, pictures, tmp_path_factory):
    """The folder of a run never interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("finished")
    return output, run(script, *tiny(pictures, output))


def weights_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder):
    return json_lines(folder / "log.txt")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


check_same = partial(assert_close, rtol=0, atol=0)  # of nested state dicts, to the last bit


def check_same_run(folder, other, rounding=0):
    """Two runs ended alike, to the last bit or to so much rounding of the weights."""
    ours = weights_of(folder)
    theirs = weights_of(other)
    parts = ["step", "student", "teacher"]
    if not rounding:
        parts.append("optimizer")
    for part in parts:
        assert_close(ours[part], theirs[part], rtol=0, atol=rounding)
    for entry, expected in zip(log_of(folder), log_of(other), strict=True):
        for name in "train_loss", "train_comp_loss", "train_expa_loss":
            assert entry[name] == approx(expected[name], rel=0, abs=4 * rounding), name
        assert rounding or entry["knn"] == expected["knn"]


# ----------------------------------------------------------------------------------------- the loss


@parametrize("n, d", [(5, 12), (12, 12), (40, 12)])
def test_coding_rate_is_the_formula_of_the_paper(n, d):
    z = rows(3, 2, n, d, a=0.37)
    expected = torch.logdet(torch.eye(d) + d / (n * 0.3) * z.mT @ z) / 2
    assert_close(coding_rate(z, 0.3), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda z: coding_rate(z, 0.3), z[0, 0].requires_grad_())


def official_loss(student, teacher, eps, expa_type=1, gpus=1):
    """Loss, comp and expa of the official code on so many GPUs, the mean over them, by its formula,
    in which the teacher has 2 views. A GPU forms the second moments of its own rows, and divides by
    the number of rows of all."""
    views, n, d = student.shape
    shared = len(teacher)
    cosines = []
    for t in range(shared):
        for s in range(views):
            if s != t:
                lengths = teacher[t].norm(dim=-1) * student[s].norm(dim=-1)
                cosines.append(((teacher[t] * student[s]).sum(-1) / lengths).mean())
    comp = sum(cosines) / len(cosines)
    z = student[:shared] if expa_type == 0 else (student[:shared] + teacher) / 2
    rates = []
    for own in chain(*(view.split(n // gpus) for view in z)):
        moments = own.mT @ own
        rates.append(torch.logdet(torch.eye(d) + d / (n * eps) * moments) / 2)
    expa = (d + n) / (d * n) * sum(rates) / len(rates)
    return -comp - expa, comp, expa


@parametrize("expa_type", [0, 1])
@parametrize("shared, d", [(2, 16), (2, 48), (1, 16), (3, 48)])
def test_loss_equals_the_official_one_on_one_process(shared, d, expa_type):
    x = waves(4, 24, d, a=0.37).requires_grad_()
    student = F.normalize(x, dim=-1)  # as both heads do
    teacher = rows(shared, 24, d, a=0.11).requires_grad_()
    expected, comp, expa = official_loss(student, teacher.detach(), 0.05, expa_type)
    loss_fn = SimDINOLoss(0.05, None, expa_type=expa_type)
    value, stats = loss_fn(student, teacher)
    check_equal(value, expected, x)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)
    assert_close([*stats.values()], [comp.detach(), expa.detach()])
    gamma = (d + 24) / (d * 24)
    value = SimDINOLoss(0.05, None, 3.0, 0.25, expa_type)(student, teacher)[0]
    check_equal(value, -3 * comp - 0.25 / gamma * expa, x)
    check_equal(loss_fn(160 * student, 3 * teacher)[0], expected, x)  # of rows of any length
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_fn(student.float(), teacher.float())[0]
    check_equal(value, expected, x, 1e-5)


def test_defaults_equal_the_published_run_on_8_gpus_of_64():
    x = waves(4, 512, 256, a=0.37).requires_grad_()
    student = F.normalize(x, dim=-1)
    _, teacher = unit_views(512, 256)
    expected = official_loss(student, teacher, 0.05, gpus=8)[0]
    check_equal(SimDINOLoss()(student, teacher)[0], expected, x, 1e-11)
    # The same in 8 rounds of 64, if gamma is that of the 512
    loss_fn = SimDINOLoss(gamma=(256 + 512) / (256 * 512))
    parts = zip(student.split(64, dim=1), teacher.split(64, dim=1))
    check_equal(sum(loss_fn(*part)[0] for part in parts) / 8, expected, x, 1e-11)


def test_a_group_that_does_not_divide_the_images_is_refused():
    with pytest.raises(ValueError, match="group_size 16 divides neither 40 images nor the 40 of"):
        SimDINOLoss(group_size=16)(*unit_views(40, 12))


def test_compiled_as_one_graph_the_loss_has_the_same_value_and_gradient():
    loss_fn = SimDINOLoss(group_size=8)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    student, teacher = unit_views(16, 12)
    check_equal(compiled(student, teacher)[0], loss_fn(student, teacher)[0], student)


def test_views_and_images_in_the_other_order_are_refused():
    """With images in place of views, the features would collapse."""
    z = rows(64, 12, 8, a=0.3)
    with pytest.raises(ValueError, match=r"the order is \(views, images, d\)"):
        SimDINOLoss(group_size=None)(z, z)


def test_nothing_is_gathered_where_the_group_divides_the_rows_of_a_process(monkeypatch):
    monkeypatch.setattr(dist, "all_gather", lambda *_: sys.exit("gathered"))
    monkeypatch.setattr(SimDINOLoss, "processes", staticmethod(lambda: 8))
    views = unit_views(64, 256)
    for group in 1, 16, 64:
        SimDINOLoss(group_size=group)(*views)
    for group in 128, None:
        with pytest.raises(SystemExit, match="gathered"):
            SimDINOLoss(group_size=group)(*views)


def definitions(script):
    """By name: the source text of functions and classes, and the values of constants."""
    found = {}
    for name, value in vars(script).items():
        if getattr(value, "__module__", "") == script.__name__:
            found[name] = inspect.getsource(value)
        elif name.isupper() and not inspect.ismodule(value):
            found[name] = value
    return found


def test_the_loss_can_be_lifted_out_of_the_file_with_torch_alone(tmp_path):
    parts = definitions(simdino)
    text = "import torch\n" + parts["coding_rate"] + parts["SimDINOLoss"]
    (tmp_path / "lifted.py").write_text(text, encoding="utf-8")
    lifted = runpy.run_path(tmp_path / "lifted.py")["SimDINOLoss"]
    views = unit_views(64, 32)
    assert lifted()(*views)[0] == SimDINOLoss()(*views)[0]


def test_what_the_scripts_share_stands_in_each_in_the_same_words():
    v1 = definitions(simdino)
    v2 = definitions(simdinov2)
    judge = definitions(eval_linear)
    differs = words(
        "add_branch Block VisionTransformer Network FIGURES SimDINO parameter_groups SMALL "
        "parse_args MicroBatches build schedules load_pretrained"
    )
    assert {name for name in v1 if v1[name] != v2.get(name)} == {*differs}
    assert [name for name in v2 if name in v1] == [*v1]  # in the same order
    added = "masked_patch_loss LayerScale block_masks"
    assert v2.keys() - v1.keys() == {*added.split()}
    differs = {name for name in judge if name in v2 and judge[name] != v2[name]}
    assert differs == {"Block", "VisionTransformer", "parse_args", "main"}


def self_distil(gamma, momentum=0.9, steps=150, unit=True):
    """SimDINO on noisy views of 64 points: student rows, teacher rows, the teacher's mean move."""
    torch.manual_seed(0)
    points = torch.randn(64, 16)
    student = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    moved = 0.0
    for _ in range(steps):
        views = points + 0.3 * torch.randn(4, 64, 16)
        z_s = student(views)
        z_t = teacher(views[:2]).detach()
        optimizer.zero_grad()
        loss = SimDINOLoss(0.4, None, gamma=gamma)(z_s, z_t)[0]
        if not unit:  # ½‖z_s - z_t‖² - γ R of rows of any length
            distances = (z_t[:, None] - z_s).square().sum(-1).mean(-1) / 2  # (2, 4)
            rate = coding_rate((z_s[:2] + z_t) / 2, 0.4).mean()
            loss = (distances.sum() - distances.diagonal().sum()) / 6 - (1 / 16 + 1 / 64) * rate
        loss.backward()
        optimizer.step()
        before = F.normalize(teacher(points), dim=-1)
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.data.lerp_(q.data, 1 - momentum)
        moved += (F.normalize(teacher(points), dim=-1) - before).norm(dim=-1).mean().item()
    return student(points).detach(), teacher(points).detach(), moved / steps


def rank_of(z):
    return effective_rank(F.normalize(z, dim=-1))


def test_coding_rate_prevents_collapse_and_without_it_features_collapse():
    with_rate, _, _ = self_distil(None, steps=800)
    without, _, _ = self_distil(0.0, steps=800)
    assert rank_of(with_rate) > 10  # of 16 directions nearly all are in use
    assert rank_of(without) < 1.5  # pulled together by nothing but each other, all features agree


def test_without_l2_normalisation_the_rate_is_bought_by_length_not_by_diversity():
    """By the paper's terms alone: SimDINOLoss normalises."""
    unit, _, _ = self_distil(None)
    free, _, _ = self_distil(None, unit=False)
    lengths = free.norm(dim=-1)
    assert lengths.mean() > 2 and lengths.std() > 0.1 * lengths.mean()
    assert rank_of(free) < rank_of(unit)


def test_a_slower_teacher_is_steadier_and_further_behind():
    gaps = []
    moves = []
    for momentum in 0.0, 0.9, 0.99:
        student, teacher, moved = self_distil(None, momentum, steps=60)
        gap = F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)
        gaps.append(gap.norm(dim=-1).mean().item())
        moves.append(moved)
    assert gaps[0] < 1e-6 and gaps[0] < gaps[1] < gaps[2]
    assert moves[0] > moves[1] > moves[2]


# ---------------------------------------------------------------------------------------- the model


def tiny_vit(script=simdino, **options):
    return script.VisionTransformer(32, 8, 32, 3, 4, **options)


# official, in simdino/: VisionTransformer([32], 8, embed_dim=32, depth=3, num_heads=4,
#     qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)), put through fill(model).eval() and
#     the test's lines
@parametrize(
    "height, width, features",
    [(32, 32, 1.5252037344687581), (16, 16, 2.9070248537220484), (48, 24, 2.212051347187865)],
)
def test_vit_equals_the_official_one_at_any_size(height, width, features):
    model = fill(tiny_vit()).eval()
    n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    with torch.no_grad():
        assert fingerprint(model(torch.sin(n * n * 0.05))) == approx(features, rel=1e-9)


# official: DinoVisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=4, layerscale=0.1,
#     block_chunks=0, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
#     put through fill(model).eval() and the test's lines
@parametrize(
    "height, width, masked, official",
    [
        (32, 32, False, [0.10318832708893666, 0.10881147621735199, 12.799606920611724]),
        (32, 32, True, [-4.940383799328852, 2.5265665137142204, -5.835303549566303]),
        (16, 16, False, [-3.65211984147059, 1.7188289429619559, 2.5810390103845813]),
        (48, 24, True, [-5.481463290903153, 1.7748774067798925, 4.293637027881342]),
    ],
)
def test_v2_vit_equals_the_official_one_masked_and_not(height, width, masked, official):
    n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    masks = None
    if masked:
        masks = torch.arange(2 * height * width // 64).view(2, -1) % 3 == 1
    with torch.no_grad():
        model = fill(tiny_vit(simdinov2)).eval()
        tokens = model.forward_features(torch.sin(n * n * 0.05), masks)
    # The official model interpolates positions in float32.
    accuracy = 1e-9 if height == width == 32 else 1e-6
    assert [fingerprint(x) for x in tokens.values()] == approx(official, rel=accuracy)


def test_weights_begin_as_the_official_ones(script):
    # official: linear layers, positions and v1's CLS of std 0.02; in v2 CLS and registers of 1e-6;
    # norms 1, LayerScale's factors as given, biases and the mask token 0; the patches are PyTorch's
    model = build(script, "--arch vit_tiny --data_path x")
    small = "register_tokens" if script is simdino else "_tokens?"
    for name, p in model.student.named_parameters():
        if "patch_embed" in name:
            continue
        if re.search("bias|mask_token", name):
            assert not p.any()
        elif re.search(r"norm\d?\.weight", name):
            assert (p == 1).all()
        elif "gamma" in name:
            assert (p == 0.1).all()
        else:
            std = 1e-6 if re.search(small, name) else 0.02
            assert p.std().item() == approx(std, rel=0.25), name


def test_traced_and_exported_the_vit_takes_any_number_of_images(script):
    model = tiny_vit(script).eval()
    few = torch.randn(2, 3, 32, 32)
    many = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        sizes = {"x": {0: torch.export.Dim("images", min=1, max=512)}}
        exported = torch.export.export(model, (few,), dynamic_shapes=sizes).module()
        for form in torch.jit.trace(model, few), exported:
            assert_close(form(many), model(many))


def test_stochastic_depth_drops_more_the_deeper_the_block_and_keeps_the_expectation():
    model = tiny_vit(drop_path_rate=0.5)
    for keep, rate in zip(model.stochastic_depth(torch.zeros(4000, 3, 32, 32)), (0, 0.25, 0.5)):
        dropped = (keep == 0).flatten(1).double()
        shares = [*dropped.mean(1).tolist(), dropped.prod(0).mean().item()]
        assert shares == approx([rate, rate, rate**2], abs=0.025)  # 3 sigma
        assert keep.max().item() == approx(1 / (1 - rate))
    x = torch.randn(3, 5, 32)
    keep = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 2.0]]).view(2, 3, 1, 1)
    block = model.blocks[0]
    y = x + keep[0] * block.attn(block.norm1(x))
    y = y + keep[1] * block.mlp(block.norm2(y))
    assert_close(block(x, keep), y)


def test_v2_computes_the_drawn_samples_alone_always_as_many_and_scales_them():
    model = tiny_vit(simdinov2, drop_path_rate=0.25)
    keep = model.stochastic_depth(torch.zeros(200, 3, 32, 32))
    drawn = {frozenset(samples.tolist()) for samples in keep.flatten(0, 1)}
    assert keep.shape == (3, 2, 150) and len(drawn) == 6  # anew for each branch
    x = torch.randn(5, 7, 32, requires_grad=True)
    keep = torch.tensor([[4, 2, 0], [1, 4, 3]])
    kept = torch.zeros(2, 5, 1, 1).scatter_(1, keep[..., None, None], 5 / 3)
    block = model.blocks[0]
    y = x + kept[0] * block.ls1(block.attn(block.norm1(x)))
    y = y + kept[1] * block.ls2(block.mlp(block.norm2(y)))
    seen = []
    block.attn.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    value = block(x, keep).sin().sum()
    assert seen == [3]
    for of in x, block.ls1.gamma, block.mlp.fc1.weight:
        check_equal(value, y.sin().sum(), of, 1e-5)


def test_projection_head_is_the_official_one_in_float32():
    # official: three linear layers with GELU between, and normalised rows
    head = simdino.ProjectionHead(32, 64, 16)
    first, _, second, _, third = head.mlp
    x = torch.randn(5, 32)
    expected = F.normalize(third(F.gelu(second(F.gelu(first(x))))), dim=-1)
    assert_close(head(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32


def test_block_masks_have_the_statistics_of_the_official_generator():
    draws = [simdinov2.block_masks(128, 14, 0.5, (0.1, 0.5), (0, seed)) for seed in range(30)]
    masks = torch.stack(draws)
    ratio = masks.float().mean(-1)
    assert (ratio > 0).sum(1).eq(64).all()  # half of the crops of every batch
    assert 0.45 < (ratio[:, :64] > 0).float().mean() < 0.55  # any half
    # official: generator = MaskingGenerator((14, 14), max_num_patches=98), and of 1,920 masks
    #     [generator(int(196 * random.uniform(low, high))) for low, high in zip(bounds, bounds[1:])]
    #     with bounds = np.linspace(0.1, 0.5, 65), 30 times, these mean and quantiles; and this
    #     share of the patches below a masked one is masked
    masks = masks[ratio > 0].unflatten(-1, (14, 14))
    ratio = ratio[ratio > 0]
    assert ratio.mean().item() == approx(0.2971, abs=0.002)
    quantiles = ratio.quantile(torch.tensor([0, 0.1, 0.5, 0.9, 1])).tolist()
    assert quantiles == approx([0.092, 0.138, 0.296, 0.459, 0.495], abs=0.006)
    assert masks[:, 1:][masks[:, :-1]].float().mean().item() == approx(0.8115, abs=0.01)


def test_parameter_groups_scale_and_decay_as_the_official_ones():
    # official, by its rule: 0.9 ** (depth + 1 - layer), the embeddings being layer 0, block i layer
    # i + 1, all else depth + 1; the patch embedding times 0.2; no decay of biases, norms and gammas
    student = nn.Module()
    student.backbone = tiny_vit(simdinov2)
    student.head = simdinov2.ProjectionHead(32, 16, 8)
    found = {}
    for group in simdinov2.parameter_groups(student, 0.9, 0.2):
        for p in group["params"]:
            assert p not in found
            found[p] = [group["lr_scale"], group["decay_scale"]]
    for name, p in student.named_parameters():
        layer = 4
        if re.search("_token|pos_embed|patch_embed", name):
            layer = 0
        elif "blocks." in name:
            layer = 1 + int(name.split(".")[2])
        scale = 0.9 ** (4 - layer) * (0.2 if "patch_embed" in name else 1)
        decay = 0.0 if re.search("bias|norm|gamma", name) else 1.0
        assert found.pop(p) == approx([scale, decay]), name
    assert not found


# ---------------------------------------------------------------------- the views, and augmentation


def test_multicrop_is_the_random_resized_crop_of_torchvision():
    image = TF.pil_to_tensor(photo(250, 200))
    torch.manual_seed(0)
    views = simdino.MultiCrop(64, 32, (0.3, 0.9), (0.05, 0.4), 6)(image)
    torch.manual_seed(0)
    for number, view in enumerate(views):
        size, scale = (64, (0.3, 0.9)) if number < 2 else (32, (0.05, 0.4))
        crop = RandomResizedCrop(size, scale, interpolation=TF.InterpolationMode.BICUBIC)
        assert torch.equal(view, crop(image))


@parametrize("blur, solarize", [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)])
@parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_photometric_equals_torchvision_image_by_image(monkeypatch, blur, solarize, order):
    draws = []
    uniform = simdino.uniform
    n = 60
    monkeypatch.setattr(simdino, "uniform", lambda *x: draws.append(uniform(*x)) or draws[-1])
    monkeypatch.setattr(torch, "randperm", lambda _: torch.tensor(order))
    pixels = torch.randint(256, (n, 3, 24, 32), dtype=torch.uint8)
    pixels[::3] = pixels[::3, :1]  # gray
    pixels[1::3] = 255 * (pixels[1::3] > 127)  # saturated
    ours = simdino.photometric(pixels, blur, solarize)
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    assert {draw.shape for draw in draws} == {(n, 1, 1, 1)}
    for i, x in enumerate(pixels / 255):
        flip, jittered, *factors, gray, blurred, sigma = [draw[i].item() for draw in draws[:9]]
        if flip < 0.5:
            x = TF.hflip(x)
        if jittered < 0.8:
            for operation, factor in zip(order, factors):
                x = jitter[operation](x, factor)
        if gray < 0.2:
            x = TF.rgb_to_grayscale(x, 3)
        if blurred < blur:
            x = TF.gaussian_blur(x, 13, sigma)
        if solarize and draws[9][i] < solarize:
            x = TF.solarize(x, 128 / 255)
        expected = TF.normalize(x, simdino.MEAN, simdino.STD)
        # A value that rounding moves over the threshold of solarisation changes by much.
        wrong = ((ours[i] - expected).abs() > 1e-4).float().mean()
        assert wrong <= (0.01 if solarize else 0)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]  # of brightness, …, hue
    bounds = [ranges[operation] for operation in order] + [(0.1, 2.0)]
    for (low, high), draw in zip(bounds, [*draws[2:6], draws[8]], strict=True):
        assert low <= draw.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < draw.max() <= high


def test_augment_blurs_and_solarizes_each_kind_of_view_as_often_as_dino(monkeypatch):
    seen = []
    monkeypatch.setattr(
        simdino, "photometric", lambda x, **chances: seen.append((len(x), chances)) or x
    )
    views = [torch.full((2, 3, size, size), size) for size in (8, 9, 4, 4, 4)]
    out = simdino.augment(views)
    assert seen[:2] == [(2, {"blur": 1.0}), (2, {"blur": 0.1, "solarize": 0.2})]
    assert seen[2:] == [(6, {"blur": 0.5})]  # all local views at once
    assert all(torch.equal(*pair) for pair in zip(out, views, strict=True))


# ---------------------------------------------------------------------------------- a training step


def build(script, *flags):
    """The model that these flags make."""
    return script.build(script.parse_args(words(TINY, *flags)), CPU)


def micro_batch(script, own=slice(8), seed=0):
    """A micro-batch, as step() takes it, of the images own (a slice) of 16."""
    views = []
    for k, size in enumerate([32, 32, 16, 16]):
        views.append((127 * (1 + waves(16, 3, size, size, a=0.3 + k)))[own].byte())
    if script is simdino:
        return seed, views
    masks = waves(2, 16, 16, a=0.7) > 0.4
    masks[:, ::3] = False  # some crops have none
    masks = masks[:, own].flatten(0, 1)
    return seed, views, masks, masks.flatten().nonzero().flatten()


STILL = {"lr": 0.0, "weight_decay": 0.0, "momentum": 1.0}  # a step that changes no weights


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.params])


def test_a_step_has_the_loss_and_the_gradient_of_the_formula(script):
    """From the modules alone, view by view, with the official loss, in float64."""
    torch.set_default_dtype(torch.float64)
    weight = "--ibot_loss_weight 0.7" if script is simdinov2 else ""
    model = build(script, "--clip_grad 0 --drop_path_rate 0", weight)
    student = model.student
    teacher = model.teacher
    for p in teacher.parameters():
        p *= 1.2
    seed, views, *hidden = micro_batch(script)
    metrics, rows = model.step([(seed, views, *hidden)], **STILL)
    assert student.training and not any(module.training for module in teacher.modules())

    torch.manual_seed(seed)
    views = script.augment(views)
    z_s = [student.head(student.backbone(view)) for view in views]
    z_t = [teacher.head(teacher.backbone(view)) for view in views[:2]]
    patch_loss = []
    if script is simdinov2:
        masks = hidden[0].unflatten(0, (2, -1))
        cosines = []
        for i in range(2):
            tokens = student.backbone.forward_features(views[i], masks[i])
            z_s[i] = student.head(tokens["x_norm_clstoken"])
            p_s = student.head(tokens["x_norm_patchtokens"])
            p_t = teacher.head(teacher.backbone.forward_features(views[i])["x_norm_patchtokens"])
            for cosine, mask in zip((p_s * p_t).sum(-1), masks[i]):
                cosines.append(cosine[mask].mean() if mask.any() else torch.tensor(0.0))
        patch_loss = [-sum(cosines) / 16]
    loss, comp, expa = official_loss(torch.stack(z_s), torch.stack(z_t), 0.4)
    loss = loss + 0.7 * sum(patch_loss)
    expected = torch.stack([loss, comp, expa, *(-patch for patch in patch_loss)])
    assert_close(metrics, expected.detach(), rtol=1e-9, atol=0)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.params)])
    assert_close(gradient_of(model), gradient, rtol=1e-6, atol=1e-9)
    z = (torch.stack(z_s[:2]) + torch.stack(z_t)) / 2
    assert_close(rows, z.detach().flatten(0, 1))


def test_the_example_in_the_docstring_trains_without_a_collapse(script, capsys, tmp_path):
    code = textwrap.dedent(inspect.getdoc(script.SimDINO).split("\n\n")[-1])
    (tmp_path / "example.py").write_text(code.replace("range(100)", "range(12)"))
    runpy.run_path(tmp_path / "example.py", vars(script).copy())
    rows = [line.replace("[", "").replace("]", "") for line in capsys.readouterr().out.splitlines()]
    ranks = [float(row.split()[-1]) for row in rows]
    assert len(ranks) == 12 and ranks[-1] > 2


def test_a_step_clips_then_takes_adamws_step_then_moves_the_teacher(script):
    model = build(script, "--drop_path_rate 0 --clip_grad 0.02")
    assert model.optimizer.defaults["betas"] == (0.9, 0.999)
    before = [p.detach().clone() for p in model.params]
    lr = 1e-3
    model.step([micro_batch(script)], lr, weight_decay=0.1, momentum=0.9)
    for p, old, t in zip(model.params, before, model.teacher.parameters(), strict=True):
        expected = old * (1 - lr * 0.1 * (p.ndim > 1))  # biases and norms do not decay
        expected = expected - lr * p.grad / (p.grad.abs() + 1e-8)  # AdamW's first step
        assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
        assert_close(t, 0.9 * old + 0.1 * p, rtol=1e-5, atol=1e-8)

    free = build(script, "--drop_path_rate 0 --clip_grad 0")
    free.step([micro_batch(script)], lr, 0.1, 0.9)
    grads = [p.grad for p in free.params]
    parts = [[grad] for grad in grads]  # v1 clips each tensor by itself, v2 backbone and head
    if script is simdinov2:
        in_backbone = len(list(free.student.backbone.parameters()))
        parts = [grads[:in_backbone], grads[in_backbone:]]
    expected = []
    for part in parts:
        norm = torch.cat([grad.flatten() for grad in part]).norm()
        assert norm > 0.02 or script is simdino  # too long
        expected += [grad * min(1, 0.02 / (norm + 1e-6)) for grad in part]
    assert_close([p.grad for p in model.params], expected, rtol=1e-4, atol=1e-9)


def test_in_fp16_gradients_are_unscaled_before_they_are_clipped(script):
    whole = build(script, "--drop_path_rate 0 --clip_grad 0.02")
    half = build(script, "--drop_path_rate 0 --clip_grad 0.02 --amp fp16")
    half.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)  # with which nothing overflows
    for model in whole, half:
        model.step([micro_batch(script)], **STILL)
    difference = gradient_of(half) - gradient_of(whole)
    assert difference.norm() < 0.05 * gradient_of(whole).norm()


def test_checkpointed_gradients_are_the_same_to_the_last_bit(script):
    flags = "--drop_path_rate 0.4 --clip_grad 0"
    plain = build(script, flags)
    thrifty = build(script, flags, "--grad_checkpointing")
    calls = []
    for block in thrifty.student.backbone.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    for model in plain, thrifty:
        model.step([micro_batch(script)], **STILL)
    assert torch.equal(gradient_of(plain), gradient_of(thrifty)) and gradient_of(plain).any()
    assert len(calls) == 2 * 2 * 4  # both sizes of views pass each of four blocks twice


# -------------------------------------------------------------------------------------- the options


RECIPES = {
    simdino: "--arch vit_base --batch_size 512 --group_size 64 --eps_sq 0.4 --coeff 1 "
    "--expa_type 1 --lr 5e-4 --min_lr 1e-6 --momentum_teacher 0.996 --drop_path_rate 0.1 ",
    simdinov2: "--arch vit_base --batch_size 1024 --group_size 128 --eps_sq 0.4 --coeff 1 "
    "--expa_type 1 --lr 4e-3 --min_lr 1e-6 --momentum_teacher 0.9 --drop_path_rate 0.2 "
    "--num_register_tokens 4 --layerscale 0.1 --layerwise_decay 0.9 --patch_embed_lr_mult 0.2 "
    "--mask_sample_probability 0.5 --mask_ratio_min_max 0.1 0.5 --ibot_loss_weight 1 ",
}
OF_BOTH = (
    "--data_path x --patch_size 16 --hidden_dim 2048 --epochs 100 --warmup_epochs 10 --clip_grad 3 "
    "--weight_decay 0.04 --weight_decay_end 0.4 --global_crops_size 224 --local_crops_size 96 "
    "--global_crops_scale 0.4 1 --local_crops_scale 0.05 0.4 --local_crops_number 10"
)


def test_recipes_are_the_published_ones_for_any_number_of_gpus(monkeypatch, script):
    sizes = [[96, 4, 3], [192, 12, 3], [384, 12, 6], [768, 12, 12], [1024, 24, 16]]
    assert [[*size.values()] for size in script.ARCHS.values()] == sizes
    assert eval_linear.HEADS_OF == {width: heads for width, _, heads in sizes}
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    for world in 1, 2, 4, 8:
        monkeypatch.setattr(script, "WORLD", world)
        args = script.parse_args(["--data_path", "x"])
        assert args == script.parse_args(words(RECIPES[script], OF_BOTH))
        assert args.batch_size_per_gpu == args.group_size
        args.arch = "vit_nano"
        model = script.build(args, CPU)
        assert model.rounds == 8 // world
        n = args.batch_size
        assert model.loss_fn.gamma == approx((256 + n) / (256 * n))


@parametrize(
    "world, flags, rule",
    [
        (3, "--batch_size 64 --group_size 1", "--batch_size 64 must be a multiple of the 3 proc"),
        (4, "--batch_size_per_gpu 8 --group_size 12", "--group_size 12 must divide"),
        (2, "--batch_size_per_gpu 8 --group_size 64", "a multiple of it that divides the 16"),
        (1, "--warmup_epochs 8", "--warmup_epochs 8.0 must be below --epochs 8"),
        (1, "--local_crops_size 20", "views of 20 pixels: not a multiple of --patch_size 8"),
        (1, "--eps 0.05", "unrecognized arguments: --eps 0.05"),  # not taken for --eps_sq
    ],
)
def test_sizes_that_do_not_fit_and_abbreviations_are_refused(
    monkeypatch, capsys, script, world, flags, rule
):
    monkeypatch.setattr(script, "WORLD", world)
    script.parse_args(words("--batch_size 480 --batch_size_per_gpu 1 --group_size", world))
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(flags.split())
    assert rule in capsys.readouterr().err


# ----------------------------------------------------------------------------- the images of a step


def test_images_are_drawn_by_seed_epoch_and_index_and_unreadable_ones_replaced(tmp_path):
    names = [f"{i}.png" for i in range(100)]
    for i, name in enumerate(names):
        Image.new("L", (4, 4), i).save(tmp_path / name)
    for name in names[1::2]:
        (tmp_path / name).write_bytes(b"")

    def drawn(items, seed=6):
        transform = lambda image: [image[0, 0, 0].item(), torch.rand(()).item()]
        images = simdino.Images(tmp_path, names, range(100), transform, seed)
        return {item: images[item] for item in items}

    items = [*product(range(2), range(100))]
    first = drawn(items)
    assert drawn(reversed(items)) == first
    assert drawn(items[:100], seed=7) != drawn(items[:100])
    assert len({number for (_, number), _ in first.values()}) == 200  # anew each epoch
    for item in items[::2]:
        (shown, _), label = first[item]
        assert shown == label == item[1]
    replaced = [first[item] for item in items[1::2]]
    assert {label for _, label in replaced} == {-1}
    assert len({shown for (shown, _), _ in replaced}) > 30  # by many


class FakeImages:
    """In place of 50 Images: 50 * epoch + image in each pixel of two views, and a label."""

    def __len__(self):
        return 50

    def __getitem__(self, item):
        number = 50 * item[0] + item[1]
        return [torch.full((3, 4, 4), number), torch.full((3, 4, 4), -number)], 7


def micro_batches(script, size, seed=0):
    """Those of 8 steps of 12 of the 50 images: two epochs."""
    more = "--batch_size 12 --group_size 1 --global_crops_size 48 --batch_size_per_gpu"
    args = script.parse_args(words(more, size, "--seed", seed))
    items = script.MicroBatches(FakeImages(), args)
    return [items[item] for item in product(range(8), range(12 // size))]


def test_steps_take_the_same_images_however_they_are_cut_into_micro_batches(script):
    def taken(size, seed=0):
        views = [item[1][0][:, 0, 0, 0] for item in micro_batches(script, size, seed)]
        return torch.cat(views).tolist()

    keys = taken(12)
    assert taken(3) == taken(4) == keys and taken(12, seed=1) != keys
    first = keys[:48]
    second = [key - 50 for key in keys[48:]]
    assert len(set(first)) == len(set(second)) == 48 and first != second  # in another order
    assert set(first) | set(second) <= {*range(50)}
    items = micro_batches(script, 3) + micro_batches(script, 3, seed=1)
    assert len({item[0] for item in items}) == 2 * 8 * 4  # a seed of each
    if script is simdinov2:
        for seed, _, masks, index in items[:32]:
            assert torch.equal(masks, script.block_masks(6, 6, 0.5, (0.1, 0.5), seed))
            assert torch.equal(index, masks.flatten().nonzero()[:, 0])


# ------------------------------------------------------------------------------------- the training


def test_schedules_reproduce_the_official_log():
    # assets/SimDNIOv1_vitb16.txt, official: epoch, train_lr, train_wd; 2502 steps of 512 images
    schedule = simdino.schedules(simdino.parse_args(["--data_path", "x"]), 2502)
    for epoch, train_lr, train_wd in (
        (0, 4.99820136696111e-05, 0.04002958960483863),
        (9, 0.0009500179863303882, 0.047963999953206556),
        (10, 0.0009998986293786, 0.04971127240897121),
        (50, 0.0005786384895696651, 0.22282607096534862),
        (99, 1.1014922368712136e-06, 0.3999703748959069),
    ):
        steps = slice(epoch * 2502, (epoch + 1) * 2502)
        assert np.mean(schedule["lr"][steps]) == approx(train_lr, rel=1e-9)
        assert np.mean(schedule["weight_decay"][steps]) == approx(train_wd, rel=1e-9)
    # The log has no momentum: at the start and half-way
    momentum = schedule["momentum"]
    assert [momentum[0], momentum[50 * 2502]] == approx([0.996, 0.998])


def test_the_rate_of_v2_grows_with_the_root_of_the_batch():
    for batch, peak in (1024, 4e-3), (256, 2e-3):
        flags = words("--data_path x --batch_size_per_gpu 128 --batch_size", batch)
        schedule = simdinov2.schedules(simdinov2.parse_args(flags), 10)
        assert max(schedule["lr"]) == approx(peak)


# A process's micro-batches, the group, and whether what is drawn is alike, by number of processes
WORLD_CASES = {
    "groups inside a process": ({1: 4, 2: 4, 4: 4}, 2, True),
    "groups across processes": ({1: 8, 2: 4, 4: 4}, 8, False),
    "the whole batch": ({1: 16, 2: 8, 4: 4}, 16, False),
}


def step_gradient(script, case):
    """Metrics and gradient of a step in float64 on 16 images, those of this process."""
    sizes, group, drawn = WORLD_CASES[case]
    own = sizes[script.WORLD]
    flags = words("--clip_grad 0 --batch_size 16 --batch_size_per_gpu", own, "--group_size", group)
    model = build(script, *flags, "--drop_path_rate", 0.3 if drawn else 0)
    if not drawn:  # what is drawn for micro-batches of other sizes would differ
        script.augment = lambda views: [x / 255 - 0.5 for x in views]
    parts = []
    for m in range(script.PROCESS, 16 // own, script.WORLD):
        parts.append(micro_batch(script, slice(own * m, own * (m + 1)), seed=5 + m))
    metrics, _ = model.step(parts, **STILL)
    return metrics, gradient_of(model)


def save_gradients(path):
    """In each process: all gradients, and metrics as their mean over processes."""
    world = simdino.WORLD
    torch.set_default_dtype(torch.float64)  # of weights, draws and pixels
    if world > 1:
        dist.init_process_group("gloo")
    found = {}
    for case in WORLD_CASES:
        for script in simdino, simdinov2:
            metrics, gradient = step_gradient(script, case)
            if world > 1:
                dist.all_reduce(metrics)
            found[script.__name__, case] = metrics / world, gradient
    if simdino.PROCESS == 0:
        torch.save(found, path)
    simdino.end_process()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """By number of processes."""
    found = {}
    for world in 1, 2, 4:
        path = tmp_path_factory.mktemp("gradients") / "found"
        processes(save_gradients, path, world=world)
        found[world] = torch.load(path, weights_only=True)
    return found


@parametrize("case", WORLD_CASES)
def test_gradients_do_not_depend_on_the_number_of_processes(gradients, script, case):
    metrics, gradient = gradients[1][script.__name__, case]
    for world in 2, 4:
        other_metrics, other_gradient = gradients[world][script.__name__, case]
        assert_close(other_metrics, metrics, rtol=1e-9, atol=0)
        assert (other_gradient - gradient).norm() < 1e-9 * gradient.norm()


def test_a_run_is_the_same_on_any_number_of_processes(script, pictures, tmp_path):
    flags = tiny(pictures, tmp_path / "1", "--batch_size_per_gpu 2 --group_size 2")
    accuracies = set()
    for world in 1, 2, 4:
        printed = run(script, *flags, "--output_dir", tmp_path / str(world), world=world)
        accuracies |= {*re.findall("k-NN accuracy after epoch 0: (.*) %", printed)}
    assert len(accuracies) == 1  # each image was judged once
    begun = ["--output_dir", tmp_path / "begun"]
    run(script, *flags, *begun, "--max_steps 5", world=2)
    run(script, *flags, *begun)  # begun by two, finished by one
    for name in "2", "4", "begun":
        # AdamW makes full steps of gradients that are 0 but for rounding, as of keys' biases.
        check_same_run(tmp_path / name, tmp_path / "1", rounding=5e-6)


# -------------------------------------------------------------------------------- what a run leaves


def test_log_and_terminal_say_what_happened(script, finished, pictures):
    folder, printed = finished
    entries = log_of(folder)
    keys = "epoch train_loss train_comp_loss train_expa_loss train_lr train_wd rank knn img_s "
    keys += "data_wait"
    schedule = script.schedules(script.parse_args(tiny("x", "y")), 3)
    for epoch, entry in enumerate(entries):
        loss = -entry["train_comp_loss"] - entry["train_expa_loss"]
        if script is simdinov2:
            loss -= entry.pop("train_patch_cosine")
        assert list(entry) == keys.split() and entry["epoch"] == epoch
        assert entry["train_loss"] == approx(loss, abs=1e-5)
        steps = slice(3 * epoch, 3 * epoch + 3)
        assert entry["train_lr"] == approx(np.mean(schedule["lr"][steps]))
        assert entry["train_wd"] == approx(np.mean(schedule["weight_decay"][steps]))
        assert 1 <= entry["rank"] <= 16
        assert f"epoch {epoch + 1}/4 step {3 * epoch + 3}/12 loss " in printed
    kept = 100 * math.prod(schedule["momentum"])
    begin = (
        f"{pictures}/train: 30 images in 3 folders, 0 other files\n"
        f"{pictures}/val: 61 images in 3 folders, 0 other files\n"
        "vit_nano in torch.float32, with its head 0.5 million parameters\n"
        "a step: 8 images = 1 rounds x 1 processes x 8; 12 steps = 4 epochs x 3\n"
        f"only 12 steps: the teacher, which is the result, keeps {kept:.0f} % of its first weights."
    )
    assert begin in printed and "k-NN leaves out 2 of 61 images" in printed
    said = dict(re.findall(r"k-NN accuracy after epoch (\d): (\d+\.\d) %", printed))
    assert list(said) == ["0", "2", "4"]
    knn = [entry["knn"] for entry in entries]
    assert [knn[0], knn[2]] == [None, None]
    assert [knn[1], knn[3]] == approx([float(said["2"]), float(said["4"])], abs=0.05)
    bad = r"UserWarning: another image takes its place: cannot read \S+/train/kind1/4\.jpg: "
    assert len(re.findall(bad, printed)) == 1


def test_checkpoint_opens_safely_and_its_teacher_loads_strictly(script, finished):
    state = weights_of(finished[0])
    parts = "student teacher optimizer scaler step epoch args log figures images_hash"
    assert state.keys() == {*parts.split()} and state["log"] == log_of(finished[0])
    assert [state["step"], state["epoch"], state["figures"]] == [12, 4, []]
    lr = script.schedules(argparse.Namespace(**state["args"]), 3)["lr"][-1]
    rates = [group["lr"] / lr for group in state["optimizer"]["param_groups"]]
    lowest = 1 if script is simdino else 0.2 * 0.9**5
    assert [max(rates), min(rates)] == approx([1, lowest])
    names = "checkpoint.pth checkpoint0000.pth checkpoint0002.pth log.txt"
    assert files_of(finished[0]).keys() == {*names.split()}
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(32, 8, num_classes=0, embed_dim=96, depth=4, num_heads=3)
    if script is simdinov2:
        model = script.VisionTransformer(32, 8, **script.ARCHS["vit_nano"])
    teacher = nn.ModuleDict({"backbone": model, "head": script.ProjectionHead(96, 32)})
    teacher.load_state_dict(state["teacher"], strict=True)


def test_a_run_goes_on_in_another_precision_and_back(script, pictures, tmp_path):
    for steps, amp in enumerate(("off", "fp16", "off", "bf16", "fp16"), start=2):
        run(script, *tiny(pictures, tmp_path, f"--amp {amp} --max_steps {steps}"))
        state = weights_of(tmp_path)
        assert state["step"] == steps and bool(state["scaler"]) is (amp == "fp16")


@parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu(script, pictures, tmp_path, amp):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    command = [sys.executable, script.__file__, *tiny(pictures, tmp_path, "--compile --amp", amp)]
    subprocess.run(command, check=True)
    assert log_of(tmp_path)[-1]["knn"] is not None


def count_graphs(script):
    """A change: print how many graphs were compiled, and whether one was broken in two."""
    compile_any = torch.compile
    counters = torch._dynamo.utils.counters
    end = script.end_process
    torch.compile = lambda function, **options: compile_any(function, backend="eager", **options)

    def print_counts():
        print("graphs", counters["stats"]["unique_graphs"], "broken", len(counters["graph_break"]))
        end()

    script.end_process = print_counts


@parametrize("script, world", [(simdino, 1), (simdino, 2), (simdinov2, 1)])
def test_blocks_are_compiled_as_one_graph_a_shape(script, pictures, tmp_path, world):
    flags = tiny(pictures, tmp_path, "--group_size 4 --drop_path_rate 0.3 --max_steps 4 --compile")
    printed = run(script, *flags, world=world, changes=[count_graphs])
    # In a step, the student's global views, its local ones, and the teacher's; in k-NN, 2
    assert printed.count("graphs 5 broken 0\n") == world, printed
    assert not any("_orig_mod" in name for name in weights_of(tmp_path)["teacher"])


# -------------------------------------------------------------- killed and resumed: nothing is lost


def test_a_run_killed_and_resumed_ends_with_the_same_bits(script, finished, pictures, tmp_path):
    flags = tiny(pictures, tmp_path)
    # When the second epoch's log is written, and its checkpoint is not yet renamed
    late = [fast_clock, at("Path.replace", 4, KILL)]
    printed = run(script, *flags, "--num_workers 2", changes=late, status=KILLED)
    assert weights_of(tmp_path)["step"] == 3 and len(log_of(tmp_path)) == 2
    assert "epoch 1/4 step 3/12" in printed  # nothing waits in a buffer
    # In the k-NN after the second epoch, and in the third
    for name, accuracy in ("knn_accuracy", None), ("effective_rank", log_of(finished[0])[1]["knn"]):
        run(script, *flags, changes=[fast_clock, at(name, 1, KILL)], status=KILLED)
        state = weights_of(tmp_path)
        assert [state["step"], state["log"][1]["knn"]] == [6, accuracy]  # made up for
    # In the middle of the last
    run(script, *flags, "--max_steps 10")
    state = weights_of(tmp_path)
    assert [state["step"], state["epoch"], len(state["figures"])] == [10, 3, 1]
    run(script, *flags, "--num_workers 1")
    check_same_run(tmp_path, finished[0])
    before = files_of(tmp_path)
    assert run(script, *flags).count("nothing is left to train: all 12 steps are done\n")
    assert files_of(tmp_path) == before


@parametrize("name, world", [("SIGINT", 1), ("SIGTERM", 1), ("SIGUSR1", 2)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(pictures, tmp_path, name, world):
    number = getattr(signal, name)
    more = "--batch_size 2 --batch_size_per_gpu 1 --group_size 1 --max_steps 17 --num_workers 1"
    flags = tiny(pictures, tmp_path / "out", more, "--eval_freq 0")
    signalled = at("SimDINO.step", 5, partial(signal.raise_signal, number), process=world - 1)
    printed = run(simdino, *flags, world=world, changes=[signalled], status=128 + number)
    step = weights_of(tmp_path / "out")["step"]
    assert 5 <= step < 15
    assert printed.count(f"{name}: saved {tmp_path}/out/checkpoint.pth at step {step}\n") == 1
    run(simdino, *flags, world=world)
    run(simdino, *flags, "--output_dir", tmp_path / "whole", world=world)
    check_same_run(tmp_path / "out", tmp_path / "whole")


@contextmanager
def start(*command):
    """A program as a user starts it: its Popen, and no process of it is left afterwards."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, env=env, cwd=FOLDER, start_new_session=True, **output)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_of(process):
    """What it printed, when it and all that could print have ended by themselves."""
    return process.communicate(timeout=300)[0]


def wait_for(path, process):
    """Until the process, which must go on, has written the file."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


LONG = "--epochs 100_000 --eval_freq 0 --num_workers 2"


def test_torchrun_starts_two_processes_and_hands_them_a_signal(pictures, tmp_path):
    torchrun = "-m torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port"
    flags = tiny(pictures, tmp_path, LONG)
    with start(*torchrun.split(), free_port(), simdino.__file__, *flags) as process:
        wait_for(tmp_path / "checkpoint0002.pth", process)
        process.send_signal(signal.SIGTERM)
        printed = end_of(process)
    assert process.returncode and "a step: 8 images = 1 rounds x 2 processes x 4" in printed
    step = weights_of(tmp_path)["step"]
    assert f"SIGTERM: saved {tmp_path}/checkpoint.pth at step {step}\n" in printed


def test_a_run_whose_workers_fail_ends_and_leaves_none(pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    with start(simdino.__file__, *tiny(data, tmp_path / "out", LONG)) as process:
        wait_for(tmp_path / "out" / "checkpoint0002.pth", process)
        shutil.rmtree(data / "train")
        printed = end_of(process)
    assert process.returncode == 1 and f"RuntimeError: cannot read {data}/train/" in printed


def test_a_pipe_that_closes_does_not_end_the_run(pictures, tmp_path):
    with start(simdino.__file__, *tiny(pictures, tmp_path)) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) in (0, 120)  # 120: Python could not write a warning
    assert weights_of(tmp_path)["step"] == 12


def clock_of_steps(seconds, script):
    """A change: a step takes so many seconds. It prints at which steps the run is saved."""
    steps = []
    step = script.SimDINO.step
    save = script.save
    script.time = SimpleNamespace(monotonic=lambda: seconds * len(steps))
    script.SimDINO.step = lambda *x, **options: steps.append(1) or step(*x, **options)
    script.save = lambda path, run, model: print("saved", run["step"]) or save(path, run, model)


@parametrize(
    "seconds, flags, expected",
    [
        (100, "--batch_size 1 --epochs 2", [0, 10, 20, 30, 40, 50, 60]),  # a chunk is 1,000 s
        (3, "--batch_size 10 --group_size 10 --epochs 20", [0, 21, 42, 60]),  # an epoch is 9 s
    ],
)
def test_saved_every_15_minutes_and_after_an_epoch_if_a_minute_has_passed(
    pictures, tmp_path, seconds, flags, expected
):
    flags = tiny(pictures, tmp_path, "--eval_freq 0 --saveckp_freq 0", flags)
    printed = run(simdino, *flags, changes=[partial(clock_of_steps, seconds)])
    assert [int(step) for step in re.findall(r"saved (\d+)", printed)] == expected
    batch_size = weights_of(tmp_path)["args"]["batch_size"]
    assert log_of(tmp_path)[-1]["img_s"] == approx(batch_size / seconds)


# ---------------------------------------------------------------------- a run is what its flags say


@pytest.fixture(scope="module")
def begun(script, pictures, tmp_path_factory):
    """The folder of a run of 4 steps that may go on."""
    output = tmp_path_factory.mktemp("begun")
    run(script, *tiny(pictures, output, "--group_size 4 --max_steps 4"))
    return output


@pytest.fixture
def copied(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "out"))


METHOD = (  # another value of each option that is the method
    "seed 1, arch vit_tiny, patch_size 16, hidden_dim 16, drop_path_rate 0.3, batch_size 16, "
    "batch_size_per_gpu 4, global_crops_size 48, local_crops_size 32, local_crops_number 3, "
    "global_crops_scale 0.3 0.9, local_crops_scale 0.2 0.3, "
    "coeff 2.0, eps_sq 4.0, group_size 2, gamma 0.5, expa_type 0, lr 0.1, min_lr 0.001, "
    "warmup_epochs 2.0, weight_decay 0.1, weight_decay_end 0.3, clip_grad 1.0, momentum_teacher 0.7"
)
METHOD_OF_V2 = (
    ", num_register_tokens 2, layerscale 0.3, mask_sample_probability 0.4, "
    "mask_ratio_min_max 0.2 0.3, ibot_loss_weight 2.0, layerwise_decay 0.5, patch_embed_lr_mult 0.3"
)
MAY_CHANGE = (
    "data_path output_dir pretrained_weights small_images resume_anyway epochs max_steps amp "
    "compile grad_checkpointing num_workers saveckp_freq eval_freq"
)


def method_of(script):
    """By name, another value of each option that is the method."""
    text = METHOD + (METHOD_OF_V2 if script is simdinov2 else "")
    return dict(option.split(" ", 1) for option in text.split(", "))


def test_the_options_reach_the_images_and_the_model(script, pictures, tmp_path):
    flags = [f"--{name} {value}" for name, value in method_of(script).items()]
    args = script.parse_args(tiny(pictures, tmp_path, *flags))
    images, _ = script.open_images(args)
    crops = [[*crop.size, *crop.scale] for crop in images.transform.crops]
    assert crops == [[48, 48, 0.3, 0.9]] * 2 + [[32, 32, 0.2, 0.3]] * 3
    model = script.build(args, CPU)
    loss_fn = model.loss_fn
    assert [loss_fn.eps_sq, loss_fn.coeff, loss_fn.gamma, loss_fn.expa_type] == [4.0, 2.0, 0.5, 0]
    backbone = model.student.backbone
    assert [images.seed, model.clip_grad, backbone.drop_path_rate] == [1, 1.0, 0.3]
    if script is simdinov2:
        assert [backbone.register_tokens.shape[1], model.patch_weight] == [2, 2.0]
        assert backbone.blocks[0].ls1.gamma[0].item() == approx(0.3)
    args.seed = 2
    assert not torch.equal(script.build(args, CPU).params[0], model.params[0])


def test_another_method_does_not_resume_and_is_named(script, copied, pictures, tmp_path):
    before = files_of(copied)
    changed = method_of(script)
    assert {*MAY_CHANGE.split()} == script.MAY_CHANGE_ON_RESUME
    assert {*changed, *MAY_CHANGE.split()} == vars(script.parse_args([])).keys()
    flags = [f"--{name} {value}" for name, value in changed.items()]
    message = run(script, *tiny(pictures, copied, *flags), status=1)
    message = re.sub(r"[\[\],]", "", message.split("of another run (")[-1])
    named = re.findall(r"(\w+) [^;]+? not ([^;)]+)", message)
    assert dict(named) == changed, message
    # Other images of the same names
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    for path in other.glob("train/*/*"):
        path.write_bytes(path.read_bytes() + b"more")
    message = run(script, *tiny(other, copied, "--group_size 4"), status=1)
    assert re.search(r"\(images_hash \w+, not \w+\)", message)
    assert files_of(copied) == before


def test_with_resume_anyway_a_run_goes_on_under_new_values(script, copied, pictures):
    old = log_of(copied)
    flags = tiny(pictures, copied, "--group_size 2 --lr 0.1 --weight_decay_end 0.04")
    run(script, *flags, "--resume_anyway")
    log = log_of(copied)
    assert log[:1] == old and [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    schedule = script.schedules(script.parse_args(flags), 3)
    assert log[3]["train_lr"] == approx(np.mean(schedule["lr"][9:]))


def test_with_resume_anyway_a_run_goes_on_without_deleted_images(script, pictures, tmp_path):
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    output = tmp_path / "out"
    flags = tiny(data, output, "--eval_freq 0 --batch_size 10")
    run(script, *flags, "--max_steps 5")
    for kind in "kind0", "kind2":
        (data / "train" / kind / "0.png").unlink()
    assert "images_hash" in run(script, *flags, status=1)
    run(script, *flags, "--resume_anyway")
    state = weights_of(output)
    # 28 images are 2 steps an epoch: of the second epoch's two steps that were done, one counts
    assert [state["step"], state["epoch"], len(log_of(output))] == [8, 4, 4]


def test_a_second_run_in_the_folder_of_one_that_has_just_begun_is_refused(pictures, tmp_path):
    flags = tiny(pictures, tmp_path, "--eval_freq 0")
    run(simdino, *flags, changes=[at("SimDINO.step", 1, KILL)], status=KILLED)
    assert weights_of(tmp_path)["step"] == 0
    assert "is of another run (seed 0, not 1)" in run(simdino, *flags, "--seed 1", status=1)
    # Nothing is learned yet, so that other weights to start from are taken, but none with NaN
    state = weights_of(tmp_path)["teacher"]
    torch.save({name: x / 0 for name, x in state.items()}, tmp_path / "w.pth")
    weights = ["--pretrained_weights", tmp_path / "w.pth"]
    assert "weights that are not finite" in run(simdino, *flags, *weights, status=1)
    torch.save(state, tmp_path / "w.pth")
    printed = run(simdino, *flags, *weights, changes=[at("SimDINO.step", 1, KILL)], status=KILLED)
    assert "starts from" in printed
    run(simdino, *flags)
    assert weights_of(tmp_path)["step"] == 12


class Code:
    """Opened without weights_only, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_checkpoints_that_cannot_be_read_are_left_as_they_are(script, finished, pictures, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"student": Code(tmp_path / "mark")}, path)
    hostile = path.read_bytes()
    good = (finished[0] / "checkpoint.pth").read_bytes()
    reasons = {good[: len(good) // 2]: "failed finding central directory", hostile: "posix.system"}
    for content, reason in reasons.items():
        path.write_bytes(content)
        assert reason in run(script, *tiny(pictures, tmp_path), status=1)
        assert path.read_bytes() == content
    with pytest.raises(pickle.UnpicklingError, match="posix.system"):
        script.load_pretrained(path, None)
    assert not (tmp_path / "mark").exists()


# ----------------------------------------------------------------------------- when things go wrong


def infinite_moment(script):
    """The loss does not show it."""
    step = script.SimDINO.step

    def step_to_infinity(self, *arguments, **options):
        results = step(self, *arguments, **options)
        self.optimizer.state[self.params[-1]]["exp_avg_sq"].view(-1)[0] = math.inf
        return results

    script.SimDINO.step = step_to_infinity


def small_scale(script):
    """Instead of 16 steps down from 65,536."""
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=1.0)


@parametrize(
    "more, changes",
    [
        ("--lr 1e30 --resume_anyway", []),
        ("--amp fp16 --coeff 1e9 --resume_anyway", [small_scale]),
        ("", [infinite_moment]),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(script, copied, pictures, more, changes):
    before = files_of(copied)
    printed = run(
        script, *tiny(pictures, copied, "--group_size 4", more), changes=changes, status=1
    )
    assert "not finite: try --amp off, or --resume_anyway and a lower --lr\n" in printed
    assert files_of(copied) == before


def test_folders_that_cannot_be_used_are_named(pictures, tmp_path):
    data = tmp_path / "data"
    flags = tiny(data, tmp_path / "out")
    assert f"there is no folder {data}\n" in run(simdino, *flags, status=1)
    data.mkdir()
    message = f"{data} has 0 images, fewer than a step: --batch_size 8\n"
    assert message in run(simdino, *flags, status=1)
    tree(data, "a/")
    for path in data.rglob("*.png"):
        path.write_bytes(b"rubbish")
    message = f"1000 times, a random image in {data} could not be read\n"
    assert message in run(simdino, *flags, status=1)
    closed = at("os.scandir", 2, partial(fail, PermissionError(13, "closed")))
    assert "closed" in run(simdino, *tiny(pictures, tmp_path / "out"), changes=[closed], status=1)


def small_disk(script):
    """A change: the limit on a file's size makes a write fail half-way, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(script, copied, pictures):
    before = files_of(copied)
    flags = tiny(pictures, copied, "--group_size 4 --max_steps 5")
    assert "File too large" in run(script, *flags, changes=[small_disk], status=1)
    assert files_of(copied) == before


def other_images(script):
    """A change: the second process finds the images in another order."""
    find_images = script.find_images

    def find(root):
        names, classes = find_images(root)
        return names[::-1], classes[::-1]

    if script.PROCESS == 1:
        script.find_images = find


@parametrize(
    "fault, reason, saved",
    [
        (at("SimDINO.step", 4, partial(fail, ValueError("no step")), process=1), "no step", 3),
        (at("knn_accuracy", 3, partial(fail, ValueError("no k-NN")), process=1), "no k-NN", 6),
        (at("knn_accuracy", 3, KILL, process=1), "Connection|recv|closed", 6),
        (other_images, "the processes find different images or checkpoints", 0),
    ],
    ids=words("step k-NN kill images"),
)
def test_what_ends_one_process_ends_all_and_damages_nothing(
    pictures, tmp_path, fault, reason, saved
):
    """No launcher is there to kill the other: it ends by itself."""
    flags = tiny(pictures, tmp_path, "--eval_freq 1")
    printed = run(simdino, *flags, world=2, changes=[fast_clock, fault], status=None)
    assert re.search(reason, printed), printed
    assert not saved or weights_of(tmp_path)["step"] == saved


# ---------------------------------------------------------------------- the images and their labels


def photo(width=48, height=32):
    """A smooth colour image."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(0.1 * x + k) * np.cos(0.15 * y) for k in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@parametrize("file", words("RGB.jpg RGB.webp L.png P.png RGBA.png CMYK.jpg 1.tif LA.png"))
def test_load_image_gives_what_pillow_shows(tmp_path, file):
    photo(500, 375).convert(file.split(".")[0]).save(tmp_path / file)
    expected = TF.pil_to_tensor(Image.open(tmp_path / file).convert("RGB"))
    image = simdino.load_image(tmp_path / file)
    assert image.dtype == torch.uint8 and image.shape == (3, 375, 500)
    assert (image.int() - expected.int()).abs().max() <= 2


@parametrize("orientation", range(1, 9))
def test_load_image_applies_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = photo().convert("L")
    image.info["exif"] = exif.tobytes()
    expected = TF.pil_to_tensor(ImageOps.exif_transpose(image)).int()
    for name in "turned.jpg", "turned.tif":
        image.save(tmp_path / name, exif=exif)
        difference = simdino.load_image(tmp_path / name).int() - expected
        assert difference.abs().float().mean() < 6


def test_an_image_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    path = tmp_path / "x.png"
    photo(150, 150).save(path)
    whole = path.read_bytes()
    Image.fromarray(np.arange(48).reshape(6, 8).astype("u2")).save(path)
    deep = path.read_bytes()
    contents = {
        "cannot identify": b"",
        "truncated": whole[:3000],
        "mode I.* has more than 8 bits": deep,
    }
    for reason, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"^cannot read {path}: .*{reason}"):
            simdino.load_image(path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="a pipe, which might never end"):
        simdino.load_image(tmp_path / "pipe.png")


@parametrize("fault", [OSError(errno.EMFILE, "too many open files"), MemoryError()])
def test_a_fault_of_the_machine_is_not_taken_for_a_bad_image(tmp_path, monkeypatch, fault):
    tree(tmp_path, "0.png", "1.png")
    images = simdino.Images(tmp_path, ["0.png", "1.png"], [0, 0], lambda image: image)
    monkeypatch.setattr(Image, "open", lambda file: fail(fault))
    with pytest.raises(RuntimeError, match="cannot read .*/0.png"):
        images[0, 0]


def tree(root, *paths):
    """Small images at these paths below root, 8 in a path that ends with a slash."""
    for path in paths:
        names = [path]
        if path.endswith("/"):
            names = [f"{path}{i}.png" for i in range(8)]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(root / name, format="png")


def open_images(root, *flags):
    args = simdino.parse_args(tiny(root, root / "out", "--batch_size 2 --group_size 1", *flags))
    return simdino.open_images(args)


def test_a_label_is_the_first_folder_and_hidden_names_are_skipped(tmp_path):
    tree(tmp_path, "train/a/x/1.JPEG", "train/a/x/0.tiff", "train/b/x/1.webp", "train/0.png")
    tree(tmp_path, "val/b/1.png", "val/a/y/1.png", "val/0.png", "val/new/1.png", "test/a/1.png")
    tree(tmp_path, "train/notes.txt", "train/.git/1.png", "train/a/._1.png", "elsewhere/1.png")
    (tmp_path / "train" / "b" / "linked").symlink_to("../../elsewhere")
    images, knn_images = open_images(tmp_path)
    labels = [("0.png", -1), ("a/x/0.tiff", 0), ("a/x/1.JPEG", 0)]
    labels += [("b/linked/1.png", 1), ("b/x/1.webp", 1)]
    val_labels = [("0.png", -1), ("a/y/1.png", 0), ("b/1.png", 1), ("new/1.png", -1)]
    splits = (images, labels), (knn_images["train"], labels), (knn_images["val"], val_labels)
    for split, expected in splits:
        assert [*zip(split.names.tolist(), split.labels.tolist())] == expected


@parametrize(
    "paths, reason",
    [
        ("1.png 2.png", "has fewer than two class folders"),
        ("a/ b/", "does not have both train and val"),
        ("train/a/ train/b/", "does not have both train and val"),
        ("train/ val/", "has fewer than two class folders"),
        ("train/a/ val/a/1.png", "has fewer than two class folders"),
        ("train/a/ train/b/ val/1.png", "/val has a class of"),
        ("train/a/ train/b/ val/c/1.png", "/val has a class of"),
        ("train/a/ train/b/ val>train", "does not have both train and val"),
        ("train/a/ train/b/ val/a/1.png --eval_freq=0", "--eval_freq is 0"),
    ],
)
def test_where_there_is_no_accuracy_one_line_says_why(capsys, tmp_path, paths, reason):
    paths, *flags = paths.split(" --")
    if paths.endswith("val>train"):
        (tmp_path / "val").symlink_to("train")
    tree(tmp_path, *paths.removesuffix("val>train").split())
    images, knn_images = open_images(tmp_path, *(f"--{flag}" for flag in flags))
    assert knn_images == {} and len(images) >= 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "no k-NN accuracy" in line]
    assert len(lines) == 1 and reason in lines[0]


def test_folders_that_are_not_used_and_links_without_end_are_named(capsys, tmp_path):
    tree(tmp_path, "train/a/", "car/")
    open_images(tmp_path)
    assert f"{tmp_path}: train/ is what is trained on, not car\n" in capsys.readouterr().out
    (tmp_path / "train" / "a" / "up").symlink_to("..")
    with pytest.raises(OSError, match="a/up is a link to a folder that it is in"):
        open_images(tmp_path)


def test_the_built_in_data_have_no_image_in_both_splits(tmp_path):
    flags = "--max_steps 1 --eval_freq 0 --num_workers 0 --output_dir"
    printed = run(simdino, flags, tmp_path)
    assert "a step: 64 images = 1 rounds x 1 processes x 64; 400 steps = 8 epochs x 50\n" in printed
    images = {path.read_bytes() for path in (tmp_path / "patterns").rglob("*.png")}
    assert len(images) == 3200 + 800


# ------------------------------------------------------------------------------------ k-NN and rank


def test_center_crop_is_resize_256_crop_224_also_of_strips():
    image = TF.pil_to_tensor(photo(500, 375))
    bicubic = TF.InterpolationMode.BICUBIC
    expected = TF.center_crop(TF.resize(image, 256, bicubic, antialias=True), [224, 224])
    difference = simdino.center_crop(image, 224).int() - expected.int()
    assert difference.abs().float().mean() < 1
    strip = torch.full((3, 1, 20000), 77, dtype=torch.uint8)
    for view in [simdino.center_crop(strip, 32), *simdino.MultiCrop(32, 16)(strip)]:
        assert (view == 77).all()


@parametrize("k", [1, 20, 150])
def test_knn_is_that_of_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train = features_of(5, 30)
    val = features_of(5, 60, seed=1)
    bank = F.normalize(train.features[:, 0], dim=1)
    z = F.normalize(val.features[:, 0], dim=1)
    votes = lambda distance: np.exp((1 - distance**2 / 2) / 0.07)  # |a - b|² = 2 - 2 cos
    judge = neighbors.KNeighborsClassifier(k, weights=votes, algorithm="brute")
    judge.fit(bank, train.labels)
    accuracy = simdino.knn_accuracy((bank, train.labels), (z, val.labels), k)
    assert accuracy == approx(100 * judge.score(z, val.labels))
    predictions, nearest = eval_linear.knn(2 * bank, train.labels, 3 * z, (k, 1000))
    assert predictions[k].tolist() == judge.predict(z).tolist() and 150 in predictions
    assert_close(nearest, (z @ bank.T).amax(1))


def test_knn_takes_the_features_of_the_teacher_that_the_judge_takes(script, finished, pictures):
    model = build(script)
    model.teacher.load_state_dict(weights_of(finished[0])["teacher"])
    images = script.open_images(script.parse_args(tiny(pictures, "out")))[1]["val"]
    features, _ = script.embed(model, images, {"num_workers": 0})
    judge, _ = eval_linear.load_backbone(finished[0] / "checkpoint.pth")
    items = [images[0, i] for i in range(61)]
    pixels = torch.stack([image for image, label in items if label >= 0])
    expected = eval_linear.encode(judge, pixels)[:, 0]
    assert_close(features, F.normalize(expected, dim=-1))


def test_effective_rank_counts_the_directions_in_use():
    p = F.normalize(waves(12, a=0.37).abs() + 0.1, p=1, dim=0)
    assert effective_rank(p.sqrt().diag()) == approx((-(p * p.log()).sum()).exp().item())
    assert effective_rank(torch.ones(5, 8)) == approx(1, abs=1e-6)
    assert math.isnan(effective_rank(torch.zeros(5, 8)))


# ------------------------------------------------------------------- training from existing weights


def weights(version, width=128):
    """A backbone's weights by our names, the same on any machine: patch 8, grid of 4 x 4."""
    registers = 4 if version == 2 else None
    model = eval_linear.VisionTransformer(4, 8, width, 4, 2, registers, version == 2)
    return dict(fill(model).float().state_dict())


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def checkpoint(kind):
    """What a file of this kind holds."""
    v1 = weights(1)
    v2 = weights(2) | {"mask_token": torch.ones(1, 128)}
    head = prefixed("head.", simdino.ProjectionHead(128, 16).state_dict())
    zeros = {name: 0 * x for name, x in v1.items()}
    ours = prefixed("backbone.", v1) | head
    chunks = {}  # as FSDP's chunks of 2 blocks name them: blocks.1.3.norm1.weight
    for name, tensor in v2.items():
        name = re.sub(r"blocks\.([01])", r"blocks.0.\1", name)
        chunks[re.sub(r"blocks\.([23])", r"blocks.1.\1", name)] = tensor
    return {
        "ours, v1": {"student": prefixed("backbone.", zeros), "teacher": ours, "step": 3},
        "ours, v2": {"teacher": prefixed("backbone.", v2) | head},
        "DINO": {"teacher": prefixed("module.", ours | {"head.last_layer": v1["norm.bias"]})},
        "official v1": {
            "teacher": prefixed("module.", ours),
            "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]},
            "args": argparse.Namespace(arch="vit_base", lr=0.1),
        },
        "official v1, flat": v1,
        "official v2, chunked": {
            "teacher": prefixed("backbone.", chunks) | prefixed("dino_", head),
        },
        "official v2, flat": v2,
    }[kind]


KINDS = ["ours, v1", "DINO", "official v1, flat", "ours, v2", "official v2, flat"]


@parametrize("kind", [*KINDS, "official v2, chunked"])
def test_training_starts_from_weights(tmp_path, monkeypatch, capsys, kind):
    script = simdinov2 if "v2" in kind else simdino
    shape = {"embed_dim": 128, "depth": 4, "num_heads": 2}  # as weights() are
    monkeypatch.setitem(script.ARCHS, "vit_nano", shape)
    path = tmp_path / "w.pth"
    torch.save(checkpoint(kind), path)
    model = build(script, "--hidden_dim 16 --global_crops_size 48")
    script.load_pretrained(path, model)
    taken = "backbone" if "flat" in kind else "backbone and head"
    assert f"starts from {path}: {taken}\n" in capsys.readouterr().out
    student = dict(model.student.state_dict())
    check_same(student, dict(model.teacher.state_dict()))
    stored = weights(2 if "v2" in kind else 1)
    # Positions of another grid are interpolated
    cls, grid = stored["pos_embed"].split([1, 16], dim=1)
    grid = grid.unflatten(1, (4, 4)).movedim(3, 1)
    grid = TF.resize(grid, [6, 6], TF.InterpolationMode.BICUBIC, antialias=True).flatten(2).mT
    stored["pos_embed"] = torch.cat([cls, grid], dim=1)
    for name, tensor in stored.items():
        assert_close(student[f"backbone.{name}"], tensor)


def test_a_run_reads_the_weights_to_start_from_only_once(script, finished, pictures, tmp_path):
    first = finished[0] / "checkpoint.pth"
    flags = tiny(pictures, tmp_path, "--lr 1e-12 --pretrained_weights", first)
    assert f"starts from {first}: backbone and head\n" in run(script, *flags, "--max_steps 1")
    assert_close(weights_of(tmp_path)["student"], dict(weights_of(finished[0])["teacher"]))
    printed = run(script, *flags, "--max_steps 2")
    assert "saved at step 1\n" in printed and "starts from" not in printed


# -------------------------------------------------------------------------- evaluation: the weights


@parametrize(
    "kind, version, left_out",
    [
        ("ours, v1", 1, []),
        ("official v1", 1, []),
        ("official v1, flat", 1, []),
        ("ours, v2", 2, ["mask_token"]),
        ("official v2, chunked", 2, ["mask_token"]),
        ("official v2, flat", 2, ["mask_token"]),
    ],
)
def test_weights_of_every_format_give_the_official_features(tmp_path, kind, version, left_out):
    torch.save(checkpoint(kind), tmp_path / "weights.pth")
    model, dropped = eval_linear.load_backbone(tmp_path / "weights.pth", num_heads=2)
    assert dropped == left_out
    # official: get_intermediate_layers of both ViTs with weights() in them, in float64: CLS of the
    #     last 4 blocks and the mean patch of the last
    expected = {
        (1, 32): -3.0275591342386177,
        (1, 48): 1.681385036146514,  # positions interpolated as in DINO
        (2, 32): 16.930229918759338,
        (2, 48): 26.813735525931996,  # positions interpolated with antialiasing
    }
    for size in 32, 48:
        n = torch.arange(2 * 3 * size * size).view(2, 3, size, size)
        features = eval_linear.encode(model, (n * n * 7 % 251).byte())
        features = features[:, [2, 3, 4, 0, 1]]
        assert features.shape == (2, 5, 128)
        assert fingerprint(features.double()) == approx(expected[version, size], abs=1e-3)


def test_attention_weights_are_those_the_last_block_used(tmp_path):
    torch.save(weights(2), tmp_path / "w.pth")
    model = eval_linear.load_backbone(tmp_path / "w.pth", num_heads=2)[0]
    attn = model.blocks[-1].attn
    seen = []
    attn.register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    x = torch.randn(2, 3, 32, 32)
    attention = model.get_last_selfattention(x)
    model.get_intermediate_layers(x)
    tokens, out = seen
    v = attn.qkv(tokens).unflatten(-1, (3, 2, -1))[:, :, 2].transpose(1, 2)
    assert_close(attn.proj((attention @ v).transpose(1, 2).flatten(2)), out)


@parametrize(
    "content, error, named",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", SystemExit, "no file of weights"),
        ({"teacher": Code("mark")}, SystemExit, "code, posix.system"),
        ({"ema": weights(1), "net": weights(1)}, SystemExit, "under ['ema.', 'net.']"),
        ({**weights(1, 192), "fc_norm.weight": 1 + torch.ones(1)}, RuntimeError, "fc_norm.weight"),
        (weights(1, 160), SystemExit, "--num_heads, a divisor of the width, 160"),
    ],
)
def test_other_files_are_refused_with_what_they_have(tmp_path, monkeypatch, content, error, named):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("w.pth").write_bytes(content)
    else:
        torch.save(content, "w.pth")
    with pytest.raises(error) as end:
        eval_linear.load_backbone("w.pth")
    assert named in str(end.value) and not Path("mark").exists()


def test_a_flipped_bit_and_weights_that_are_not_floats_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(weights(1, 96), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="is damaged"):
        eval_linear.load_backbone(path)
    torch.save({name: x.to(torch.int8) for name, x in weights(1, 96).items()}, path)
    with pytest.raises(SystemExit, match="torch.int8: quantised"):
        eval_linear.load_backbone(path)


def test_one_of_several_weights_and_the_number_of_heads_may_be_chosen(tmp_path):
    torch.save({"ema": weights(1, 96), "net": {"backbone": weights(1, 384)}}, tmp_path / "w.pth")
    for key, heads, expected in ("ema", 8, [96, 8]), ("net.backbone", None, [384, 6]):
        model, _ = eval_linear.load_backbone(tmp_path / "w.pth", key, heads)
        assert [model.width, model.blocks[0].attn.num_heads] == expected


def test_safetensors_are_read_by_their_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = weights(2, 96)
    package.save_file(prefixed("teacher.", tensors), tmp_path / "w.safetensors")
    model, _ = eval_linear.load_backbone(tmp_path / "w.safetensors")
    check_same(dict(model.state_dict()), tensors)


# ------------------------------------------------------------ evaluation: k-NN and the linear probe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/ and val/ of 7 kinds, of rising brightness; a folder of val shows the kind two below.
    Two files are damaged, two have no label, a folder is of a class that train/ has not, and val
    has a copy of a training image."""
    root = tmp_path_factory.mktemp("data")
    for split, images, shift in ("train", 15, 0), ("val", 4, 2):
        for kind in range(7):
            folder = root / split / f"kind{(kind + shift) % 7}"
            folder.mkdir(parents=True)
            for i in range(images):
                rng = np.random.default_rng((kind, i, images))
                pixels = 30 * kind + 40 + rng.normal(0, 25, (32, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.png")
        shutil.copy(folder / "00.png", root / split / "none.png")
    val = root / "val"
    shutil.copytree(val / "kind0", val / "other")
    shutil.copy(root / "train" / "kind2" / "09.png", val / "kind2" / "02.png")
    (root / "train" / "kind1" / "04.png").write_bytes(b"not an image")
    (val / "kind2" / "03.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"teacher": weights(2, 96)}, path)
    more = "--num_workers 0 --batch_size 16 --epochs 8 --seed 3"
    return words("--weights", path, "--data_path", data, more)


evaluate = partial(run, eval_linear)


def results_of(folder):
    """The last line of results, and the classifier. The state of the probe is gone."""
    assert not [*folder.glob("probe-*.pth")]
    results = json_lines(folder / "results.jsonl")[-1]
    classifier = torch.load(folder / f"classifier-{results['id']}.pth", weights_only=True)
    return results, classifier


def test_accuracies_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    labels = torch.tensor([0, 0, 0, 1, 4, 4, 5]).repeat(20)  # no 2, no 3
    predicted = torch.where(torch.rand(140) < 0.5, labels, labels.roll(1))
    figures = eval_linear.accuracies(predicted, labels)
    assert figures["top1"] == approx(100 * metrics.accuracy_score(labels, predicted))
    balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert figures["class_mean"] == approx(100 * balanced)


@pytest.fixture(scope="module", params=["", "--cached"], ids=["crops", "cached"])
def evaluated(request, base, tmp_path_factory):
    """Flags of a run never interrupted, its folder and what it printed."""
    flags = words(*base, request.param)
    output = tmp_path_factory.mktemp("evaluated")
    return flags, output, evaluate(*flags, "--output_dir", output)


def test_the_probe_learns_and_is_chosen_on_held_out_images_not_on_val(evaluated, base, data):
    _, output, printed = evaluated
    results, classifier = results_of(output)
    probe = results["probe"]
    best = probe["held_out"][probe["best"]]
    assert len(probe["held_out"]) == 52 and best["top1"] > probe["top1"] + 10
    assert results["images"] == {"train": 104, "val": 27} and results["features_of_train"] == 1
    assert results["options"]["crop_size"] == 32
    assert "2 of 106 images" in printed and "6 of 33 images" in printed
    assert "1 of 27 images to judge on have the features of a training image" in printed
    assert f"linear probe on {data}/val: top1 {probe['top1']:.2f} %" in printed

    # predictions.csv has the same figures in it, and the classifier gives them as the README says
    model, _ = eval_linear.load_backbone(base[1])
    right = {"knn": [], "probe": [], "top5": []}
    for line in csv.DictReader((output / f"predictions-{results['id']}.csv").open(newline="")):
        image = eval_linear.load_image(data / "val" / line["name"])
        images = eval_linear.center_crop(image, 32)[None]
        scope = {"encode": eval_linear.encode, "model": model, "images": images}
        scores = eval(classifier["features"], scope) @ classifier["weight"].T + classifier["bias"]
        classes = [classifier["classes"][i] for i in scores[0].topk(5).indices]
        assert classes[0] == line["probe"] and line["class"] == Path(line["name"]).parts[0]
        right["knn"].append(line["class"] == line["knn"])
        right["probe"].append(line["class"] == line["probe"])
        right["top5"].append(line["class"] in classes)
    figures = [results["knn"]["20"]["top1"], probe["top1"], probe["top5"]]
    assert figures == approx([100 * np.mean(found) for found in right.values()])


@parametrize("state", [2, 10])  # of 8 on the images not held out, then 8 on all
def test_a_probe_that_is_killed_goes_on_to_the_same_bits(evaluated, tmp_path, state):
    flags, output, _ = evaluated
    flags = [*flags, "--output_dir", tmp_path]
    evaluate(*flags, changes=[at("write", state + 1, KILL)], status=KILLED)
    assert "resumed" not in evaluate(*flags, "--batch_size 8")  # it is another run
    assert ": 2 epochs are done\n" in evaluate(*flags)
    results, classifier = results_of(tmp_path)
    alone, expected = results_of(output)
    check_same(classifier["weight"], expected["weight"])
    assert results["probe"] == alone["probe"]
    predictions = f"predictions-{results['id']}.csv"
    assert files_of(tmp_path)[predictions] == files_of(output)[predictions]
    runs = json_lines(tmp_path / "results.jsonl")
    assert [found["options"]["batch_size"] for found in runs] == [8, 16]


def test_a_probe_resumes_on_its_own_weights_alone(base):
    args = eval_linear.parse_args(base)
    model, _ = eval_linear.load_backbone(args.weights)
    first = eval_linear.identify_run(args, model, [])
    model.norm.bias += 1
    assert eval_linear.identify_run(args, model, [])["id"] != first["id"]


def test_half_a_line_of_results_stays_apart_from_the_next(tmp_path):
    args = SimpleNamespace(output_dir=tmp_path, weights="w.pth")
    path = tmp_path / "results.jsonl"
    for half in "", '{"date": "20':
        with path.open("a") as file:
            file.write(half)
        eval_linear.write_results(args, {"id": "a"}, {"top1": 1.0})
    first, broken, last = path.read_text().splitlines()
    assert json.loads(first)["top1"] == json.loads(last)["top1"] == 1.0 and broken == half


def test_two_processes_judge_as_one(evaluated, tmp_path):
    flags, output, _ = evaluated
    evaluate(*flags, "--output_dir", tmp_path, world=2)
    results, classifier = results_of(tmp_path)
    alone, expected = results_of(output)
    assert results["knn"] == alone["knn"]
    assert_close(classifier["weight"], expected["weight"], rtol=1e-3, atol=1e-4)


def features_of(n, per_class, seed=0):
    """As extract gives them: n classes whose means are close together."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n * per_class) % n
    means = np.random.default_rng(99).normal(0, 0.5, (n, 1, 16))
    features = means[labels] + rng.normal(0, 1, (n * per_class, 5, 16))
    features = torch.from_numpy(features).float()
    return SimpleNamespace(labels=torch.from_numpy(labels), features=features)


MODEL = SimpleNamespace(blocks=range(4), width=16)


def test_candidates_side_by_side_train_as_each_would_alone(tmp_path):
    # The reference: torch.optim.SGD with a rate for each classifier, and CosineAnnealingLR.
    train = features_of(3, 27)
    args = SimpleNamespace(seed=3, epochs=4, batch_size=16, output_dir=tmp_path)
    steps = [[i for _, i in items] for items in eval_linear.items_of_steps(80, args, 0)]
    first = [*chain(*steps[:5])]
    last = [*chain(*steps[15:])]
    assert sorted(first) == sorted(last) == [*range(80)] and first != last
    batches = partial(eval_linear.cached_batches, train, np.arange(80))
    rates = [rate for _, rate in eval_linear.CANDIDATES]
    probe = eval_linear.Probe(MODEL, 3)
    eval_linear.fit(probe, rates, batches, 80, args, {"id": 0})
    torch.manual_seed(3)
    rows = {"1 block": [0], "1 block + patches": [0, 1], "4 blocks": [0, 2, 3, 4]}
    for head, (kind, rate) in zip(probe.heads, eval_linear.CANDIDATES):
        seen = train.features[:, rows.get(kind, [0, 1, 2, 3, 4])].flatten(1)
        alone = copy.deepcopy(head)
        nn.init.normal_(alone.weight, std=0.01)
        nn.init.zeros_(alone.bias)
        initial = alone.weight.detach().clone()
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate / 16, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        for index in steps:
            optimizer.zero_grad()
            F.cross_entropy(alone(seen[index]), train.labels[index]).backward()
            optimizer.step()
            schedule.step()
        moved = (alone.weight - initial).norm()
        assert moved > 0 and (head.weight - alone.weight).norm() < 1e-3 * moved


def test_a_tenth_or_more_of_few_is_held_out_and_never_the_last_of_a_class():
    for n, expected in (5000, 500), (300_000, 10_000), (400, 100), (120, 60):
        held, part = eval_linear.hold_out(np.arange(n) % 10, 100, 0)
        assert len(held) == expected and sorted([*held, *part]) == [*range(n)]
    labels = np.arange(100) % 10
    labels[:60] = 10 + np.arange(60)  # alone in their classes
    held, part = eval_linear.hold_out(labels, 100, 0)
    assert len(held) == 30 and set(labels[part]) == set(labels)


def test_the_best_candidate_has_the_best_median_with_its_neighbours():
    top1 = np.full((4, 13), 20.0)
    top1[1, 4] = 60  # by chance
    top1[2, 6:9] = 40
    assert eval_linear.choose(top1.flatten().tolist()) == 2 * 13 + 6
    top1[3, 9:] = [30, 45, 46, 1]  # where the largest rate diverges
    assert eval_linear.choose(top1.flatten().tolist()) == 3 * 13 + 11
    top1[0, 0] = 60  # by chance, at an end
    assert eval_linear.choose(top1.flatten().tolist()) == 3 * 13 + 11
    rng = np.random.default_rng(0)
    chosen = [eval_linear.choose(rng.normal(size=52).tolist()) % 13 for _ in range(2000)]
    at_ends = np.isin(chosen, (0, 12)).mean()  # of candidates that are alike
    assert at_ends < 0.2


# ----------------------------------------------------------- evaluation: features, pictures, export


def test_features_of_any_folder_are_written_by_any_number_of_processes(base, data, tmp_path):
    pixels = "--mean 0.5 0.5 0.5 --std 0.25 0.5 0.5 --crop_size 16"
    flags = words(*base, "--data_path", f"{data}/val/", pixels, "--embed")
    assert "1 of 33 images" in evaluate(*flags, tmp_path / "one.npz")
    evaluate(*flags, tmp_path / "two.npz", world=2)
    one = np.load(tmp_path / "one.npz")
    two = np.load(tmp_path / "two.npz")
    assert np.array_equal(one["names"], two["names"])
    assert np.allclose(one["features"], two["features"], atol=1e-5)
    model, _ = eval_linear.load_backbone(base[1])
    model.mean = [0.5, 0.5, 0.5]
    model.std = [0.25, 0.5, 0.5]
    for name, label, features in zip(*(one[key] for key in ("names", "labels", "features"))):
        assert label == Path(name).parent.name
        image = eval_linear.load_image(data / "val" / name)
        z = eval_linear.encode(model, eval_linear.center_crop(image, 16)[None])[0, 0]
        assert np.allclose(features, z, rtol=1e-4, atol=1e-5)
    assert "exists already" in evaluate(*flags, tmp_path / "one.npz", status=1)


def test_pictures_have_one_row_per_image(base, data, tmp_path):
    picture = data / "val" / "kind0" / "01.png"
    evaluate(*base[:2], "--crop_size 64 --pictures", tmp_path / "out.png", picture, picture)
    pixels = TF.pil_to_tensor(Image.open(tmp_path / "out.png"))
    assert pixels.shape == (3, 2 * 172 + 4, 5 * 172 + 4)  # image, 3 heads, patch features
    assert torch.equal(pixels[:, 4:172], pixels[:, 176:344])  # the same image twice


@parametrize("kind", ["v1", "v2", "registers alone"])
def test_timm_loads_an_exported_backbone_strictly_by_the_line_printed(tmp_path, kind):
    pytest.importorskip("timm")
    tensors = weights(1 if kind == "v1" else 2, 96)
    if kind == "registers alone":
        tensors = {name: x for name, x in tensors.items() if ".gamma" not in name}
    torch.save(tensors, tmp_path / "w.pth")
    out = tmp_path / "timm.pth"
    line = evaluate("--weights", tmp_path / "w.pth", "--export", out).splitlines()[-1]
    assert "strict=True" in line
    (tmp_path / "line.py").write_text(line)
    theirs = runpy.run_path(tmp_path / "line.py")["model"].eval()
    x = torch.randn(2, 3, 32, 32)
    for path in tmp_path / "w.pth", out:
        model, _ = eval_linear.load_backbone(path)
        with torch.no_grad():
            expected = model.get_intermediate_layers(x)[0][:, 0]
            assert_close(theirs(x), expected, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------- evaluation: the segmentation

IDS = np.array([0, 50, 200])  # of three classes


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """train/, val/ and masks of 3 classes that a patch's brightness tells; 9 and 255 are void. Of
    train, one image is damaged, and one is turned, which its mask is not."""
    root = tmp_path_factory.mktemp("streets")
    for split, images in ("train", 24), ("val", 7):
        (root / split / "a").mkdir(parents=True)
        (root / f"{split}_masks" / "a").mkdir(parents=True)
        for i in range(images):
            rng = np.random.default_rng((split == "val", i))
            kinds = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = 40 + 80 * kinds[..., None] + rng.normal(0, 9, (32, 48, 3))
            mask = IDS[kinds].astype(np.uint8)
            mask[:6] = 9
            mask[-1] = 255
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / "a" / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(root / f"{split}_masks" / "a" / f"{i}.png")
    image.transpose(Image.Transpose.ROTATE_90).save(root / "train" / "a" / "3.jpg")
    (root / "train" / "a" / "5.jpg").write_bytes(b"no image")
    return root


def segmenting(base, streets, output, *flags):
    more = "--epochs 12 --num_workers 0 --batch_size 4 --segment 32 48 --ignore_index 9 255"
    return words(*base[:2], "--data_path", streets, "--output_dir", output, more, *flags)


@pytest.fixture(scope="module")
def segmented(base, streets, tmp_path_factory):
    output = tmp_path_factory.mktemp("segmented")
    return output, evaluate(*segmenting(base, streets, output))


def test_segmentation_learns_what_patches_show_and_is_counted_as_by_torchmetrics(
    base, streets, segmented
):
    metrics = pytest.importorskip("torchmetrics.classification")
    output, printed = segmented
    results, classifier = results_of(output)
    scores = results["segmentation"]
    held_out = scores["held_out_miou"]
    assert held_out[scores["best"]] == max(held_out.values()) > 60 and len(held_out) == 5
    assert "14 images to train on, 10 to choose by, 7 to judge on; 3 classes" in printed
    turned = f"left out: a/3.jpg in {streets}/train has 48 x 32 pixels, its mask 32 x 48"
    assert turned in printed and f"left out: cannot read {streets}/train/a/5.jpg" in printed
    assert f"on {streets}/val: miou {scores['miou']:.2f} %" in printed
    assert classifier["classes"] == IDS.tolist() and list(scores["iou"]) == ["0", "50", "200"]

    # The classifier, used as the README says
    model, _ = eval_linear.load_backbone(base[1])
    options = {"num_classes": 3, "ignore_index": -1}
    iou = metrics.MulticlassJaccardIndex(average=None, **options)
    pixels = metrics.MulticlassAccuracy(average="micro", **options)
    means = metrics.MulticlassAccuracy(average="macro", **options)
    for i in range(7):
        x = eval_linear.load_image(streets / "val" / "a" / f"{i}.jpg")[None]
        patches = eval_linear.encode_patches(model, x)
        z = F.conv2d(patches, classifier["weight"], classifier["bias"])
        predicted = F.interpolate(z, (32, 48), mode="bilinear").argmax(1)
        mask = np.array(Image.open(streets / "val_masks" / "a" / f"{i}.png"))
        true = np.select([mask == number for number in IDS], [0, 1, 2], -1)
        for metric in iou, pixels, means:
            metric.update(predicted, torch.from_numpy(true)[None])
    expected = [*iou.compute(), iou.compute().mean(), pixels.compute(), means.compute()]
    found = [
        *scores["iou"].values(),
        scores["miou"],
        scores["pixel_accuracy"],
        scores["class_mean"],
    ]
    assert found == approx([100 * value.item() for value in expected], abs=0.1)


def test_two_processes_segment_as_one(base, streets, segmented, tmp_path):
    evaluate(*segmenting(base, streets, tmp_path), world=2)
    results, classifier = results_of(tmp_path)
    alone, expected = results_of(segmented[0])
    assert results["segmentation"]["iou"] == approx(alone["segmentation"]["iou"], abs=0.1)
    assert_close(classifier["weight"], expected["weight"], rtol=1e-3, atol=1e-4)


def test_scenes_are_mirrored_with_their_masks(streets):
    names = np.array([f"a/{i}.jpg" for i in range(24)])
    scenes = eval_linear.Scenes(streets / "train", names, (32, 48), IDS, flip=True)
    whole = eval_linear.Scenes(streets / "train", names, (32, 48), IDS)
    mirrored = 0
    for i in range(24):
        image, mask = whole[0, i]
        if not torch.equal(scenes[0, i][0], image):
            mirrored += 1
            image = image.flip(-1)
            mask = mask.flip(-1)
        assert torch.equal(scenes[0, i][0], image) and torch.equal(scenes[0, i][1], mask)
    assert 5 < mirrored < 19


def test_masks_that_pillow_would_scale_and_images_that_exif_turns_are_refused(tmp_path):
    tree(tmp_path, "train/a/1.png", "train_masks/a/1.png")
    path = tmp_path / "train_masks" / "a" / "1.png"
    # Grayscale of 2 bits, which Pillow does not write
    gray = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 2, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(8 * b"\x00\xff\xff")),
            (b"IEND", b""),
        ]
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + gray)
    with pytest.raises(ValueError, match="has not 8 bits"):
        eval_linear.load_mask(path)
    scenes = eval_linear.Scenes(tmp_path / "train", ["a/1.png"], (8, 8), [3, 4])
    hashes = [eval_linear.hash_files(*folder) for folder in scenes.folders()]
    Image.new("L", (8, 8), 3).save(path)
    changed = [eval_linear.hash_files(*folder) for folder in scenes.folders()]
    assert changed[0] == hashes[0] and changed[1] != hashes[1]  # images, masks
    assert (scenes[0, 0][1] == 0).all()
    exif = Image.Exif()
    exif[274] = 3
    Image.new("L", (8, 8)).save(tmp_path / "train" / "a" / "1.png", exif=exif)
    with pytest.warns(UserWarning, match="turned by its EXIF data"):
        assert (scenes[0, 0][1] == -1).all()


# --------------------------------------------------------------------------------------- the README

README = (FOLDER / "README.md").read_text(encoding="utf-8")
SNIPPET = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_snippet_of_the_readme_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    names = runpy.run_path(tmp_path / "snippet.py")
    assert names["loss"].requires_grad


@parametrize(
    "images, gpus, eps_sq, collapsed, expected",
    [
        (64, 8, 0.4, False, "0.450"),
        (78, 32, 1.6, True, "0.01094"),
        (64, 1, 0.4, True, "0.063"),
    ],
)
def test_the_rates_in_the_readme_follow_from_the_formula(images, gpus, eps_sq, collapsed, expected):
    gamma = 1 / 256 + 1 / (images * gpus)
    z = torch.eye(images, 256)
    if collapsed:
        z = z[:1].expand(images, 256)
    rate = gamma * coding_rate(z.double(), eps_sq).item()
    assert f"{rate:.{len(expected) - 2}f}" == expected
    assert expected in README
