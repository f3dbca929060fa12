# SPDX-License-Identifier: MIT
"""What the three scripts promise. Numbers marked `official` came from running the code of
github.com/RobinWu218/SimDINO at commit 8149fc4 on the same inputs, by the lines beside them.
What the scripts have in the same words is tested in one of them."""

import argparse
import ast
import atexit
import contextlib
import copy
import csv
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
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
from PIL import Image, ImageOps
from torch import nn

import eval_linear
import simdino
import simdinov2
from simdino import SimDINOLoss, coding_rate, effective_rank

FOLDER = Path(simdino.__file__).parent
EVAL = Path(eval_linear.__file__)
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize

# ------------------------------------------------------------------------ what the tests stand on


@pytest.fixture(scope="session", autouse=True)
def surroundings():
    """One thread: models as small as these lose by a second, here and in the processes they start.
    These heed signals, also where pytest was started by nohup or in the background of a script."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in signal.SIGINT, signal.SIGHUP:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module", params=[simdino, simdinov2], ids=["v1", "v2"])
def script(request):
    return request.param


def waves(*shape, a):
    """Float64 numbers in [-1, 1] that any machine computes alike."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(i * i * a).view(shape)


def rows(*shape, a):
    return F.normalize(waves(*shape, a=a), dim=-1)


def fingerprint(x):
    """One number that depends on every entry of x."""
    return (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)).sum().item()


TINY = shlex.split(
    "--arch vit_nano --patch_size 8 --hidden_dim 32 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --batch_size 8 --epochs 4 --warmup_epochs 1 --num_workers 0 "
    "--drop_path_rate 0.1 --lr 0.001 --eval_freq 2 --saveckp_freq 2"
)


def tiny(data, output, *more):
    """Flags of a small run; more: others, as words or as a text."""
    more = " ".join(map(str, more)).split()
    return [*TINY, "--data_path", str(data), "--output_dir", str(output), *more]


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


@contextlib.contextmanager
def as_before():
    """Handlers of signals, and what is to be done at exit, are afterwards as they were."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
    numbers += (signal.SIGXCPU,)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        atexit.unregister(os._exit)  # of a run that failed: pytest would end with status 1


def train(*flags, script=simdino):
    """script.main() with these flags, in this process."""
    with pytest.MonkeyPatch.context() as patch, as_before():
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        script.main()


def expect_stop(*flags, script=simdino):
    """Run, expect an end with one line; -> the line."""
    with pytest.raises((SystemExit, OSError)) as stopped:
        train(*flags, script=script)
    text = getattr(stopped.value, "code", None) or str(stopped.value)
    assert isinstance(text, str) and text and "\n" not in text
    return text


def launch(script, *flags, world=1, launcher=False, code="", stdout=subprocess.PIPE, **env):
    """Processes of a run, or torchrun alone. code: run before main, or where there is no script."""
    command, port = [sys.executable], str(free_port())
    if launcher:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command += ["--master_addr", "127.0.0.1", "--master_port", port]
    if code:
        code = f"import os, sys\nsys.path.insert(0, {str(FOLDER)!r})\n" + textwrap.dedent(code)
        if script:
            code = f"import {script.__name__} as script\n{code}\n"
            code += "script.__name__ = '__main__'\nscript.main()"
    command += ["-c", code] if code else [script.__file__]
    more = {"text": True, "errors": "replace", "start_new_session": True, "stdout": stdout}
    processes = []
    for process in range(1 if launcher else world):
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | env
        if not launcher:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(process)}
            variables |= {"LOCAL_RANK": str(process), "WORLD_SIZE": str(world)}
        more |= {"env": variables, "stderr": subprocess.STDOUT, "cwd": FOLDER}
        processes.append(subprocess.Popen([*command, *map(str, flags)], **more))
    return processes


def ends(processes, seconds=300):
    """Statuses and outputs of processes that all must end by themselves."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [process.returncode for process in processes], outputs


def wait_for(path, process):
    """Until the process, which must go on, has written the file."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def weights_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def check_log(folder, begun):
    """Four epochs are whole, the first of them as they were when the run was begun."""
    log = log_of(folder)
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3] and log[: len(begun)] == begun
    assert all(math.isfinite(entry["train_loss"]) for entry in log)
    assert weights_of(folder)["log"] == log


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same(a, b):
    """Equality to the last bit of nested state dicts."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Code:
    """Opened without weights_only, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


# ----------------------------------------------------------------------------------------- the loss


@parametrize("n, d", [(5, 12), (12, 12), (40, 12)])
def test_coding_rate_is_the_formula_of_the_paper(n, d):
    z = rows(3, 2, n, d, a=0.37)
    expected = torch.logdet(torch.eye(d) + d / (n * 0.3) * z.mT @ z) / 2
    torch.testing.assert_close(coding_rate(z, 0.3), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda z: coding_rate(z, 0.3), z[0, 0].requires_grad_())


def official_loss(student, teacher, eps, expa_type=1, gpus=1):
    """Loss, comp and expa of the official code on so many GPUs, the mean over them, by its formula,
    in which the teacher has 2 views. A GPU forms the second moments of its own rows, and divides by
    the number of rows of all."""
    (views, n, d), shared = student.shape, len(teacher)
    pairs = [(t, s) for t in range(shared) for s in range(views) if s != t]
    comp = 0
    for t, s in pairs:
        lengths = teacher[t].norm(dim=-1) * student[s].norm(dim=-1)
        comp = comp + ((teacher[t] * student[s]).sum(-1) / lengths).mean() / len(pairs)
    z = student[:shared] if expa_type == 0 else (student[:shared] + teacher) / 2
    moments = [own.mT @ own for view in z for own in view.split(n // gpus)]
    rates = [torch.logdet(torch.eye(d) + d / (n * eps) * moment) / 2 for moment in moments]
    expa = (d + n) / (d * n) * sum(rates) / len(rates)
    return -comp - expa, comp, expa


def check_equal(value, expected, x, accuracy=1e-12):
    """Two losses have the same value and the same gradient by x."""
    assert value.item() == pytest.approx(expected.item(), rel=accuracy)
    ours, theirs = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (value, expected))
    assert (ours - theirs).norm() < accuracy * theirs.norm()


@parametrize("expa_type", [0, 1])
@parametrize("shared, d", [(2, 16), (2, 48), (1, 16), (3, 48)])
def test_loss_equals_the_official_one_on_one_process(shared, d, expa_type):
    x, teacher = waves(4, 24, d, a=0.37).requires_grad_(), rows(shared, 24, d, a=0.11)
    student = F.normalize(x, dim=-1)  # as both heads do
    expected, comp, expa = official_loss(student, teacher, 0.05, expa_type)
    loss_fn = SimDINOLoss(0.05, None, expa_type=expa_type)
    value, stats = loss_fn(student, teacher)
    check_equal(value, expected, x)
    assert stats["comp"].item() == pytest.approx(comp.item(), rel=1e-9)
    assert stats["expa"].item() == pytest.approx(expa.item(), rel=1e-9)
    single = student.float(), teacher.float()
    check_equal(loss_fn(*single)[0], expected, x, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_fn(*single)[0]
    assert value.dtype == torch.float32 and value == loss_fn(*single)[0]
    loss_fn = SimDINOLoss(0.05, None, 3.0, 0.25, expa_type)
    weighted = -3 * comp - 0.25 * expa * d * 24 / (d + 24)
    check_equal(loss_fn(student, teacher)[0], weighted, x)


def test_defaults_equal_the_published_run_on_8_gpus_of_64():
    x, teacher = waves(4, 512, 256, a=0.37).requires_grad_(), rows(2, 512, 256, a=0.11)
    student = F.normalize(x, dim=-1)
    expected = official_loss(student, teacher, 0.05, gpus=8)[0]
    check_equal(SimDINOLoss()(student, teacher)[0], expected, x, 1e-11)
    # The same in 8 rounds of 64, if gamma is that of the 512
    loss_fn = SimDINOLoss(gamma=(256 + 512) / (256 * 512))
    parts = zip(student.split(64, dim=1), teacher.split(64, dim=1))
    check_equal(sum(loss_fn(*part)[0] for part in parts) / 8, expected, x, 1e-11)


def test_images_of_a_last_batch_that_fill_no_group_have_no_part_in_the_rate():
    x, teacher = waves(4, 40, 12, a=0.37).requires_grad_(), rows(2, 40, 12, a=0.11)
    student = F.normalize(x, dim=-1)
    comp = official_loss(student, teacher, 0.4)[1]
    rate = coding_rate(((student[:2] + teacher) / 2)[:, :32].unflatten(1, (2, 16)), 0.4).mean()
    expected = -comp - (12 + 40) / (12 * 40) * rate
    check_equal(SimDINOLoss(group_size=16)(student, teacher)[0], expected, x)


@pytest.mark.filterwarnings("ignore")
def test_compiled_as_one_graph_the_loss_has_the_same_value_and_gradient():
    loss_fn = SimDINOLoss(group_size=8)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    student, teacher = rows(4, 16, 12, a=0.37).requires_grad_(), rows(2, 16, 12, a=0.11)
    check_equal(compiled(student, teacher)[0], loss_fn(student, teacher)[0], student)


def test_the_length_of_rows_does_not_change_the_loss():
    student, teacher = rows(4, 16, 12, a=0.37), rows(2, 16, 12, a=0.11)
    expected, stats = SimDINOLoss(group_size=8)(student, teacher)
    for scale in (1e-3, 160.0, 1e6):
        longer = (scale * student).requires_grad_()
        loss, longer_stats = SimDINOLoss(group_size=8)(longer, 3 * teacher)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for key in stats:
            assert longer_stats[key].item() == pytest.approx(stats[key].item(), rel=1e-12)
        (grad,) = torch.autograd.grad(loss, longer)
        outward = (grad * longer.detach()).sum(-1).abs().max()
        assert outward < 1e-12, "nothing is gained by longer or shorter rows"


@parametrize("eps_sq", [0.05, 0.4])
@parametrize("device_type, n", [("cpu", 8), ("cpu", 64)])
def test_the_coding_rate_alone_is_exact_under_autocast(device_type, n, eps_sq):
    z = rows(3, n, 32, a=0.37)
    expected = coding_rate(z, eps_sq)
    with torch.autocast(device_type, torch.bfloat16):
        rate = coding_rate(z.float(), eps_sq)
        half = coding_rate(z.bfloat16(), eps_sq)
    assert rate.dtype == half.dtype == torch.float32
    torch.testing.assert_close(rate, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(half, coding_rate(z.bfloat16().double(), eps_sq).float())


def test_effective_rank_counts_the_directions_in_use():
    assert effective_rank(torch.eye(32)[:16]) == pytest.approx(16, rel=1e-4)
    assert effective_rank(torch.eye(32)[:1].expand(16, -1)) == pytest.approx(1, rel=1e-4)
    z = rows(40, 12, a=0.37)
    p = torch.linalg.svdvals(z) ** 2 / 40  # of unit rows: they sum to 1
    assert effective_rank(z) == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)
    assert math.isfinite(effective_rank(torch.full((4, 3), math.nan)))


@parametrize(
    "error, options, shapes",
    [("eps_sq", {"eps_sq": 0}, 0), ("eps_sq", {"eps_sq": math.nan}, 0)]
    + [("group_size", {"group_size": 0}, 0), ("expa_type", {"expa_type": 2}, 0)]
    + [("make no pairs", {}, (1, 1, 64)), ("make no pairs", {"expa_type": 0}, (2, 3, 64))]
    + [("group_size 64 does not divide .*96 images", {}, (3, 2, 32))]
    # (images, views, d) in place of (views, images, d), on three processes
    + [(r"order is \(views, images, d\)", {"group_size": None}, (64, 64, 12))]
    + [(r"order is \(views, images, d\)", {}, (4, 4, 1))],
)
def test_loss_names_what_is_wrong(monkeypatch, error, options, shapes):
    monkeypatch.setattr(SimDINOLoss, "processes", staticmethod(lambda: 3))
    with pytest.raises(ValueError, match=error):
        loss_fn, (views, shared, n) = SimDINOLoss(**options), shapes
        loss_fn(rows(views, n, 8, a=0.3), rows(shared, n, 8, a=0.2))


def test_nothing_is_gathered_where_the_group_divides_the_rows_of_a_process(monkeypatch):
    monkeypatch.setattr(dist, "all_gather", lambda *_: sys.exit("gathered"))
    monkeypatch.setattr(SimDINOLoss, "processes", staticmethod(lambda: 8))
    student, teacher = rows(4, 64, 256, a=0.37), rows(2, 64, 256, a=0.11)
    for group in (1, 16, 64):
        expa = SimDINOLoss(group_size=group)(student, teacher)[1]["expa"].item()
        rates = coding_rate(((student[:2] + teacher) / 2).unflatten(1, (-1, group)), 0.4)
        assert expa == pytest.approx((256 + 512) / (256 * 512) * rates.mean().item(), rel=1e-12)
    for group in (128, None):
        with pytest.raises(SystemExit, match="gathered"):
            SimDINOLoss(group_size=group)(student, teacher)


def definitions(script):
    """Source text of the script's top-level functions, classes and constants, by name."""
    text, found = Path(script.__file__).read_text(), {}
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(target) for target in targets]
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        found |= {name: found.get(name, "") + source for name in names if name}
    return found


def test_the_loss_can_be_lifted_out_of_the_file_with_torch_alone(tmp_path):
    parts = (definitions(simdino)[name] for name in ("coding_rate", "SimDINOLoss"))
    (tmp_path / "lifted.py").write_text("\n\n".join(["import torch", *parts]))
    lifted = runpy.run_path(tmp_path / "lifted.py")["SimDINOLoss"]
    student, teacher = rows(4, 64, 32, a=0.37), rows(2, 64, 32, a=0.11)
    assert lifted()(student, teacher)[0] == SimDINOLoss()(student, teacher)[0]


def test_what_the_scripts_share_stands_in_each_in_the_same_words():
    v1, v2, evaluation = map(definitions, (simdino, simdinov2, eval_linear))
    differs = {"Block", "VisionTransformer", "SimDINO", "SMALL", "MicroBatches", "parse_args"}
    differs |= {"build", "schedules", "start_run", "take_steps", "load_pretrained", "main"}
    assert {name for name in v1 if v1[name] != v2.get(name)} == differs
    assert [name for name in v2 if name in v1] == list(v1), "in the same order"
    added = {"masked_patch_loss", "LayerScale", "Network", "block_masks", "parameter_groups"}
    assert v2.keys() - v1.keys() == added
    differs = {"Block", "VisionTransformer", "parse_args", "main"}
    assert {
        name for name in evaluation if evaluation[name] != v2.get(name, evaluation[name])
    } == differs


def self_distil(gamma, momentum=0.9, steps=150, unit=True):
    """SimDINO on noisy views of 64 points: student rows, teacher rows, the teacher's mean move."""
    torch.manual_seed(0)
    points, moved = torch.randn(64, 16), 0.0
    student = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    teacher, optimizer = copy.deepcopy(student), torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        views = points + 0.3 * torch.randn(4, 64, 16)
        z_s, z_t = student(views), teacher(views[:2]).detach()
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
    kept, collapsed = (rank_of(self_distil(gamma, steps=800)[0]) for gamma in (None, 0.0))
    assert kept > 10, "of 16 directions nearly all are in use"
    assert collapsed < 1.5, "pulled together by nothing but each other, all features agree"


def test_without_l2_normalisation_the_rate_is_bought_by_length_not_by_diversity():
    """By the paper's terms alone: SimDINOLoss normalises."""
    unit, free = self_distil(None)[0], self_distil(None, unit=False)[0]
    lengths = free.norm(dim=-1)
    assert lengths.mean() > 2 and lengths.std() > 0.1 * lengths.mean()
    assert rank_of(free) < rank_of(unit)


def test_a_slower_teacher_is_steadier_and_further_behind():
    runs = [self_distil(None, momentum, steps=60) for momentum in (0.0, 0.9, 0.99)]
    units = [[F.normalize(z, dim=-1) for z in run[:2]] for run in runs]
    gaps = [(z_s - z_t).norm(dim=-1).mean().item() for z_s, z_t in units]
    assert gaps[0] < 1e-6 and gaps[0] < gaps[1] < gaps[2]
    assert runs[0][2] > runs[1][2] > runs[2][2]


# ---------------------------------------------------------------------------------------- the model


def tiny_vit(script=simdino, **options):
    return script.VisionTransformer(32, 8, 32, 3, 4, **options)


@torch.no_grad()
def fill(model):
    """Float64 weights that any machine computes alike."""
    for i, (name, p) in enumerate(sorted(model.double().state_dict().items())):
        n = torch.arange(1, p.numel() + 1, dtype=torch.float64).view(p.shape)
        p.copy_((0.5 if p.ndim == 1 else 0.2) * torch.sin(n * n * 0.01 + i))
        p += 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0
    return model


@parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
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
@parametrize(
    "height, width, features",
    [(32, 32, 1.5252037344687581), (16, 16, 2.9070248537220484), (48, 24, 2.212051347187865)],
)
def test_vit_equals_the_official_one_at_any_size(height, width, features):
    model = fill(tiny_vit()).eval()
    with torch.no_grad():
        n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
        assert fingerprint(model(torch.sin(n * n * 0.05))) == pytest.approx(features, rel=1e-9)


# official: DinoVisionTransformer(32, 8, embed_dim=32, depth=3, num_heads=4, layerscale=0.1,
#     block_chunks=0, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
#     put through fill(model).eval() and the test's lines
@parametrize(
    "height, width, masked, official",
    [
        (32, 32, False, [0.10318832708893666, 0.10881147621735199, 12.799606920611724]),
        (32, 32, True, [-4.940383799328852, 2.5265665137142204, -5.835303549566303]),
        (16, 16, False, [-3.65211984147059, 1.7188289429619559, 2.5810390103845813]),
        (16, 16, True, [-7.136390470303309, 6.309278002187013, 16.58532088089738]),
        (48, 24, False, [-0.19806909711186904, -0.6574862588231296, 28.34563822408723]),
        (48, 24, True, [-5.481463290903153, 1.7748774067798925, 4.293637027881342]),
    ],
)
def test_v2_vit_equals_the_official_one_masked_and_not(height, width, masked, official):
    n = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    masks = torch.arange(2 * height * width // 64).view(2, -1) % 3 == 1 if masked else None
    with torch.no_grad():
        model = fill(tiny_vit(simdinov2)).eval()
        tokens = model.forward_features(torch.sin(n * n * 0.05), masks)
    assert list(tokens) == ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"]
    # The official model interpolates positions in float32.
    accuracy = 1e-9 if height == width == 32 else 1e-6
    assert [fingerprint(x) for x in tokens.values()] == pytest.approx(official, rel=accuracy)


def test_a_list_of_sizes_gives_each_batch_its_features_in_order(script):
    model = tiny_vit(script).eval()
    views = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16, 32, 24)]
    with torch.no_grad():
        torch.testing.assert_close(model(views), torch.cat([model(view) for view in views]))
    with pytest.raises(ValueError, match="patch"):
        model(torch.zeros(1, 3, 30, 32))


@pytest.mark.filterwarnings("ignore")
def test_traced_and_exported_the_vit_takes_any_number_of_images(script):
    model, few, many = tiny_vit(script).eval(), torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        sizes = {"x": {0: torch.export.Dim("images", min=1, max=512)}}
        exported = torch.export.export(model, (few,), dynamic_shapes=sizes).module()
        for form in torch.jit.trace(model, few), exported:
            torch.testing.assert_close(form(many), model(many))


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


def test_v2_computes_the_same_number_of_samples_in_each_branch_and_keeps_the_expectation():
    torch.manual_seed(0)
    model, seen = tiny_vit(simdinov2, drop_path_rate=0.25), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model(torch.randn(8, 3, 32, 32))
    model.eval()(torch.randn(8, 3, 32, 32))
    assert seen == [6, 6, 6, 8, 8, 8]
    keep = model.train().stochastic_depth(torch.zeros(200, 3, 32, 32))
    drawn = [frozenset(samples.tolist()) for samples in keep.flatten(0, 1)]
    assert [len(samples) for samples in drawn] == 6 * [150] and len(set(drawn)) == 6, "drawn anew"
    assert len(model.stochastic_depth(torch.zeros(1, 3, 32, 32))[0][0]) == 1, "never none"
    block, x, one_by_one = model.blocks[0], torch.randn(5, 7, 32, requires_grad=True), []
    keep = torch.tensor([[4, 2, 0], [1, 4, 3]])
    for i, y in enumerate(x.split(1)):
        if i in keep[0]:
            y = y + 5 / 3 * block.ls1(block.attn(block.norm1(y)))
        if i in keep[1]:
            y = y + 5 / 3 * block.ls2(block.mlp(block.norm2(y)))
        one_by_one.append(y)
    sums = [y.sin().sum() for y in (block(x, keep), torch.cat(one_by_one))]
    for of in x, block.ls1.gamma, block.mlp.fc1.weight:
        check_equal(*sums, of, 1e-5)
    with torch.no_grad():
        branch = block.ls1(block.attn(block.norm1(x)))
        block.ls2.gamma.zero_()
        keeps = torch.rand(1000, 5).argsort(-1)[:, :4]
        moved = torch.stack([block(x, torch.stack([keep, keep])) - x for keep in keeps])
    assert (moved[:, :, 0, 0] == 0).sum(1).eq(1).all(), "one of five samples skips the branch"
    assert (moved.mean(0) - branch).norm() < 0.06 * branch.norm(), "4 sigma of 1000 draws"


def test_projection_head_gives_unit_rows_in_float32():
    head = simdino.ProjectionHead(32, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.randn(5, 32))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))
    assert [k for k in head.state_dict()][::2] == ["mlp.0.weight", "mlp.2.weight", "mlp.4.weight"]


def test_masked_patch_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches():
    masks, loss_fn = waves(6, 16, a=0.3) > 0.4, simdinov2.masked_patch_loss
    masks[2] = False  # counts among the 6 and adds nothing
    student, teacher = rows(31, 12, a=0.37).requires_grad_(), rows(31, 12, a=0.11)
    cosine = (student * teacher).sum(-1) / student.norm(dim=-1)
    means = [own.mean() for own in cosine.split(masks.sum(1).tolist()) if len(own)]
    assert len(means) == 5
    expected = -sum(means) / 6
    check_equal(
        loss_fn(student, teacher, masks), expected, student, 1e-7
    )  # 1 / count is in float32
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_fn(student.float(), teacher.float(), masks)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss_fn(student[:0], teacher[:0], torch.zeros_like(masks)) == 0


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


def test_parameter_groups_scale_and_decay_as_the_official_ones():
    # official, by its rule: 0.9 ** (depth + 1 - layer), the embeddings being layer 0, block i layer
    # i + 1, all else depth + 1; the patch embedding times 0.2; no decay of biases, norms and gammas
    student = nn.Module()
    student.backbone, student.head = tiny_vit(simdinov2), simdinov2.ProjectionHead(32, 16, 8)
    groups = simdinov2.parameter_groups(student, 0.9, 0.2)
    ours = {p: (g["lr_scale"], g["decay_scale"]) for g in groups for p in g["params"]}
    names = dict(student.named_parameters())
    assert len(ours) == len(names) == sum(len(group["params"]) for group in groups)
    for name, p in names.items():
        block = re.search(r"blocks\.(\d)", name)
        embedding = re.search("_token|pos_embed|patch_embed", name)
        layer = int(block[1]) + 1 if block else 0 if embedding else 4
        scale = 0.9 ** (4 - layer) * (0.2 if "patch_embed" in name else 1)
        assert ours[p] == (pytest.approx(scale), not re.search("bias|norm|gamma", name)), name


# ----------------------------------------------------------------------------------------- the data


def photo(width=48, height=32):
    """A smooth colour image."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(0.1 * x + k) * np.cos(0.15 * y) for k in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@parametrize("extension", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
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


@parametrize("mode, kind", [("I;16", "u2"), ("I", "i4"), ("F", "f4")])
def test_images_of_more_than_8_bits_are_unreadable(tmp_path, mode, kind):
    path = tmp_path / "x.tif"
    Image.fromarray(np.arange(48).reshape(6, 8).astype(kind)).save(path)
    assert Image.open(path).mode == mode
    with pytest.raises(OSError, match=f"cannot read {path}: mode {mode} has more than 8 bits"):
        simdino.load_image(path)


@parametrize("orientation", range(1, 9))
@parametrize("extension", ["jpg", "png", "tif"])
def test_load_image_applies_exif_orientation(tmp_path, orientation, extension):
    exif, path = Image.Exif(), tmp_path / f"turned.{extension}"
    exif[274] = orientation
    image = photo().convert("L" if extension == "tif" else "RGB")
    image.save(path, exif=exif)
    image.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    image = simdino.load_image(path).permute(1, 2, 0).numpy()
    assert image.shape == expected.shape and np.abs(image - expected).mean() < 6


@parametrize("side, decoded", [(2040, 2040), (2048, 1024), (4096, 1024)])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path, side, decoded):
    image = Image.fromarray(np.tile(np.arange(side, dtype=np.uint8), (side + 8, 1))).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # lying on its side
    image.save(tmp_path / "large.jpg", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "large.jpg")).convert("RGB")
    expected = expected.reduce(side // decoded)
    pixels = simdino.load_image(tmp_path / "large.jpg").permute(1, 2, 0).numpy()
    difference = np.abs(pixels - np.asarray(expected, dtype=float))
    assert difference.mean() < 1 if side > decoded else not difference.any()


@parametrize("content, reason", [(0, "cannot identify"), (3000, "truncated"), (-1, "No such file")])
def test_an_image_that_cannot_be_read_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "x.png"
    photo(150, 150).save(path)
    path.write_bytes(path.read_bytes()[:content])
    if content < 0:
        path.unlink()
    with pytest.raises(OSError, match=f"^cannot read {path}: .*{reason}"):
        simdino.load_image(path)


@pytest.mark.filterwarnings("ignore:another image takes its place")
def test_images_are_drawn_by_seed_epoch_and_index_and_unreadable_ones_replaced(tmp_path):
    names, labels = [f"{i}.png" for i in range(200)], range(200)
    for i in range(200):  # every other one is unreadable
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
        if i % 2:
            (tmp_path / f"{i}.png").write_bytes(b"")

    def transform(image):
        return image[0, 0, 0].item(), torch.rand(()).item()

    def drawn(items, seed=6):
        images = simdino.Images(tmp_path, names, labels, transform, seed)
        return {item: images[item] for item in items}

    first = drawn(range(400))
    torch.rand(3)
    assert drawn(reversed(range(400))) == first and drawn(range(200), 7) != drawn(range(200))
    assert len({number for (_, number), _ in first.values()}) == 400, "anew each epoch"
    for item, ((value, _), label) in first.items():
        readable = item % 2 == 0
        assert label == (item % 200 if readable else -1)
        assert value % 2 == 0 and (value == label) == readable
    taken = [[first[item][0][0] for item in range(1 + at, 200 + at, 2)] for at in (0, 200)]
    assert taken[0] != taken[1] and max(Counter(taken[0]).values()) < 8, "spread"


def test_a_file_that_cannot_be_read_is_named_once(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    images = simdino.Images(tmp_path, ["good.png", "bad.png"], [0, 1], lambda image: 0)
    with pytest.warns(UserWarning) as warned:
        assert [images[item] for item in (0, 1)] == [(0, 0), (0, -1)]
    assert len(warned) >= 1
    assert str(warned[0].message).startswith(
        f"another image takes its place: cannot read {tmp_path}/bad.png: "
    )


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


def test_center_crop_is_resize_256_crop_224_and_cuts_strips_to_two_squares():
    image = torch.from_numpy(np.array(photo(500, 375))).permute(2, 0, 1)
    bicubic = TF.InterpolationMode.BICUBIC
    expected = TF.center_crop(TF.resize(image, 256, bicubic, antialias=True), [224, 224])
    difference = (simdino.center_crop(image, 224).int() - expected.int()).abs()
    assert difference.float().mean() < 1
    small, strip = image[:, :32, :32], image[:, 100:110]
    assert torch.equal(simdino.center_crop(small, 32), small)
    cut = simdino.center_crop(TF.center_crop(strip, [10, 20]), 32)
    assert torch.equal(simdino.center_crop(strip, 32), cut)
    for height, width in (1, 1), (1, 20000), (300, 1), (3, 7):
        flat = torch.full((3, height, width), 77, dtype=torch.uint8)
        assert all((view == 77).all() for view in simdino.MultiCrop(32, 16)(flat))
        assert simdino.center_crop(flat, 32).shape == (3, 32, 32)


@parametrize("blur, solarize", [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)])
def test_photometric_equals_torchvision_image_by_image(monkeypatch, blur, solarize):
    draws, uniform, n, used = [], simdino.uniform, 60, Counter()
    monkeypatch.setattr(simdino, "uniform", lambda *a: draws.append(uniform(*a)) or draws[-1])
    torch.manual_seed(0)
    pixels = torch.randint(256, (n, 3, 24, 32), dtype=torch.uint8)
    pixels[::3] = pixels[::3, :1]  # gray
    pixels[1::3] = 255 * (pixels[1::3] > 127)  # saturated
    jitter = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        draws.clear()
        monkeypatch.setattr(torch, "randperm", lambda n, order=order: torch.tensor(order))
        ours = simdino.photometric(pixels, blur, solarize)
        assert all(draw.shape == (n, 1, 1, 1) for draw in draws)
        for i, x in enumerate(pixels / 255):
            drawn = iter([draw[i].item() for draw in draws])

            def happens(operation, probability, drawn=drawn):
                yes = next(drawn) < probability
                used[operation] += yes
                return yes

            x = TF.hflip(x) if happens("flip", 0.5) else x
            jittered = happens("jitter", 0.8)
            for k in order:
                factor = next(drawn)
                x = jitter[k](x, factor) if jittered else x
            x = TF.rgb_to_grayscale(x, 3) if happens("gray", 0.2) else x
            blurred, sigma = happens("blur", blur), next(drawn)
            x = TF.gaussian_blur(x, 13, sigma) if blurred else x
            x = TF.solarize(x, 128 / 255) if solarize and happens("solarize", solarize) else x
            assert next(drawn, None) is None
            expected = TF.normalize(x, simdino.MEAN, simdino.STD)
            # A value that rounding moves over the threshold of solarisation changes by much.
            wrong = ((ours[i] - expected).abs() > 1e-4).float().mean()
            assert wrong <= (0.01 if solarize else 0)
    assert used["jitter"] > used["flip"] > used["gray"] > 0
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]  # of brightness, …, hue
    for (low, high), draw in zip(
        [ranges[k] for k in order] + [(0.1, 2.0)], draws[2:6] + draws[8:9]
    ):
        assert low <= draw.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < draw.max() <= high


def test_augment_blurs_and_solarizes_each_kind_of_view_as_often_as_dino(monkeypatch):
    seen = []

    def spy(x, blur, solarize=0.0):
        seen.append((blur, solarize))
        return x

    monkeypatch.setattr(simdino, "photometric", spy)
    views = [torch.full((2, 3, 8 - 4 * (i > 1), 8 - 4 * (i > 1)), i) for i in range(5)]
    out = simdino.augment(views)
    assert seen == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    assert all(torch.equal(a, b) for a, b in zip(out, views, strict=True))
    assert len(simdino.augment(views[:2])) == 2


def test_built_in_images_tell_nothing_by_brightness_and_are_always_the_same():
    for kind in range(10):
        draws = [np.random.default_rng((0, kind, i)) for i in range(40)]
        images = [np.asarray(simdino.draw_pattern(kind, rng)) for rng in draws]
        assert abs(np.mean(images) - 128) < 6
    again = simdino.draw_pattern(9, np.random.default_rng((0, 9, 39)))
    assert np.array_equal(np.asarray(again), images[-1])


# ---------------------------------------------------------------------------- folders and labels


def tree(root, *paths):
    """Empty files at these paths below root, 8 in a path that ends with a slash."""
    for path in paths:
        for name in [f"{path}{i}.png" for i in range(8)] if path.endswith("/") else [path]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    return root


@parametrize("end", shlex.split("jpg jpeg JPEG png webp bmp tif tiff ppm pgm"))
def test_images_of_all_usual_extensions_are_found_and_read(tmp_path, end):
    path, form = tmp_path / f"x.{end}", end.lower()
    forms = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}
    Image.new("RGB", (16, 8), (200, 0, 0)).save(path, format=forms.get(form, form))
    assert simdino.load_image(path).shape == (3, 8, 16)
    tree(tmp_path, f"._x.{end}", "notes.txt", "a/more.txt", "readme")
    assert simdino.find_images(tmp_path) == ([path.name], [""])


def open_images(root, *flags):
    """simdino.open_images of empty files that all can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simdino, "load_image", lambda path: torch.zeros(3, 8, 8, dtype=torch.uint8))
        args = simdino.parse_args(tiny(root, root / "out", "--batch_size 1 --group_size 1", *flags))
        return simdino.open_images(args)


def test_a_label_is_the_first_folder_and_hidden_names_do_not_exist(tmp_path, capsys):
    tree(tmp_path, "train/a/x/1.png", "train/a/y/z/1.png", "train/b/x/1.png", "train/0.png")
    tree(tmp_path, "val/b/1.png", "val/a/y/1.png", "val/0.png", "val/new/1.png", "test/a/1.png")
    tree(tmp_path, "train/notes.txt", "train/b/x.npy", "0.png")
    for hidden in "train/.git/1.png", "train/a/._1.png", "val/a/.x/1.png":
        tree(tmp_path, hidden)
    (tmp_path / "elsewhere").mkdir()
    tree(tmp_path, "elsewhere/1.png")
    (tmp_path / "train" / "b" / "linked").symlink_to("../../elsewhere")
    images, knn_images = open_images(tmp_path)
    names = ["0.png", "a/x/1.png", "a/y/z/1.png", "b/linked/1.png", "b/x/1.png"]
    for split in images, knn_images["train"]:
        assert sorted(split.names) == names
        labels = dict(zip(split.names.tolist(), split.labels.tolist()))
        assert [labels[name] for name in names] == [-1, 0, 0, 1, 1]
    val = dict(zip(knn_images["val"].names.tolist(), knn_images["val"].labels.tolist()))
    assert val == {"0.png": -1, "a/y/1.png": 0, "b/1.png": 1, "new/1.png": -1}
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/train: 5 images, 2 class folders, 2 other files",
        f"{tmp_path}/val: 4 images, 3 class folders, 0 other files",
    ]


@parametrize(
    "paths",
    ["1.png 2.png", "a/ b/", "train/a/ train/b/", "train/ val/", "train/a/ train/b/ val>train"]
    + ["train/a/ val/a/1.png", "train/a/ train/b/ val/1.png", "train/ val/a/ val/b/"]
    + ["test/a/ test/b/ train>test", "train/a/ train/b/ val/c/1.png"],
)
def test_where_there_is_no_accuracy_one_line_says_why(capsys, tmp_path, paths):
    for path in paths.split():
        if ">" in path:
            place, target = path.split(">")
            (tmp_path / place).symlink_to(target)
        else:
            tree(tmp_path, path)
    images, knn_images = open_images(tmp_path)
    assert images.root == str(tmp_path / "train" if "train" in paths else tmp_path)
    assert knn_images == {} and len(images) >= 2
    assert capsys.readouterr().out.count("no k-NN accuracy: it needs ") == 1


@parametrize("name", ["val", "valid", "validation", "test"])
def test_the_folder_to_judge_by_has_one_of_four_names(capsys, tmp_path, name):
    tree(tmp_path, "train/a/", "train/b/", f"{name}/a/1.png")
    assert open_images(tmp_path)[1]["val"].root == str(tmp_path / name)
    assert open_images(tmp_path, "--eval_freq 0")[1] == {}


# ------------------------------------------------------------------------------- the training step


def build(script, *flags):
    """The model that these flags make."""
    return script.build(script.parse_args([*TINY, *map(str, flags)]), CPU)


def micro_batch(script, own, seed=0):
    """A micro-batch, as step() takes it, of the images own (a slice) of 16."""
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
    images, lr, decay, momentum = micro_batch(script, slice(8)), 1e-3, 0.1, 0.9
    before = [p.detach().clone() for p in model.params]
    metrics, z = model.step([images], lr, decay, momentum)
    clipped = [p.grad.clone() for p in model.params]
    assert z.shape == (2 * 8, 256) and not z.requires_grad
    names = [name for name, _ in model.student.named_parameters()]
    teacher = list(model.teacher.parameters())
    for name, p, q, g, t in zip(names, before, model.params, clipped, teacher, strict=True):
        expected = p * (1 - lr * decay * (p.ndim > 1))
        expected = expected - lr * g / (g.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(q.detach(), expected, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(t, momentum * p + (1 - momentum) * q, rtol=1e-5, atol=1e-8)
        assert not t.requires_grad

    free = build(script, "--drop_path_rate", 0, "--clip_grad", 0)
    free.step([images], lr, decay, momentum)
    grads, cut = [p.grad for p in free.params], 0
    parts = [[i] for i in range(len(names))]  # v1: each tensor by itself; v2: backbone and head
    if script is simdinov2:
        heads = [name.startswith("head") for name in names]
        parts = [[i for i, head in enumerate(heads) if head == kind] for kind in (False, True)]
    for part in parts:
        norm = torch.cat([grads[i].flatten() for i in part]).norm()
        cut += bool(norm > 0.02)
        for i in part:
            expected = grads[i] * min(1, 0.02 / (norm + 1e-6))
            torch.testing.assert_close(clipped[i], expected, rtol=1e-4, atol=1e-9)
    assert cut, "some gradient was too long"

    loss, comp, expa, *patch = metrics.tolist()
    assert loss == pytest.approx(-comp - expa + sum(patch), abs=1e-6)
    rate = coding_rate(z.unflatten(0, (2, 8)), 0.4).mean().item()
    assert expa == pytest.approx((256 + 8) / (256 * 8) * rate, rel=1e-5)


def test_checkpointed_gradients_are_the_same_to_the_last_bit(script):
    flags, runs, gradients = ["--drop_path_rate", 0.4, "--clip_grad", 0], [], []
    plain, thrifty = build(script, *flags), build(script, *flags, "--grad_checkpointing")
    for block in thrifty.student.backbone.blocks:
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    for seed in (3, 4):  # of stochastic depth: the second of the two differs
        for model in plain, thrifty:
            model.step([micro_batch(script, slice(8), seed)], 0.0, 0.0, 1.0)
            gradients.append(gradient_of(model))
        assert torch.equal(*gradients[-2:]) and 0 < gradients[-1].norm() < math.inf
    assert not torch.equal(gradients[0], gradients[-1])
    assert len(runs) == 2 * 2 * 2 * 4, "run twice"


# ------------------------------------------------------------------------------------- the options


def test_recipes_are_the_published_ones_for_any_number_of_gpus(monkeypatch):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    for world in 1, 2, 4, 8:
        for script, batch, own in (simdino, 512, 64), (simdinov2, 1024, 128):
            monkeypatch.setattr(script, "WORLD", world)
            args = script.parse_args(["--data_path", "x"])
            assert (args.batch_size, args.batch_size_per_gpu, args.group_size) == (batch, own, own)
            args.arch, args.hidden_dim = "vit_nano", 32
            model = script.build(args, CPU)
            assert model.rounds == 8 // world
            assert model.loss_fn.gamma == pytest.approx((256 + batch) / (256 * batch))
            args.gamma = 0.5
            assert script.build(args, CPU).loss_fn.gamma == 0.5
    assert (args.eps_sq, args.lr, args.drop_path_rate) == (0.4, 0.004, 0.2)
    assert (args.layerscale, args.num_register_tokens) == (0.1, 4)
    assert (args.layerwise_decay, args.patch_embed_lr_mult) == (0.9, 0.2)
    assert (args.momentum_teacher, args.clip_grad, args.ibot_loss_weight) == (0.9, 3.0, 1.0)
    assert (args.mask_sample_probability, args.mask_ratio_min_max) == (0.5, [0.1, 0.5])
    monkeypatch.setattr(simdino, "WORLD", 16)  # more than rounds: each takes less
    args = simdino.parse_args(["--data_path", "x", "--group_size", "32"])
    assert (args.batch_size, args.batch_size_per_gpu, args.group_size) == (512, 32, 32)
    recipe = args.lr, args.epochs, args.warmup_epochs, args.momentum_teacher, args.clip_grad
    assert recipe == (5e-4, 100, 10, 0.996, 3.0)


def test_small_images_have_the_defaults_of_the_built_in_data(script):
    small = ["--data_path", "x", "--small_images"]
    built_in, own = vars(script.parse_args([])), vars(script.parse_args(small))
    assert {key for key in own if built_in[key] != own[key]} == {"data_path", "small_images"}
    more = "--patch_size 4 --global_crops_scale 1 0.4"
    args = script.parse_args([*small, *more.split()])
    assert (args.patch_size, args.global_crops_scale) == (4, [1, 0.4]), "in any order"


@parametrize(
    "world, flags, rule",
    [
        (1, "--batch_size 100 --batch_size_per_gpu 64", "--batch_size 100 must be a multiple of"),
        (3, "--batch_size 64 --group_size 1", "multiple of the 3 processes x"),
        (80, "--batch_size 64", "multiple of the 80 processes x --batch_size_per_gpu 0"),
        (
            1,
            "--batch_size 96 --batch_size_per_gpu 48 --group_size 32",
            "--group_size 32 must divide",
        ),
        (4, "--batch_size_per_gpu 8 --group_size 12", "--group_size 12 must divide"),
        (2, "--batch_size_per_gpu 8 --group_size 64", "divides the 16 images"),
        (1, "--warmup_epochs 8", "--warmup_epochs 8.0 must be below --epochs 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_rule(
    monkeypatch, capsys, script, world, flags, rule
):
    monkeypatch.setattr(script, "WORLD", world)
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(flags.split())
    message = capsys.readouterr().err.splitlines()[-1]
    assert rule in message


@parametrize(
    "world, flags",
    [(1, "--batch_size 96 --batch_size_per_gpu 48 --group_size 24"), (1, "--group_size 1")]
    + [(4, "--batch_size_per_gpu 8 --group_size 32"), (4, "--batch_size_per_gpu 8 --group_size 16")]
    + [(2, "--batch_size_per_gpu 8 --group_size 4"), (2, "--group_size 100")],
)
def test_sizes_that_fit_are_taken(monkeypatch, script, world, flags):
    monkeypatch.setattr(script, "WORLD", world)
    assert script.parse_args(flags.split()).group_size <= 96


@parametrize(
    "flags, named",
    [
        ("--arch resnet", "argument --arch: invalid choice: 'resnet'"),
        ("--lr high", "argument --lr: invalid float value: 'high'"),
        ("--no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
        ("--eps 0.05", "unrecognized arguments: --eps 0.05"),  # not taken for --eps_sq
    ],
)
def test_unknown_and_malformed_options_are_named(script, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(flags.split())
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_help_opens_with_usage_a_sentence_and_two_examples(script):
    (status,), (text,) = ends(launch(script, "--help", PYTHONIOENCODING="ascii"))
    lines = [line for line in text.splitlines() if line]
    assert status == 0 and text.isascii()
    assert lines[0] == f"usage: torchrun {script.__name__}.py [options]" and lines[1].endswith(".")
    assert all(line.startswith("    torchrun ") for line in lines[2:4])
    assert {*re.findall(r"^  --(\w+)", text, re.MULTILINE)} == vars(script.parse_args([])).keys()


# ------------------------------------------------------------------- which images a step takes, k-NN


class FakeImages:
    """In place of 50 Images: the item in each pixel of two views, and a label."""

    def __len__(self):
        return 50

    def __getitem__(self, item):
        return [torch.full((3, 4, 4), item), torch.full((3, 4, 4), -item)], 7


def micro_batches(script, size, seed=0):
    """Those of 8 steps of 12 of the 50 images: two epochs."""
    args = argparse.Namespace(batch_size=12, batch_size_per_gpu=size, seed=seed)
    args.global_crops_size, args.patch_size = 48, 8
    args.mask_sample_probability, args.mask_ratio_min_max = 0.5, (0.1, 0.5)
    items = script.MicroBatches(FakeImages(), args)
    return [items[i] for i in range(8 * 12 // size)]


def test_steps_take_the_same_images_however_they_are_cut_into_micro_batches(script):
    def steps(size, seed=0):
        taken = [item[1][0][:, 0, 0, 0].tolist() for item in micro_batches(script, size, seed)]
        return np.reshape([*chain(*taken)], (8, 12)).tolist()

    alone = steps(12)
    assert steps(3) == steps(4) == alone and steps(12, seed=1) != alone
    first, second = [*chain(*alone[:4])], [*chain(*alone[4:])]
    assert len(set(first)) == len(set(second)) == 48 and first != [key - 50 for key in second]
    assert {key // 50 for key in first} == {0} and {key // 50 for key in second} == {1}
    items, others = micro_batches(script, 3), micro_batches(script, 3, seed=1)
    assert len({item[0] for item in items + others}) == 2 * 8 * 4, "a seed of each"
    for _, views, *hidden in items:
        keys = views[0][:, 0, 0, 0].tolist()
        assert torch.equal(views[0], -views[1])
        for masks, index in [hidden] if script is simdinov2 else []:
            seed = 0, keys[0]  # of the run, and the first image
            assert torch.equal(masks, script.block_masks(6, 6, 0.5, (0.1, 0.5), seed))
            assert masks.any(1).sum() == 3, "half of the global views"
            assert len(index) == masks.sum() and masks.flatten()[index].all()


def test_schedules_reproduce_the_official_log():
    # assets/SimDNIOv1_vitb16.txt, official: epoch, train_lr, train_wd; 2502 steps of 512 images
    lr = simdino.cosine_schedule(5e-4 * 512 / 256, 1e-6, 100 * 2502, 10 * 2502)
    wd = simdino.cosine_schedule(0.04, 0.4, 100 * 2502)
    assert len(lr) == len(wd) == 250200 and lr[0] == 0
    for epoch, train_lr, train_wd in (
        (0, 4.99820136696111e-05, 0.04002958960483863),
        (9, 0.0009500179863303882, 0.047963999953206556),
        (10, 0.0009998986293786, 0.04971127240897121),
        (50, 0.0005786384895696651, 0.22282607096534862),
        (99, 1.1014922368712136e-06, 0.3999703748959069),
    ):
        steps = slice(epoch * 2502, (epoch + 1) * 2502)
        assert np.mean(lr[steps]) == pytest.approx(train_lr, rel=1e-9)
        assert np.mean(wd[steps]) == pytest.approx(train_wd, rel=1e-9)
    assert {type(value) for value in lr + wd} == {float}, "a checkpoint may hold them"


def test_knn_counts_weighted_votes():
    train = F.normalize(torch.randn(200, 8), dim=-1), torch.arange(200) % 5
    val = F.normalize(torch.randn(60, 8), dim=-1), torch.arange(60) % 5
    hits = 0
    for z, y in zip(*val):
        cosines = sorted(((z @ t).item(), label.item()) for t, label in zip(*train))[-20:]
        votes = [sum(math.exp(c / 0.07) for c, label in cosines if label == k) for k in range(5)]
        hits += int(np.argmax(votes)) == y
    assert simdino.knn_accuracy(train, val) == pytest.approx(100 * hits / 60)


class Judged(list):
    root = "val"


@parametrize("world", [1, 3])
def test_every_image_is_judged_once_on_all_processes(monkeypatch, capsys, world):
    images = Judged((torch.full((3, 2, 2), i % 200).byte(), i) for i in range(700))
    for i in 7, 9:
        images[i] = (images[i][0], -1)
    kept = [i for i in range(700) if i not in (7, 9)]
    model, parts = SimpleNamespace(autocast=contextlib.nullcontext(), device=CPU), {2: [], 1: []}
    model.teacher = SimpleNamespace(backbone=lambda x: x.mean((2, 3)))

    def gather_rows(x):
        parts[x.ndim].append(x)
        return torch.cat(parts[x.ndim])

    monkeypatch.setattr(simdino, "WORLD", world)
    monkeypatch.setattr(simdino, "gather_rows", gather_rows)
    for process in range(world):
        monkeypatch.setattr(simdino, "PROCESS", process)
        z, labels = simdino.embed(model, images, {"num_workers": 0})
    assert len({len(part) for part in parts[2] + parts[1]}) == 1, "to be gathered"
    assert labels.tolist() == kept
    expected = simdino.normalize(torch.stack([image[0] for image in images]) / 255).mean((2, 3))
    torch.testing.assert_close(z, F.normalize(expected, dim=-1)[kept])
    said = "k-NN leaves out 2 of 700 images in val: they cannot be read, or have no class of train/"
    assert said in capsys.readouterr().out or world > 1


# ------------------------------------------------------------------- one run, any number of processes

WORLD_CASES = {  # images that a process takes at a time by number of processes; group; all drawn
    "groups inside a process": ({1: 4, 2: 4, 4: 4}, 2, True),
    "groups across processes": ({1: 8, 2: 4, 4: 4}, 8, False),
    "the whole batch": ({1: 16, 2: 8, 4: 4}, 16, False),
}
WORLD_RUN = shlex.split("--batch_size 8 --batch_size_per_gpu 2 --group_size 2 --eval_freq 4")
LARGER_PARTS = shlex.split("--batch_size 8 --group_size 8 --eval_freq 4")  # two: 4 each


def step_gradient(script, case, process, world):
    """Metrics and gradient of one real step in float64 on 16 images, those of this process."""
    own, group, drawn = WORLD_CASES[case][0][world], *WORLD_CASES[case][1:]
    flags = ["--batch_size", 16, "--batch_size_per_gpu", own, "--group_size", group]
    model = build(script, *flags, "--clip_grad", 0, "--drop_path_rate", 0.3 if drawn else 0)
    parts = range(process, 16 // own, world)
    parts = [micro_batch(script, slice(own * m, own * (m + 1)), 5 + m) for m in parts]
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:  # what is drawn for micro-batches of other sizes would differ
            patch.setattr(script, "augment", lambda views: [x / 255 - 0.5 for x in views])
        return model.step(parts, 0.0, 0.0, 1.0)[0], gradient_of(model)


def loss_gradient(_, case, process, world):
    """The same of SimDINOLoss in another's loop, which averages the gradients of processes."""
    own = slice(16 * process // world, 16 * (process + 1) // world)
    weight = waves(12, 8, a=0.2).requires_grad_()
    z_s = F.normalize(waves(4, 16, 12, a=0.3)[:, own] @ weight, dim=-1)
    group = WORLD_CASES[case][1]
    loss_fn = SimDINOLoss(group_size=None if group == 16 else group)
    loss, stats = loss_fn(z_s, rows(2, 16, 8, a=0.11)[:, own])
    loss.backward()
    if world > 1:
        dist.all_reduce(weight.grad)
    return torch.stack([loss.detach(), *stats.values()]), weight.grad / world


def world_worker(pictures, folder, ports):
    """One of several processes: the gradients, and both scripts' runs."""
    process, world, gradients = simdino.PROCESS, simdino.WORLD, {}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # of weights, draws and pixels
    if world > 1:
        dist.init_process_group("gloo")
    for case in WORLD_CASES:
        for of in None, simdino, simdinov2:
            gradient = step_gradient if of else loss_gradient
            metrics, gradient = gradient(of, case, process, world)
            if world > 1:
                dist.all_reduce(metrics)
            gradients[of.__name__ if of else "loss", case] = (metrics / world).tolist(), gradient
    torch.set_default_dtype(torch.float32)
    if world > 1:
        time.sleep(0.2)  # or, with torch 2.6, gloo may wait for its threads
        dist.destroy_process_group()
    torch.save(gradients, Path(folder, f"gradients{process}"))
    runs = [("whole", WORLD_RUN, [])]
    runs += [("half", WORLD_RUN, ["--max_steps", 5])] * (world == 2)
    runs += [("parts", LARGER_PARTS, ["--max_steps", 5] * (world == 1))] * (world < 4)
    for script in simdino, simdinov2:
        for name, run, more in runs:
            os.environ["MASTER_PORT"] = str(ports.pop())
            train(*tiny(pictures, Path(folder, script.__name__, name), *run, *more), script=script)


@pytest.fixture(scope="module")
def worlds(pictures, tmp_path_factory):
    """By number of processes: the folder of their runs, and their gradients."""
    results = {}
    for world in 1, 2, 4:
        folder = tmp_path_factory.mktemp(f"world{world}")
        for name in ("simdino/parts", "simdinov2/parts") if world == 2 else ():
            shutil.copytree(results[1][0] / name, folder / name)  # two go on with what one began
        arguments = str(pictures), str(folder), [free_port() for _ in range(6)]
        code = f"import test_simdino\ntest_simdino.world_worker(*{arguments})"
        statuses, printed = ends(launch(None, world=world, code=code), 600)
        assert statuses == [0] * world, printed
        results[world] = folder, torch.load(folder / "gradients0", weights_only=True)
    return results


@parametrize("case", WORLD_CASES)
@parametrize("of, accuracy", [("loss", 1e-12), ("simdino", 1e-9), ("simdinov2", 1e-9)])
def test_gradients_do_not_depend_on_the_number_of_processes(worlds, of, accuracy, case):
    metrics, gradient = worlds[1][1][of, case]
    for world in (2, 4):
        metrics2, gradient2 = worlds[world][1][of, case]
        assert gradient2.dtype == torch.float64
        assert metrics2 == pytest.approx(metrics, rel=accuracy)
        assert (gradient2 - gradient).norm() < accuracy * gradient.norm()


def check_same_run(folder, other):
    """The same run to rounding: that of float32, grown by 12 steps."""
    ours, theirs = ([entry["train_loss"] for entry in log_of(x)] for x in (other, folder))
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert log_of(other)[-1]["knn"] == pytest.approx(log_of(folder)[-1]["knn"], abs=100 / 12 + 0.1)
    ours, theirs = (weights_of(x) for x in (other, folder))
    assert ours["step"] == theirs["step"] == 12
    for part in "student", "teacher":
        for name, p in theirs[part].items():
            # AdamW makes full steps of gradients that are 0 but for rounding, as of keys' biases.
            assert (ours[part][name] - p).abs().max() < 5e-6, (part, name)


def test_a_run_is_the_same_on_any_number_of_processes(script, worlds, pictures, tmp_path):
    one, two, four = (worlds[world][0] / script.__name__ for world in (1, 2, 4))
    check_same_run(one / "whole", two / "whole")
    check_same_run(one / "whole", four / "whole")
    # Begun by two, resumed by one
    half = Path(shutil.copytree(two / "half", tmp_path / "half"))
    assert weights_of(half)["step"] == 5
    train(*tiny(pictures, half, *WORLD_RUN), script=script)
    check_same_run(one / "whole", half)
    # Begun by one, resumed by two, which take fewer images at a time
    old, new = weights_of(one / "parts"), weights_of(two / "parts")
    assert (old["step"], new["step"], len(old["log"])) == (5, 12, 1)
    assert [state["args"]["batch_size_per_gpu"] for state in (old, new)] == [8, 4]
    check_log(two / "parts", old["log"])


def test_torchrun_starts_the_built_in_run_on_two_processes(tmp_path):
    few = f"--max_steps 1 --eval_freq 0 --local_crops_number 1 --output_dir {tmp_path}".split()
    (status,), (printed,) = ends(launch(simdino, *few, world=2, launcher=True))
    assert status == 0 and weights_of(tmp_path)["step"] == 1, printed
    assert "a step: 64 images = 1 rounds x 2 processes x 32; 400 steps = 8 epochs x 50" in printed
    line = f"{tmp_path}/patterns/train: 3200 images, 10 class folders, 0 other files\n"
    assert printed.count(line) == 1


# --------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(script, pictures, tmp_path_factory):
    """The folder of a run never interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("finished")
    (status,), (printed,) = ends(launch(script, *tiny(pictures, output)))
    assert status == 0, printed
    return output, printed


def test_log_and_terminal_say_what_happened(script, finished):
    entries, printed = log_of(finished[0]), finished[1]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    keys = {"epoch", "train_loss", "train_comp_loss", "train_expa_loss", "train_lr", "train_wd"}
    keys |= {"rank", "knn", "img_s", "data_wait"}
    for entry in entries:
        assert entry.keys() == keys | ({"train_ibot_loss"} if script is simdinov2 else set())
        sum_of_terms = -entry["train_comp_loss"] - entry["train_expa_loss"]
        sum_of_terms += entry.get("train_ibot_loss", 0)
        assert entry["train_loss"] == pytest.approx(sum_of_terms, abs=1e-5)
        assert 1 <= entry["rank"] <= 16
        assert entry["img_s"] > 0 and 0 <= entry["data_wait"] <= 1
    assert [entry["knn"] is None for entry in entries] == [True, False, True, False]
    assert "train: 30 images, 3 class folders, 0 other files\n" in printed
    assert "1 processes on the CPU" in printed or torch.cuda.is_available()
    assert "vit_nano in torch.float32, with its head 0.5 million parameters\n" in printed
    assert "a step: 8 images = 1 rounds x 1 processes x 8; 12 steps = 4 epochs x 3\n" in printed
    assert printed.count("UserWarning: another image takes its place: cannot read ") == 1
    assert re.search(r"cannot read \S+4\.jpg: .*\n", printed)
    said = re.findall(r"k-NN accuracy after epoch (\d): (\d+\.\d) %", printed)
    assert [epoch for epoch, _ in said] == ["0", "2", "4"]
    assert [knn for _, knn in said[1:]] == [f"{entries[i]['knn']:.1f}" for i in (1, 3)]
    progress = re.findall(r"^epoch (\d)/4 step (\d+)/12 loss .* ETA", printed, re.MULTILINE)
    assert set(progress) >= {("1", "3"), ("2", "6"), ("3", "9"), ("4", "12")}


def test_checkpoint_opens_safely_and_its_teacher_loads_into_timm(script, finished):
    state = weights_of(finished[0])
    parts = {"student", "teacher", "optimizer", "scaler", "step", "epoch", "args", "log", "metrics"}
    parts.add("images_hash")
    assert state.keys() == parts and state["log"] == log_of(finished[0])
    assert (state["step"], state["epoch"], state["metrics"]) == (12, 4, [])
    assert type(state["args"]) is dict and state["args"]["arch"] == "vit_nano"
    assert all(name.split(".")[0] in ("backbone", "head") for name in state["teacher"])
    assert not same(state["student"], state["teacher"])
    names = {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0002.pth", "log.txt"}
    assert files_of(finished[0]).keys() == names
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(32, 8, num_classes=0, embed_dim=96, depth=4, num_heads=3)
    if script is simdinov2:
        model = script.VisionTransformer(32, 8, **script.ARCHS["vit_nano"])
    backbone = {k[9:]: v for k, v in state["teacher"].items() if k.startswith("backbone.")}
    model.load_state_dict(backbone, strict=True)


def test_the_schedules_are_those_of_the_flags(script, finished):
    # 12 steps of 8 images, 3 an epoch, warm-up of one: linspace(0, peak, 3), then half a cosine of 9
    peak = 0.001 * (8 / 256 if script is simdino else math.sqrt(8 / 1024))
    cosine = [(1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    lr = [0, peak / 2, peak] + [1e-6 + (peak - 1e-6) * x for x in cosine]
    wd = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    for key, values in ("train_lr", lr), ("train_wd", wd):
        means = np.reshape(values, (4, 3)).mean(1)
        assert [entry[key] for entry in log_of(finished[0])] == pytest.approx(means, rel=1e-9)


@parametrize("momentum, kept", [(0.996, "97 %"), (0.8, "24 %"), (0.6, None)])
def test_a_run_of_few_steps_names_the_momentum_of_the_teacher(
    script, pictures, tmp_path, capsys, momentum, kept
):
    flags = tiny(pictures, tmp_path, "--eval_freq 0 --momentum_teacher", momentum)
    train(*flags, script=script)
    warned = re.findall("few steps: .*", capsys.readouterr().out)
    assert len(warned) == (kept is not None)
    assert all(f"keeps {kept}" in line and "--momentum_teacher" in line for line in warned)


def test_a_run_goes_on_in_another_precision_and_back(script, pictures, tmp_path):
    for steps, amp in enumerate(("off", "fp16", "off", "bf16", "fp16"), start=2):
        flags = tiny(pictures, tmp_path, f"--amp {amp} --max_steps {steps}")
        train(*flags, script=script)
        state = weights_of(tmp_path)
        assert state["step"] == steps and bool(state["scaler"]) is (amp == "fp16")
    assert all(entry["knn"] is not None for entry in log_of(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu(script, pictures, tmp_path, amp):
    train(*tiny(pictures, tmp_path, "--amp", amp, "--compile"), script=script)
    assert log_of(tmp_path)[-1]["knn"] is not None


COUNT = """
import atexit, torch
graphs, calls, compile_any = [], [], torch.compile
def backend(graph, inputs):
    graphs.append(1)
    return lambda *x: calls.append(1) or graph(*x)
torch.compile = lambda function, **options: compile_any(function, backend=backend, **options)
atexit.register(lambda: print("counted", len(graphs), len(calls)))
"""


@parametrize("script, world", [(simdino, 1), (simdino, 2), (simdinov2, 1)])
def test_blocks_are_compiled_as_one_graph_a_shape(script, pictures, tmp_path, world):
    more = "--batch_size 8 --group_size 4 --drop_path_rate 0.3 --max_steps 4 --compile"
    flags = tiny(pictures, tmp_path, more)
    statuses, outputs = ends(launch(script, *flags, world=world, code=COUNT))
    if script is simdinov2 and torch.__version__ < "2.7":
        assert "--compile without a GPU needs PyTorch 2.7 or newer\n" in outputs[0]
        return
    assert statuses == [0] * world, outputs
    # A graph break would make more calls, a limit of recompilations fewer. A step is 3 calls of 4
    # blocks (the student's global and local views, the teacher's global ones), k-NN 2.
    calls = 4 * (4 * 3 + 2)
    assert all(f"counted 5 {calls}" in printed for printed in outputs), outputs
    names = weights_of(tmp_path)["teacher"]
    assert all(re.match(r"(backbone|head)\.(?!.*_orig_mod)", name) for name in names)


# ----------------------------------------------------------- killed and resumed: nothing is lost


def check_same_bits(folder, other):
    """Two runs ended alike, and their logs say so, but for times."""
    ours, theirs = weights_of(folder), weights_of(other)
    for part in "student", "teacher", "optimizer", "step", "epoch":
        assert same(ours[part], theirs[part]), part
    times = dict.fromkeys(("img_s", "data_wait"))
    assert [x | times for x in log_of(folder)] == [x | times for x in log_of(other)]


def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    script, finished, pictures, tmp_path, capsys
):
    output, flags = tmp_path / "out", tiny(pictures, tmp_path / "out")
    # By SIGKILL, when the second epoch's log is there, and its checkpoint is not. A clock that runs
    # fast: every epoch is saved.
    code = """
    from itertools import count
    script.time = type(os)("time")
    script.time.monotonic = count(0, 100).__next__
    replace, calls = script.Path.replace, []  # of checkpoint0000.pth, checkpoint.pth, again
    def killed(*paths):
        calls.append(1)
        return os.kill(os.getpid(), 9) if len(calls) == 3 else replace(*paths)
    script.Path.replace = killed
    """
    with (tmp_path / "printed").open("w") as file:
        processes = launch(script, *flags, "--num_workers", 2, stdout=file, code=code)
        assert ends(processes)[0] == [-9]
    assert weights_of(output)["step"] == 3 and len(log_of(output)) == 2
    assert "epoch 1/4 step 3/12" in (tmp_path / "printed").read_text(), "nothing waits in a buffer"
    # In the k-NN that follows the second, and in the third
    for name, accuracy in ("knn_accuracy", None), ("effective_rank", log_of(finished[0])[1]["knn"]):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script, name, lambda *_: signal.default_int_handler(2, None))
            patch.setattr(
                script, "time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__)
            )
            train(*flags, script=script)
        state = weights_of(output)
        assert (state["step"], state["log"][1]["knn"]) == (6, accuracy), "made up for"
    # In the middle of the last, saved
    train(*flags, "--max_steps", 10, script=script)
    state = weights_of(output)
    assert (state["step"], state["epoch"], len(state["metrics"])) == (10, 3, 1)
    assert len(log_of(output)) == 3
    train(*flags, "--num_workers", 1, script=script)
    check_same_bits(output, finished[0])
    before = files_of(output)
    train(*flags, script=script)
    assert files_of(output) == before, "it was over"
    assert capsys.readouterr().out.endswith("nothing is left to train: all 12 steps are done\n")


SIGNAL = """
step, taken = script.SimDINO.step, []
def signalled(self, *arguments, **values):
    taken.append(1)
    if len(taken) == 5 and script.PROCESS == script.WORLD - 1:
        os.kill(os.getpid(), script.signal.NAME)
    return step(self, *arguments, **values)
script.SimDINO.step = signalled
"""


@parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(pictures, tmp_path, name):
    out, more = tmp_path / "out", "--eval_freq 0 --batch_size 1 --max_steps 17"
    flags, code = tiny(pictures, out, more, "--num_workers 1"), SIGNAL.replace("NAME", name)
    statuses, (printed,) = ends(launch(simdino, *flags, code=code))
    step, last = weights_of(out)["step"], printed.splitlines()[-1]
    assert statuses == [128 + getattr(signal, name)] and 5 <= step < 17, printed
    assert last == f"{name}: saved {out}/checkpoint.pth at step {step}"
    train(*tiny(pictures, out, more))
    train(*tiny(pictures, tmp_path / "whole", more))
    check_same_bits(out, tmp_path / "whole")


def test_two_processes_agree_on_a_signal_and_go_on_to_the_same_bits(worlds, pictures, tmp_path):
    flags, code = tiny(pictures, tmp_path, *WORLD_RUN), SIGNAL.replace("NAME", "SIGUSR1")
    statuses, printed = ends(launch(simdino, *flags, world=2, code=code))
    assert statuses == [128 + signal.SIGUSR1] * 2, printed
    assert "".join(printed).count("SIGUSR1: saved ") == 1
    assert 5 <= weights_of(tmp_path)["step"] < 12
    statuses, printed = ends(launch(simdino, *flags, world=2))
    assert statuses == [0, 0], printed
    check_same_bits(tmp_path, worlds[2][0] / "simdino" / "whole")


def test_torchrun_hands_a_signal_on_and_the_run_is_saved(pictures, tmp_path):
    flags = tiny(pictures, tmp_path, "--epochs", 100_000, "--eval_freq", 0)
    (process,) = launch(simdino, *flags, world=2, launcher=True)
    wait_for(tmp_path / "checkpoint0002.pth", process)
    process.send_signal(signal.SIGTERM)
    (status,), (printed,) = ends([process])
    assert status and f"SIGTERM: saved {tmp_path}/checkpoint.pth at step " in printed
    assert f" at step {weights_of(tmp_path)['step']}\n" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems spawn workers")
@parametrize("method", ["fork", "spawn", "forkserver"])
def test_torchruns_sigterm_to_all_processes_saves_and_leaves_none(pictures, tmp_path, method):
    code = f"import multiprocessing; multiprocessing.set_start_method('{method}')"
    flags = tiny(pictures, tmp_path, "--epochs 100_000 --eval_freq 0 --num_workers 2")
    (process,) = launch(simdino, *flags, code=code)
    wait_for(tmp_path / "checkpoint0002.pth", process)
    os.killpg(process.pid, signal.SIGTERM)  # the workers too, and the server of forkserver
    (status,), (printed,) = ends([process])
    assert status == 143 and f"SIGTERM: saved {tmp_path}/checkpoint.pth at step " in printed
    left = [process.pid]
    deadline = time.monotonic() + 30  # workers look after the main process every 5 seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == process.pid and state != "Z":
                    left.append(path)
    assert not left


def test_a_ctrl_c_after_a_signal_ends_at_once():
    with as_before():
        caught = simdino.catch_signals()
        assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
        for number in signal.SIGUSR1, signal.SIGTERM:
            signal.raise_signal(number)
        assert caught == [signal.SIGUSR1, signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@parametrize(
    "seconds, flags, expected",
    [
        (100, "--batch_size 1 --epochs 2", [10, 20, 30, 40, 50, 60]),  # a chunk is 1,000 s
        (3, "--batch_size 10 --group_size 10 --epochs 20", [21, 42, 60]),  # an epoch is 9 s
    ],
)
def test_saved_every_15_minutes_and_after_an_epoch_if_a_minute_has_passed(
    monkeypatch, pictures, tmp_path, seconds, flags, expected
):
    saved, clock, step, save = [], [], simdino.SimDINO.step, simdino.save
    monkeypatch.setattr(simdino, "time", SimpleNamespace(monotonic=lambda: seconds * len(clock)))
    monkeypatch.setattr(simdino.SimDINO, "step", lambda *x, **y: clock.append(1) or step(*x, **y))
    monkeypatch.setattr(simdino, "save", lambda *x: saved.append(x[1]["step"]) or save(*x))
    train(*tiny(pictures, tmp_path, "--eval_freq 0 --saveckp_freq 0", flags))
    assert saved == expected


def test_a_step_of_many_rounds_needs_few_open_files(script, pictures, tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    more = "--batch_size 30 --batch_size_per_gpu 1 --group_size 1 --epochs 2 --eval_freq 0"
    (status,), (printed,) = ends(
        launch(script, *tiny(pictures, tmp_path, more, "--num_workers 1"), code=code)
    )
    assert status == 0, printed


# ----------------------------------------------------------------------- a run is what its flags say


@pytest.fixture(scope="module")
def begun(script, pictures, tmp_path_factory):
    """The folder of a run of 4 steps that may go on."""
    output = tmp_path_factory.mktemp("begun")
    train(*tiny(pictures, output, "--group_size", 4, "--max_steps", 4), script=script)
    return output


@pytest.fixture
def copied(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "out"))


def test_the_same_command_with_another_method_does_not_resume(script, copied, pictures, tmp_path):
    before, flags = files_of(copied), tiny(pictures, copied, "--group_size 4")
    changes = "seed 1, lr 0.1, eps_sq 4.0, gamma 0.5, hidden_dim 16, group_size 2, expa_type 0, "
    changes += "momentum_teacher 0.95, local_crops_number 3, drop_path_rate 0.0, weight_decay 0.1, "
    changes += "arch vit_tiny, patch_size 16, batch_size 16, seed 1 lr 0.1 eps_sq 4.0"
    changes += ", layerwise_decay 0.5, ibot_loss_weight 2.0" * (script is simdinov2)
    for change in changes.split(", "):
        changed = dict(zip(change.split()[::2], change.split()[1::2]))
        options = chain(*((f"--{key}", value) for key, value in changed.items()))
        message = expect_stop(*flags, *options, script=script)
        assert dict(re.findall(r"(\w+) \S+, not ([^;)]+)", message)) == changed, message
        assert "--output_dir" in message and "--resume_anyway" in message
    # As many images, one of another name
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    (other / "train" / "kind0" / "0.png").rename(other / "train" / "kind0" / "new.png")
    message = expect_stop(*tiny(other, copied, "--group_size 4"), script=script)
    assert re.search(r"images_hash \w+, not \w+", message) and files_of(copied) == before
    # Other images of the same names
    other = Path(shutil.copytree(pictures, tmp_path / "same_names"))
    for path in other.glob("train/*/*"):
        path.write_bytes(path.read_bytes() + b"more")
    message = expect_stop(*tiny(other, copied, "--group_size 4"), script=script)
    assert re.search(r"images_hash \w+, not \w+", message) and files_of(copied) == before


def test_what_leaves_the_method_as_it_is_may_differ(script, copied, pictures, tmp_path):
    more = "--group_size 4 --max_steps 5 --epochs 5 --num_workers 1 --saveckp_freq 1 --eval_freq 0 "
    more += "--grad_checkpointing --batch_size 8 --batch_size_per_gpu 4 --amp bf16"
    train(*tiny(shutil.copytree(pictures, tmp_path / "moved"), copied, more), script=script)
    assert weights_of(copied)["step"] == 5


def test_with_resume_anyway_a_run_goes_on_under_new_values(script, copied, pictures):
    more = "--group_size 2 --lr 0.1 --weight_decay_end 0.04"
    more += " --layerwise_decay 0.5" * (script is simdinov2)
    old = weights_of(copied)
    train(*tiny(pictures, copied, more, "--resume_anyway"), script=script)
    check_log(copied, old["log"])
    state, last = weights_of(copied), log_of(copied)[3]
    assert (state["step"], state["args"]["lr"], state["args"]["group_size"]) == (12, 0.1, 2)
    peak = 0.1 * (8 / 256 if script is simdino else math.sqrt(8 / 1024))
    lr = [1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * i / 9)) / 2 for i in (6, 7, 8)]
    assert (last["train_lr"], last["train_wd"]) == (pytest.approx(np.mean(lr)), pytest.approx(0.04))
    rates = [group["lr"] / lr[-1] for group in state["optimizer"]["param_groups"]]
    assert min(rates) == pytest.approx(1 if script is simdino else 0.2 * 0.5**5)
    train(*tiny(pictures, copied, more), script=script)


def test_with_resume_anyway_a_run_goes_on_without_deleted_images(script, pictures, tmp_path):
    data, output = Path(shutil.copytree(pictures, tmp_path / "data")), tmp_path / "out"
    flags = tiny(data, output, "--eval_freq 0 --batch_size 10 --batch_size_per_gpu 10")
    train(*flags, "--max_steps", 5, script=script)
    old = weights_of(output)["log"]
    for kind in "kind0", "kind2":
        (data / "train" / kind / "0.png").unlink()
    assert "images" in expect_stop(*flags, script=script)
    train(*flags, "--resume_anyway", script=script)
    check_log(output, old)
    state = weights_of(output)
    # 28 images are 2 steps an epoch: of the second epoch's two steps that were done, one counts
    assert (state["step"], state["epoch"], state["metrics"]) == (8, 4, [])
    train(*flags, "--epochs", 5, script=script)
    assert weights_of(output)["step"] == 10


def test_checkpoints_that_cannot_be_read_are_left_as_they_are(script, finished, pictures, tmp_path):
    path, good = tmp_path / "checkpoint.pth", (finished[0] / "checkpoint.pth").read_bytes()
    less = weights_of(finished[0])
    del less["student"]["backbone.cls_token"]
    contents = [b"", b"junk", good[: len(good) // 2], good[:-10]]
    for state in {"student": Code(tmp_path / "mark")}, [1, 2], less:
        torch.save(state, tmp_path / "other")
        contents.append((tmp_path / "other").read_bytes())
    errors = pickle.UnpicklingError, EOFError, RuntimeError, TypeError, KeyError, struct.error
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(errors):
            train(*tiny(pictures, tmp_path), script=script)
        assert path.read_bytes() == content and not (tmp_path / "mark").exists()


# ----------------------------------------------------------------------------- when things go wrong


def test_what_is_not_finite_ends_the_run_and_is_not_saved(script, copied, pictures, monkeypatch):
    before, augment, step = files_of(copied), script.augment, script.SimDINO.step
    small = partial(torch.amp.GradScaler, init_scale=1.0)  # instead of 16 steps down from 65,536
    flags = tiny(pictures, copied, "--group_size 4")
    other = tiny(pictures, copied, "--group_size 4 --amp fp16 --coeff 1e9 --resume_anyway")

    def step_to_infinity(self, *arguments, **values):
        results = step(self, *arguments, **values)
        state = self.optimizer.state[self.params[-1]]
        state["exp_avg_sq"].view(-1)[0] = math.inf  # the loss does not show it
        return results

    for place, name, value, flags_of_run in (
        (torch.amp, "GradScaler", small, other),
        (script, "augment", lambda views: [x + math.nan for x in augment(views)], flags),
        (script.SimDINO, "step", step_to_infinity, flags),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            message = expect_stop(*flags_of_run, script=script)
        assert message == "not finite: try --amp off, or --resume_anyway and a lower --lr"
        assert files_of(copied) == before


@pytest.mark.filterwarnings("ignore:another image takes its place")
def test_folders_that_cannot_be_used_are_named(capsys, pictures, tmp_path, monkeypatch):
    data, flags = tmp_path / "data", tiny(tmp_path / "data", tmp_path / "out")
    assert expect_stop(*flags) == f"there is no folder {data}"
    data.mkdir()
    assert expect_stop(*flags) == f"0 images in {data}: a step takes --batch_size 8"
    for i in range(20):
        (data / f"{i}.jpg").write_bytes(b"rubbish")
    with pytest.raises(OSError, match=f"none of 1000 images in {data} can be read"):
        train(*flags)
    shutil.copytree(pictures, data, dirs_exist_ok=True)
    for path in (data / "val").rglob("*.*"):
        path.write_bytes(b"rubbish")
    with pytest.raises(OSError, match=f"none of 1000 images in {data / 'val'} can be read"):
        train(*flags)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "train").symlink_to("nowhere")
    assert expect_stop(*tiny(tmp_path / "link", tmp_path / "out")).endswith("link/train")
    for output in data / "0.jpg", data / "0.jpg" / "below":
        with pytest.raises(OSError, match=str(output)):
            train(*tiny(pictures, output))
    closed, scandir = str(pictures / "train" / "kind2"), os.scandir

    def guarded(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match=f"Permission denied: '{closed}'"):
        train(*tiny(pictures, tmp_path / "out"))
    assert "loss" not in capsys.readouterr().out
    assert files_of(tmp_path / "out").keys() == set()


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(script, copied, pictures):
    """The limit on a file's size makes a write fail half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    before, flags = files_of(copied), tiny(pictures, copied, "--group_size", 4, "--max_steps", 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            train(*flags, script=script)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) + str(error.value.__context__)
    assert files_of(copied) == before
    train(*flags, script=script)
    assert weights_of(copied)["step"] == 5


def test_a_run_without_stdout_and_stderr_saves_at_a_signal(pictures, tmp_path):
    code = f"import os, simdino as script\n{SIGNAL.replace('NAME', 'SIGTERM')}\nscript.main()"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    flags = tiny(pictures, tmp_path, "--num_workers 1")
    run = subprocess.run([*command, *flags], check=False, cwd=FOLDER, timeout=300)
    assert run.returncode == 143 and 5 <= weights_of(tmp_path)["step"] < 12


@parametrize("kind", ["terminal", "pipe, then a signal"])
def test_a_pipe_or_terminal_that_closes_does_not_end_the_run(pictures, tmp_path, kind):
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    code = SIGNAL.replace("NAME", "SIGINT") if "signal" in kind else "pass"
    (process,) = launch(simdino, *tiny(pictures, tmp_path), code=code, stdout=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    try:
        # 120: Python could not write the warning of the unreadable image to the closed terminal
        assert process.wait(300) in ((130,) if "signal" in kind else (0, 120))
    finally:
        process.kill()
    assert 5 <= weights_of(tmp_path)["step"] <= 12


class Written:
    """What a notebook or a logger puts in the place of sys.stdout: it can be written to."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@parametrize("stdout", [None, Written()])
def test_a_script_runs_as_in_a_notebook(script, monkeypatch, pictures, tmp_path, stdout):
    monkeypatch.setattr(sys, "argv", [script.__file__, *tiny(pictures, tmp_path, "--max_steps 1")])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("RANK", "1")  # left over from another run
    registered = []
    monkeypatch.setattr(atexit, "register", lambda *x: registered.append(x))
    with as_before():
        runpy.run_path(script.__file__, run_name="elsewhere")["main"]()
    assert os._exit not in [x[0] for x in registered], "a notebook's own handlers would not run"
    assert weights_of(tmp_path)["step"] == 1 and (not stdout or "step 1/1 " in stdout.text)


FAULTS = {  # arguments of fault; words of the reason; workers
    "a worker can read no image": ("1, script, 'load_image', 20, OSError('gone')", "gone", 1),
    "a worker is killed": ("1, script, 'load_image', 20, 9", "DataLoader worker .pid", 1),
    "a file cannot be written": ("0, script.torch, 'save', 1, OSError('full')", "full", 0),
    "a folder is closed": ("1, script, 'find_images', 0, OSError('closed')", "closed", 0),
    "other images are found": ("1, script.hashlib, 'sha256', 0, None", "find different images", 0),
    "a step raises": ("1, script.SimDINO, 'step', 1, ValueError('no step')", "no step", 0),
    "k-NN raises": ("1, script, 'knn_accuracy', 1, ValueError('no k-NN')", "no k-NN", 0),
    "a process is killed": ("1, script, 'knn_accuracy', 1, 9", "", 0),
}


BREAK = """
def fault(process, place, name, after, error):
    # On this process the function fails from its call number after on
    function, calls = getattr(place, name), []
    def broken(*arguments, **options):
        calls.append(1)
        if script.PROCESS != process or len(calls) <= after:
            return function(*arguments, **options)
        if error == 9:
            os.kill(os.getpid(), 9)
        if error:
            raise error
        return function(b"other images")  # of hashlib.sha256
    setattr(place, name, broken)
"""


@parametrize("fault", FAULTS)
def test_what_ends_one_process_ends_all_and_damages_nothing(pictures, tmp_path, fault):
    """No launcher is there to kill the others: each ends by itself."""
    arguments, words, workers = FAULTS[fault]
    flags = tiny(pictures, tmp_path, "--eval_freq 1 --batch_size 8 --num_workers", workers)
    statuses, printed = ends(launch(simdino, *flags, world=2, code=f"{BREAK}fault({arguments})"))
    assert all(statuses) and re.search(words, "".join(printed)), printed
    names = files_of(tmp_path).keys()
    assert names <= {"log.txt", "checkpoint.pth", "checkpoint0000.pth"}
    assert "checkpoint.pth" not in names or weights_of(tmp_path)["step"] == 3


# ------------------------------------------------------------------- training from existing weights


def begin(monkeypatch, script, path, *flags):
    """A model as wide and deep as weights() are, which load_pretrained has filled."""
    shape = {"embed_dim": 128, "depth": 4, "num_heads": 2}
    monkeypatch.setitem(script.ARCHS, "vit_nano", shape)
    model = build(script, "--hidden_dim", 16, *flags)
    script.load_pretrained(path, model)
    return model


@parametrize(
    "kind, script, head",
    [("ours, v1", simdino, True), ("DINO, with prototypes", simdino, True)]
    + [("official v1, flat", simdino, False), ("timm's classifier", simdino, False)]
    + [("ours, v2", simdinov2, True), ("official v2, flat", simdinov2, False)],
)
def test_training_starts_from_weights(tmp_path, monkeypatch, capsys, kind, script, head):
    path, saved = tmp_path / "w.pth", checkpoint(kind)
    torch.save(saved, path)
    model = begin(monkeypatch, script, path)
    assert f"starts from {path}: backbone{' and head' * head}\n" in capsys.readouterr().out
    student = dict(model.student.state_dict())
    assert same(student, dict(model.teacher.state_dict()))
    stored = weights(1 if script is simdino else 2)
    expected = prefixed("backbone.", stored)
    for name in ("backbone.mask_token", "backbone.register_tokens"):
        if name in student:
            expected.setdefault(name, student[name])
    heads = saved["teacher"] if head else build(script, "--hidden_dim", 16).student.state_dict()
    for name in (name for name in heads if "head.mlp." in name):
        expected[name.removeprefix("module.")] = heads[name]
    assert all(torch.equal(student[name], expected[name]) for name in student)

    # Another head starts anew, and positions of another grid are interpolated
    model = begin(monkeypatch, script, path, "--hidden_dim", 24, "--global_crops_size", 48)
    assert f"starts from {path}: backbone\n" in capsys.readouterr().out
    cls, grid = stored["pos_embed"].split([1, 16], dim=1)
    grid = grid.unflatten(1, (4, 4)).movedim(3, 1)
    grid = TF.resize(grid, [6, 6], TF.InterpolationMode.BICUBIC, antialias=True).flatten(2).mT
    torch.testing.assert_close(model.student.backbone.pos_embed, torch.cat([cls, grid], dim=1))


@parametrize("kind, script", [("ours, v2", simdino), ("official v2, chunked", simdinov2)])
def test_weights_of_another_model_are_refused_with_their_names(tmp_path, monkeypatch, kind, script):
    torch.save(checkpoint(kind), tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        begin(monkeypatch, script, tmp_path / "w.pth")


def test_training_starts_from_timm_with_its_features(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=112).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    flags = "--arch vit_tiny --patch_size 16 --global_crops_size 112 --local_crops_size 32"
    model = build(simdino, *flags.split())
    simdino.load_pretrained(tmp_path / "timm.pth", model)
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(model.teacher.backbone(x), expected, rtol=1e-4, atol=1e-4)


def test_a_run_from_weights_resumes_without_them(script, finished, pictures, tmp_path, capsys):
    first, flags = finished[0] / "checkpoint.pth", tiny(pictures, tmp_path, "--lr", 1e-12)
    train(*flags, "--pretrained_weights", first, "--max_steps", 1, script=script)
    assert f"starts from {first}: backbone and head\n" in capsys.readouterr().out
    for name, x in weights_of(tmp_path)["student"].items():
        torch.testing.assert_close(x, weights_of(finished[0])["teacher"][name])
    for steps, more in (2, ["--pretrained_weights", first]), (3, []):
        train(*flags, "--max_steps", steps, *more, script=script)
        printed = capsys.readouterr().out
        assert f"saved at step {steps - 1}\n" in printed and "starts from" not in printed


OTHER = """
load = script.torch.load
def other(path, **options):
    state = load(path, **options)
    for x in state["teacher"].values() if script.PROCESS else []:
        x += 1
    return state
script.torch.load = other
def step(self, *_, **values):
    print("weights", *(sum(p.double().sum() for p in x.parameters()).item()
        for x in (self.student, self.teacher)), flush=True)
    os._exit(0)
script.SimDINO.step = step
"""


def test_two_processes_start_from_the_first_ones_weights(pictures, tmp_path):
    path, state = tmp_path / "w.pth", build(simdino).teacher.state_dict()
    torch.save({"teacher": state}, path)
    more = f"--pretrained_weights {path} --eval_freq 0 --batch_size 8 --group_size 8"
    flags = tiny(pictures, tmp_path / "out", more)
    statuses, printed = ends(launch(simdino, *flags, world=2, code=OTHER))
    expected = sum(x.double().sum() for x in state.values()).item()
    sums = [float(x) for text in printed for x in re.search("weights (.*)", text)[1].split()]
    assert statuses == [0, 0] and sums == [expected] * 4


# ------------------------------------------------------------------------ evaluation: the weights


def weights(version, width=128):
    """A backbone's weights by our names, the same on any machine: patch 8, grid of 4 x 4."""
    v2 = version == 2
    tensors = eval_linear.VisionTransformer(4, 8, width, 4, 2, 4 if v2 else None, v2).state_dict()
    for i, name in enumerate(sorted(tensors)):
        n = torch.arange(1, tensors[name].numel() + 1, dtype=torch.float64).view_as(tensors[name])
        tensor = (0.5 if n.ndim == 1 else 0.2) * torch.sin(n * n * 0.01 + i)
        tensors[name] = (tensor + bool(re.search(r"norm\d?\.weight", name))).float()
    return dict(tensors)


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def chunked(tensors):
    """As FSDP's chunks of 2 blocks name them: blocks.1.3.norm1.weight."""
    new = lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}"
    return {re.sub(r"blocks\.(\d)", new, name): tensor for name, tensor in tensors.items()}


def checkpoint(kind):
    v1, v2, mask = weights(1), weights(2), {"mask_token": torch.ones(1, 128)}
    head = simdino.ProjectionHead(128, 16).state_dict()
    other = {name: 0 * x for name, x in v1.items()}
    official = prefixed("module.backbone.", v1) | prefixed("module.head.", head)
    ours = prefixed("backbone.", v1) | prefixed("head.", head)
    ours_v2 = prefixed("backbone.", v2 | mask) | prefixed("head.", head)
    official_v2 = prefixed("backbone.", chunked(v2) | mask) | prefixed("dino_head.", head)
    arguments = argparse.Namespace(arch="vit_base", lr=0.1)
    optimizer = {"param_groups": [{"lr": np.float64(0.1)}], "state": {0: {"exp_avg": mask}}}
    pair = prefixed("student_backbone.vit.", other) | prefixed("teacher_backbone.vit.", v1)
    return {
        "ours, v1": {"student": prefixed("backbone.", other), "teacher": ours, "step": 3},
        "ours, v2": {"student": {}, "teacher": ours_v2, "step": 3, "args": {"arch": "vit_x"}},
        "official v1, with its arguments": {
            "teacher": official,
            "optimizer": optimizer,
            "args": arguments,
        },
        "DINO, with prototypes": {
            "teacher": official | {"module.head.last_layer.weight_v": torch.ones(9, 256)}
        },
        "official v1, flat": v1,
        "official v1, compiled": prefixed("_orig_mod.", v1),
        "of Lightning": {"state_dict": prefixed("teacher.backbone.", v1), "lr_schedulers": []},
        "of two backbones": pair,
        "nested": {"student": {"backbone": other}, "teacher": {"backbone": v1}},
        "of DeiT and MAE": {"model": v1, "epoch": 3},
        "official v2, chunked": {"teacher": official_v2},
        "official v2, flat": v2 | mask,
        "timm's v2": {name.replace("register_tokens", "reg_token"): x for name, x in v2.items()}
        | {"pos_embed": v2["pos_embed"][:, 1:]},
        "timm's classifier": v1 | {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)},
    }[kind]


@parametrize(
    "kind, version, left_out",
    [(kind, 1, []) for kind in ("ours, v1", "official v1, with its arguments", "official v1, flat")]
    + [(kind, 1, []) for kind in ("official v1, compiled", "of Lightning", "of two backbones")]
    + [("nested", 1, []), ("of DeiT and MAE", 1, []), ("ours, v2", 2, ["mask_token"])]
    + [(kind, 2, ["mask_token"]) for kind in ("official v2, chunked", "official v2, flat")]
    + [("timm's classifier", 1, ["head.bias", "head.weight"])],
)
def test_weights_of_every_format_give_the_official_features(tmp_path, kind, version, left_out):
    torch.save(checkpoint(kind), tmp_path / "weights.pth")
    model, dropped = eval_linear.load_backbone(tmp_path / "weights.pth", num_heads=2)
    assert sorted(dropped) == left_out
    expected = {  # official: CLS of the last 4 blocks and mean patch of the last, in float64
        (1, 32): -3.0275591342386177,
        (1, 48): 1.681385036146514,  # positions interpolated as in DINO
        (2, 32): 16.930229918759338,
        (2, 48): 26.813735525931996,  # positions interpolated with antialiasing
    }
    for size in (32, 48):
        n = torch.arange(2 * 3 * size * size).view(2, 3, size, size)
        features = eval_linear.encode(model, (n * n * 7 % 251).byte())
        assert features.shape == (2, 5, 128)
        assert fingerprint(features.double()) == pytest.approx(expected[version, size], abs=1e-3)


@parametrize("script", [simdino, simdinov2])
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


@parametrize(
    "name, size",
    [("vit_tiny_patch16_224", 224)]
    + [(f"vit_small_patch14{x}_dinov2", 112) for x in ("", "_reg4")],
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


def refused(error, path, *arguments):
    """-> the message with which load_backbone refuses path, which stays as it is."""
    before = path.read_bytes()
    with pytest.raises(error) as end:
        eval_linear.load_backbone(path, *arguments)
    assert path.read_bytes() == before
    return str(end.value)


SWIGLU = {k.replace("fc1", "w12"): x for k, x in weights(1, 192).items()}
NO_POSITIONS = {k: x for k, x in weights(2, 96).items() if k != "pos_embed"}  # as DINOv3


@parametrize(
    "content, arguments, error, named",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", (), SystemExit, "no file of weights"),
        ({"teacher": Code("mark")}, (), SystemExit, "code, posix.system"),
        ({"state_dict": {}, "path": Path("x")}, (), SystemExit, "['state_dict'], 'new.pth')"),
        ([1, 2], (), SystemExit, "no patch_embed.proj.weight, but []"),
        ({"embeddings.0": torch.ones(1)}, (), SystemExit, "but ['embeddings.0']"),  # Hugging Face
        ({"net": weights(1, 96)}, ("ema",), SystemExit, "--checkpoint_key ema finds 0 models"),
        ({"ema": weights(1, 96), "net": weights(1, 96)}, (), SystemExit, "under ['ema.', 'net.']"),
        (SWIGLU, (), RuntimeError, 'Missing key(s) in state_dict: "blocks.0.mlp.fc1.weight"'),
        (weights(1, 96) | {"fc_norm.weight": torch.ones(96)}, (), RuntimeError, "fc_norm.weight"),
        (weights(1, 96) | {"cls_token": torch.ones(1, 2, 96)}, (), RuntimeError, "cls_token"),
        (weights(1, 96) | {"pos_embed": torch.ones(1, 33, 96)}, (), RuntimeError, "pos_embed"),
        (NO_POSITIONS, (), RuntimeError, "pos_embed"),
        (weights(1, 160), (), SystemExit, "--num_heads, a divisor of the width, 160"),
        (weights(1, 96), ("teacher", 7), SystemExit, "--num_heads"),
    ],
)
def test_other_files_are_refused_with_what_they_have(
    tmp_path, monkeypatch, content, arguments, error, named
):
    monkeypatch.chdir(tmp_path)
    path = Path("w.pth")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert named in refused(error, path, *arguments)
    assert not Path("mark").exists()


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(weights(1, 96), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-1000])
    refused(RuntimeError, tmp_path / "w.pth")


def test_one_of_several_weights_and_the_number_of_heads_may_be_chosen(tmp_path):
    zeros = {name: 0 * x for name, x in weights(1, 384).items()}
    content = {"ema": weights(1, 384), "net": {"backbone": zeros}}
    content |= {"state_dict": weights(1, 96), "state_dict_ema": weights(1, 192)}
    torch.save(content, tmp_path / "w.pth")

    def chosen(*arguments):
        return eval_linear.load_backbone(tmp_path / "w.pth", *arguments)[0]

    assert chosen("ema").norm.weight.any() and chosen("ema").blocks[0].attn.num_heads == 6
    assert not chosen("net.backbone").norm.weight.any()
    assert chosen("backbone", 8).blocks[0].attn.num_heads == 8
    assert chosen("state_dict").width == 96, "a whole name comes first"
    assert chosen("state_dict_ema").width == 192


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_are_read_by_their_package(tmp_path, monkeypatch, dtype):
    package = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    tensors = {name: x.to(dtype) for name, x in weights(2, 96).items()}
    package.save_file(prefixed("teacher.", tensors) | {"queue.at": torch.arange(3)}, path)
    model, _ = eval_linear.load_backbone(path)
    assert torch.equal(model.norm.bias, tensors["norm.bias"].float())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "safetensors" in refused(ModuleNotFoundError, path)


# ------------------------------------------------------------------------- evaluation: a fixture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/ and val/ of 3 kinds; val's kind0 and kind1 change places; two files are damaged, two
    have no label."""
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
        shutil.copy(folder / "00.png", root / split / "none.png")
    (root / "train" / "kind1" / "04.png").write_bytes(b"not an image")
    (root / "val" / "kind2" / "03.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"teacher": weights(2, 96)}, path)
    flags = f"--weights {path} --data_path {data} --num_workers 0 --batch_size 16 --epochs 4"
    return [*shlex.split(flags), "--seed", "3"]


def evaluate(*flags):
    """eval_linear.main() with these flags, in this process; -> what it printed."""
    with redirect_stdout(StringIO()) as printed:
        train(*flags, script=eval_linear)
    return printed.getvalue()


stopped = partial(expect_stop, script=eval_linear)


def results_of(folder):
    """The last line of results, and the classifier. The state of the probe is gone."""
    assert not [*folder.glob("probe-*.pth")]
    lines = (folder / "results.jsonl").read_text().splitlines()
    results = json.loads(lines[-1], parse_constant=pytest.fail)
    return results, torch.load(folder / "classifier.pth", weights_only=True)


def predictions_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- evaluation: k-NN


@parametrize("k", [1, 10, 20, 150])
def test_knn_is_that_of_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    labels = torch.arange(150) % 5
    bank = torch.randn(150, 8) + F.one_hot(labels, 8)
    z = 3 * torch.randn(300, 8)
    predictions, nearest = eval_linear.knn(bank, labels, z, (k, 1000))
    assert sorted(predictions) == sorted({k, 150})
    cosines = F.normalize(z, dim=1) @ F.normalize(bank, dim=1).T
    torch.testing.assert_close(nearest, cosines.amax(1))
    votes = lambda distance: np.exp((1 - distance**2 / 2) / 0.07)  # |a - b|² = 2 - 2 cos
    judge = neighbors.KNeighborsClassifier(k, weights=votes, algorithm="brute")
    judge.fit(F.normalize(bank, dim=1).numpy(), labels.numpy())
    expected = judge.predict(F.normalize(z, dim=1).numpy())
    assert np.array_equal(predictions[k], expected) and len(set(expected)) == 5


def test_accuracies_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 4, 4, 5]).repeat(20)  # no 2, no 3
    predicted = torch.where(torch.rand(140) < 0.5, labels, torch.randint(8, (140,)))
    figures = eval_linear.accuracies(predicted, labels)
    assert figures["top1"] == pytest.approx(100 * metrics.accuracy_score(labels, predicted))
    with pytest.warns(UserWarning, match="classes not in y_true"):
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert figures["class_mean"] == pytest.approx(100 * balanced)


def test_knn_is_the_figure_of_the_training_run(finished, pictures, tmp_path):
    folder, _ = finished
    path = folder / "checkpoint.pth"
    evaluate("--weights", path, "--data_path", pictures, "--epochs", 0, "--output_dir", tmp_path)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["knn"]["20"]["top1"] == pytest.approx(log_of(folder)[-1]["knn"])
    assert json.loads(line)["options"]["crop_size"] == 32


# ----------------------------------------------------------------------- evaluation: the probe


@pytest.fixture(scope="module", params=["cached", "crops"])
def evaluated(request, base, tmp_path_factory):
    """Flags of a run never interrupted, its folder and what it printed."""
    flags = [*base, "--cached"] if request.param == "cached" else base
    output = tmp_path_factory.mktemp("evaluated")
    with pytest.warns(UserWarning, match="cannot read"):
        return flags, output, evaluate(*flags, "--output_dir", output)


def test_the_probe_learns_and_is_chosen_on_held_out_images_not_on_val(evaluated, base, data):
    _, output, printed = evaluated
    results, classifier = results_of(output)
    probe = results["probe"]
    best = probe["held_out"][probe["best"]]
    assert len(probe["held_out"]) == 52 and best["top1"] > 80
    # Two kinds change places in val: who knows them best does worst there.
    assert probe["top1"] < 50 and probe["top5"] == 100
    assert set(results["knn"]) == {"10", "20", "89"} and results["knn"]["10"]["top1"] < 50
    assert results["weights"] == base[1] and results["judged"] == f"{data}/val"
    assert results["images"] == {"train": 89, "val": 23} and results["copies"] == 0
    assert results["options"]["cached"] is ("--cached" in evaluated[0])
    assert "2 of 91 images" in printed and "2 of 25 images" in printed
    assert probe["best"] in printed and f"top1 {probe['top1']:.2f} %" in printed

    # predictions.csv has the same figures in it
    lines = predictions_of(output)
    assert len(lines) == 23 and list(lines[0]) == ["name", "class", "knn", "probe"]
    for judge, figures in ("knn", results["knn"]["20"]), ("probe", probe):
        right = [line["class"] == line[judge] for line in lines]
        assert figures["top1"] == pytest.approx(100 * np.mean(right))
        means = [np.mean(right[i : i + 8]) for i in (0, 8, 16)]
        assert figures["class_mean"] == pytest.approx(100 * np.mean(means))

    # The classifier, used as the README says
    model, _ = eval_linear.load_backbone(base[1])
    assert classifier["classes"] == ["kind0", "kind1", "kind2"]
    for line in lines:
        image = eval_linear.load_image(data / "val" / line["name"])
        images = eval_linear.center_crop(image, 32)[None]
        scope = {"encode": eval_linear.encode, "model": model, "images": images}
        scores = eval(classifier["features"], scope) @ classifier["weight"].T + classifier["bias"]
        assert classifier["classes"][scores.argmax()] == line["probe"]
        assert line["class"] == Path(line["name"]).parts[0]


@parametrize("trained_on", [45, 89])  # 44 of 89 images are held out; then it is trained on all
def test_a_probe_that_is_killed_goes_on_to_the_same_bits(evaluated, tmp_path, trained_on):
    flags, output, _ = evaluated
    flags = [*flags, "--output_dir", tmp_path]
    path = tmp_path / f"probe-{results_of(output)[0]['id']}-{trained_on}.pth"
    processes = launch(eval_linear, *flags)
    wait_for(path, processes[0])
    processes[0].kill()
    ends(processes)
    assert not (tmp_path / "results.jsonl").exists()
    epochs = torch.load(path, weights_only=True)["epoch"]
    assert f"resumed {path}: {epochs} epochs are done" in evaluate(*flags)
    results, classifier = results_of(tmp_path)
    alone, expected = results_of(output)
    assert same(classifier, expected) and results["probe"] == alone["probe"]
    assert files_of(tmp_path)["predictions.csv"] == files_of(output)["predictions.csv"]


def test_a_probe_of_other_options_begins_anew_and_results_stand_beside_each_other(
    base, monkeypatch, tmp_path
):
    def full(*_):
        raise OSError(28, "No space left on device")

    flags = [*base, "--cached", "--output_dir", tmp_path]
    monkeypatch.setattr(eval_linear, "write_predictions", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(*flags)
    states = {path.name for path in tmp_path.glob("probe-*.pth")}
    assert len(states) == 2 and not (tmp_path / "results.jsonl").exists()
    monkeypatch.undo()
    evaluate(*flags, "--epochs", 0)
    assert "resumed" not in evaluate(*flags, "--batch_size", 8)
    assert {path.name for path in tmp_path.glob("probe-*.pth")} == states
    assert evaluate(*flags).count("4 epochs are done") == 2
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["options"]["batch_size"] for line in lines] == [16, 8, 16]
    assert ["probe" in line for line in lines] == [False, True, True]
    # Nothing half written stays where a disk is full
    before = files_of(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(*flags)
    assert files_of(tmp_path) == before
    monkeypatch.undo()
    evaluate(*flags, "--epochs", 0)
    assert list(predictions_of(tmp_path)[0]) == ["name", "class", "knn"]


@parametrize("evaluated", ["crops"], indirect=True)
def test_two_processes_judge_as_one(evaluated, tmp_path):
    flags, output, _ = evaluated
    statuses, printed = ends(launch(eval_linear, *flags, "--output_dir", tmp_path, world=2))
    assert statuses == [0, 0], printed
    (results, classifier), (alone, expected) = results_of(tmp_path), results_of(output)
    assert results["knn"] == alone["knn"] and results["probe"]["best"] == alone["probe"]["best"]
    torch.testing.assert_close(classifier["weight"], expected["weight"], rtol=1e-3, atol=1e-4)
    assert predictions_of(tmp_path) == predictions_of(output)


OTHER_WEIGHTS = """
if script.PROCESS == 1:
    sys.argv[sys.argv.index("--weights") + 1] += ".other"
"""


@parametrize("flags", [["--epochs", 0], ["--embed", "x.npz"]])
def test_processes_that_find_different_weights_end(base, tmp_path, flags):
    torch.save({"teacher": weights(2, 96) | {"norm.bias": torch.ones(96)}}, base[1] + ".other")
    flags = [*base, "--output_dir", tmp_path / "out", *flags]
    statuses, printed = ends(launch(eval_linear, *flags, world=2, code=OTHER_WEIGHTS))
    assert 0 not in statuses and "different weights or images" in "".join(printed), printed
    assert not (tmp_path / "out").exists()


def features_of(n, per_class, seed=0, scale=1.0):
    """As extract gives them: n classes whose means are close together, for linear_probe."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n * per_class) % n
    means = np.random.default_rng(99).normal(0, 0.5, (n, 1, 16))
    features = scale * (means[labels] + rng.normal(0, 1, (n * per_class, 5, 16)))
    return SimpleNamespace(
        root="val",
        names=labels.astype(str),
        labels=torch.from_numpy(labels),
        features=torch.from_numpy(features).float(),
    )


MODEL = SimpleNamespace(blocks=range(4), width=16, cls_token=torch.zeros(1))


def probe_of(train, val, output, **options):
    values = {"seed": 3, "epochs": 100, "batch_size": 256, "cached": True, "output_dir": output}
    args = SimpleNamespace(**(values | options))
    classes = sorted(set(val.names))
    return eval_linear.linear_probe(train, val, classes, args, MODEL, {"id": args.seed})


def test_candidates_side_by_side_train_as_each_would_alone(tmp_path):
    # The reference: torch.optim.SGD with a rate for each classifier, and CosineAnnealingLR.
    train = features_of(3, 27)
    args = SimpleNamespace(seed=3, epochs=4, batch_size=16, output_dir=tmp_path)
    probe = eval_linear.Probe(MODEL, 3)
    batches = partial(eval_linear.cached_batches, train, np.arange(80))
    rates = [rate for _, rate in eval_linear.CANDIDATES]
    steps = [np.array(items) % 80 for items in eval_linear.items_of_steps(80, args, 0)]
    assert [sorted(np.concatenate(steps[i : i + 5])) for i in (0, 15)] == [[*range(80)]] * 2
    eval_linear.fit(probe, rates, batches, 80, args, {"id": 0})
    torch.manual_seed(3)
    for number, (kind, rate) in enumerate(eval_linear.CANDIDATES):
        head = copy.deepcopy(probe.heads[number])
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        initial = head.weight.detach().clone()
        optimizer = torch.optim.SGD(head.parameters(), lr=rate / 16, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        rows = {"1 block": [3], "1 block + patches": [3, 4], "4 blocks": [0, 1, 2, 3]}
        seen = train.features[:, rows.get(kind, [0, 1, 2, 3, 4])].flatten(1)
        for index in steps:
            optimizer.zero_grad()
            F.cross_entropy(head(seen[index]), train.labels[index]).backward()
            optimizer.step()
            schedule.step()
        moved = (head.weight - initial).norm()
        assert moved > 0 and (probe.heads[number].weight - head.weight).norm() < 1e-3 * moved


def test_what_is_held_out_is_a_tenth_or_more_of_few_and_never_the_last_of_a_class():
    for n, fewest, expected in (5000, 100, 500), (300_000, 100, 10_000), (400, 100, 100):
        held, part = eval_linear.hold_out(np.arange(n) % 10, fewest, 0)
        assert len(held) == expected and sorted([*held, *part]) == [*range(n)]
    assert len(eval_linear.hold_out(np.arange(120) % 10, 100, 0)[0]) == 60
    assert len(eval_linear.hold_out(np.zeros(24), 10, 0)[0]) == 10
    labels = np.arange(100) % 10
    labels[:60] = 10 + np.arange(60)  # alone in their classes
    held, part = eval_linear.hold_out(labels, 100, 0)
    assert len(held) == 30 and set(labels[part]) == set(labels)
    with pytest.raises(SystemExit, match="38 images are too few"):
        eval_linear.hold_out(np.arange(38) % 2, 100, 0)
    assert len(eval_linear.hold_out(np.arange(40) % 2, 100, 0)[0]) == 20


def test_the_best_candidate_has_the_best_median_with_its_neighbours():
    top1 = np.full((4, 13), 20.0)
    top1[1, 4] = 60  # by chance
    top1[2, 6:9] = 40
    assert eval_linear.choose(top1.flatten().tolist()) == 2 * 13 + 6
    top1[3, 9:] = 30, 45, 46, 1  # where the largest rate diverges
    assert eval_linear.choose(top1.flatten().tolist()) == 3 * 13 + 11
    top1[0, 11:] = 50, 55
    assert eval_linear.choose(top1.flatten().tolist()) == 12


def test_few_images_give_a_probe_as_good_as_scikit_learns(tmp_path, capsys):
    linear_model = pytest.importorskip("sklearn.linear_model")
    val = features_of(5, 200, 7, 3)
    ours = []
    theirs = []
    for seed in range(3):
        train = features_of(5, 12, seed, 3)
        ours.append(probe_of(train, val, tmp_path, seed=seed, epochs=60)[0]["top1"])
        judge = linear_model.LogisticRegression(max_iter=1000)
        judge.fit(train.features[:, -2].numpy(), train.labels.numpy())
        theirs.append(100 * judge.score(val.features[:, -2].numpy(), val.labels.numpy()))
    assert np.mean(ours) > np.mean(theirs) - 3 and np.mean(theirs) > 40


@parametrize("scale, epochs, end", [(3.0, 30, None), (0.02, 100, "lr 0.1"), (0.02, 3, "lr 1e-05")])
def test_a_probe_that_learned_too_little_is_named(tmp_path, capsys, scale, epochs, end):
    train = features_of(5, 100, 0, scale)
    figures, _ = probe_of(train, features_of(5, 40, 7, scale), tmp_path, epochs=epochs)
    assert end is None or figures["best"].endswith(end)
    printed = capsys.readouterr().out
    assert ("other --epochs" in printed) == bool(end)
    assert (f"few steps for the classifiers, {epochs}" in printed) == (epochs < 100)


def test_images_that_train_holds_too_are_counted(base, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for kind in range(3):
        path = tmp_path / "data" / "train" / f"kind{kind}" / "09.png"
        shutil.copy(path, tmp_path / "data" / "val" / f"kind{kind}" / "copy.png")
    Image.open(path).transpose(0).save(path.parent / "mirrored.png")  # is no copy
    flags = ["--data_path", tmp_path / "data", "--epochs", 0, "--output_dir", tmp_path / "out"]
    printed = evaluate(*base, *flags)
    assert "3 of 26 images to judge on have the features of a training image" in printed
    assert '"copies": 3,' in (tmp_path / "out" / "results.jsonl").read_text()


def test_progress_is_shown_once_a_minute_and_on_a_terminal_often(monkeypatch, capsys):
    clock = []
    monkeypatch.setattr(eval_linear, "time", SimpleNamespace(monotonic=lambda: 7 * len(clock)))
    for _ in eval_linear.progress(range(20), 20, "masks"):
        clock.append(1)
    assert capsys.readouterr().out == "masks 9/20 ETA 0:01:17\nmasks 18/20 ETA 0:00:14\n"
    monkeypatch.setattr(os, "isatty", lambda _: True)
    assert [*eval_linear.progress("ab", 2, "masks")] == ["a", "b"]


def test_pixels_are_normalised_as_the_weights_expect(base, tmp_path, monkeypatch):
    seen = []
    encode = eval_linear.encode
    monkeypatch.setattr(eval_linear, "encode", lambda *x: seen.append(x) or encode(*x))
    more = ["--epochs", 0, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.5, 0.5]
    evaluate(*base, *more, "--output_dir", tmp_path)
    (model, x), *_ = seen
    expected = (x / 255 - 0.5) / torch.tensor([0.25, 0.5, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(model.normalize(x), expected)


@parametrize("side, patch, expected", [(4, 8, 32), (37, 14, 224), (16, 32, 224), (30, 10, 220)])
def test_images_are_as_large_as_the_weights_expect(tmp_path, monkeypatch, side, patch, expected):
    model = eval_linear.VisionTransformer(side, patch, 96, 1, 3, None, False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    seen = []
    monkeypatch.setattr(eval_linear, "write_features", lambda args, _: seen.append(args.crop_size))
    flags = ["--weights", tmp_path / "w.pth", "--data_path", tmp_path, "--embed", "x.npz"]
    evaluate(*flags)
    evaluate(*flags, "--crop_size", 2 * patch)
    assert seen == [expected, 2 * patch]


# ----------------------------------------------------------- evaluation: features, pictures, export


def test_features_of_any_folder_are_written_by_any_number_of_processes(base, data, tmp_path):
    shutil.copytree(data / "val", tmp_path / "val")
    (tmp_path / "val" / "kind0" / "00.png").write_bytes(b"not an image")  # the first, taken twice
    flags = [*base, "--data_path", f"{tmp_path}/val/", "--embed"]
    printed = evaluate(*flags, tmp_path / "one.npz")
    assert "(23, 96)" in printed and "2 of 25 images" in printed
    statuses, texts = ends(launch(eval_linear, *flags, tmp_path / "two.npz", world=2))
    assert statuses == [0, 0] and "2 of 25 images" in "".join(texts), texts
    one, two = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("one", "two"))
    for name in one:
        assert one[name].dtype == two[name].dtype
    assert np.allclose(one["features"], two["features"], atol=1e-5)
    names = [f"kind{i}/{j:02}.png" for i in range(3) for j in range(8)] + ["none.png"]
    names = [name for name in names if name not in ("kind0/00.png", "kind2/03.png")]
    assert sorted(one["names"]) == names and np.array_equal(one["names"], two["names"])
    assert all(
        label == name[:5].removesuffix("none.") for label, name in zip(one["labels"], one["names"])
    )
    model, _ = eval_linear.load_backbone(base[1])
    for i in 0, 20, 22:
        image = eval_linear.load_image(data / "val" / one["names"][i])
        z = eval_linear.encode(model, eval_linear.center_crop(image, 32)[None])[0, -2]
        torch.testing.assert_close(torch.from_numpy(one["features"][i]), z, rtol=1e-4, atol=1e-5)
    assert "exists already" in stopped(*flags, tmp_path / "one.npz")
    assert "no folder" in stopped(*flags, tmp_path / "none" / "x.npz")
    (tmp_path / "empty").mkdir()
    assert "no images" in stopped(*flags, tmp_path / "x.npz", "--data_path", tmp_path / "empty")


@parametrize(
    "names, labels",
    [
        (["a/1.png", "b/c/2.png", "3.png"], ["a", "b", ""]),
        (["train/a/1.png", "test/b/2.png", "train/3.png"], ["a", "b", ""]),
        (["val/a/x/1.png", "test/b/2.png"], ["a", "b"]),
        (["apple/1.png", "train/2.png"], ["apple", "train"]),  # two classes of CIFAR-100
        (["1.png"], [""]),
    ],
)
def test_a_label_of_features_is_the_first_folder_below_the_split(names, labels):
    assert eval_linear.labels_of(names) == labels


def test_pictures_have_a_row_an_image_and_are_never_written_over(base, data, tmp_path):
    photo = data / "val" / "kind0" / "01.png"
    out = tmp_path / "out.png"
    few = base[:2] + ["--crop_size", "64"]
    evaluate(*few, "--pictures", out, photo, photo)
    assert Image.open(out).size == (5 * 172 + 4, 2 * 172 + 4)  # image, 3 heads, patch features
    pixels = np.asarray(Image.open(out)).astype(int)
    assert len(np.unique(pixels[8:168, 696:856].reshape(-1, 3), axis=0)) > 8, "of several colours"
    assert np.array_equal(pixels[4:172], pixels[176:344]), "the same image twice"
    shown = pixels[4:172, 4:172].mean((0, 1))
    assert np.abs(shown - np.asarray(Image.open(photo)).mean((0, 1))).max() < 3
    before = photo.read_bytes()
    assert "exists already" in stopped(*few, "--pictures", photo, photo)
    assert photo.read_bytes() == before
    message = stopped(*few, "--pictures", tmp_path / "b.png", base[1])
    assert base[1] in message and not (tmp_path / "b.png").exists()
    evaluate(*few, "--data_path", data / "val", "--pictures", tmp_path / "eight.png")
    assert Image.open(tmp_path / "eight.png").size[1] == 8 * 172 + 4
    evaluate(*few, "--crop_size", 8, "--pictures", tmp_path / "patch.png", photo)  # one patch
    assert Image.open(tmp_path / "patch.png").size == (5 * 172 + 4, 172 + 4)
    (tmp_path / "empty").mkdir()
    assert "no images" in stopped(*few, "--data_path", tmp_path / "empty", "--pictures", "c.png")
    nan = [*few, "--std", 0, 0, 0, "--pictures", tmp_path / "b.png", photo]
    assert "not finite" in stopped(*nan)


@parametrize("kind", ["v1", "v2", "no registers"])
def test_timm_loads_an_exported_backbone_strictly_by_the_line_printed(tmp_path, kind):
    pytest.importorskip("timm")
    tensors = weights(1 if kind == "v1" else 2, 96)
    if kind == "no registers":
        tensors["register_tokens"] = tensors["register_tokens"][:, :0]
    torch.save({"teacher": prefixed("backbone.", tensors)}, tmp_path / "w.pth")
    out = tmp_path / "timm.pth"
    line = evaluate("--weights", tmp_path / "w.pth", "--export", out).splitlines()[-1]
    assert line.startswith("model = timm.") and "strict=True" in line
    (tmp_path / "line.py").write_text("import timm, torch\n" + line)
    names = runpy.run_path(tmp_path / "line.py")
    model, _ = eval_linear.load_backbone(tmp_path / "w.pth")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.get_intermediate_layers(x)[0][:, 0]
        torch.testing.assert_close(names["model"].eval()(x), expected, rtol=1e-5, atol=1e-4)
    again, _ = eval_linear.load_backbone(out)  # and back
    torch.testing.assert_close(again.get_intermediate_layers(x)[0][:, 0], expected)
    assert "exists already" in stopped("--pretrained_weights", tmp_path / "w.pth", "--export", out)


# ----------------------------------------------------------------------------- when things go wrong


@parametrize(
    "flags, named",
    [
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--crop_size", "30"], "--crop_size 30 is not a multiple of the patch, 8"),
        (["--num_heads", "5"], "--num_heads"),
        (["--checkpoint_key", "student"], "--checkpoint_key student"),
        (["--data_path", "/nowhere"], "/nowhere must have the folders train and val or valid"),
        (["--split", "other"], "must have the folders train and other"),
        (["--split", "train"], "train is the folder to train on"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--epochs", "-1"], "--epochs must be at least 0"),
        (["--epochs", "0", "--segment", "32", "32"], "--epochs must be at least 1"),
    ],
)
def test_bad_arguments_of_the_evaluation_get_one_line(base, tmp_path, flags, named):
    assert named in stopped(*base, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@parametrize(
    "flags, named",
    [
        (["--amp", "fp8"], "--amp"),
        (["--data_path", ""], "--data_path is needed"),
        (["--segment", "32"], "--segment"),
        (["--segment", "32", "32", "--pictures", "x.png"], "not allowed with"),
        (["--crop", "32"], "unrecognized arguments: --crop"),
    ],
)
def test_malformed_options_of_the_evaluation_are_named(base, capsys, flags, named):
    with pytest.raises(SystemExit):
        eval_linear.parse_args([*base, *flags])
    assert named in capsys.readouterr().err


def test_another_folder_may_be_judged_and_images_of_other_classes_are_left_out(
    base, data, tmp_path
):
    copy = tmp_path / "copy"
    for split, to in ("train", "train"), ("val", "valid"), ("val", "other"):
        shutil.copytree(data / split, copy / to)
    (copy / "other" / "kind0").rename(copy / "other" / "kind9")
    flags = [*base, "--epochs", 0, "--output_dir", tmp_path / "out", "--data_path"]
    assert f"on {copy}/valid: top1" in evaluate(*flags, copy)
    printed = evaluate(*flags, copy, "--split", "other")
    assert f"on {copy}/other: top1" in printed and f"10 of 25 images in {copy}/other" in printed
    assert len(predictions_of(tmp_path / "out")) == 15
    shutil.rmtree(copy / "other" / "kind1")
    shutil.rmtree(copy / "other" / "kind2")
    assert f"no image in {copy}/other has a class" in stopped(*flags, copy, "--split", "other")
    for path in (copy / "valid").glob("kind?/*.png"):
        path.write_bytes(b"rubbish")  # one without a label can be read
    assert f"no image in {copy}/valid is left" in stopped(*flags, copy)
    shutil.rmtree(copy / "train" / "kind0")
    shutil.rmtree(copy / "train" / "kind1")
    assert "fewer than two class folders" in stopped(*flags, copy)


def test_features_that_are_not_finite_end_the_run(base, streets, tmp_path):
    tensors = weights(1, 96)
    tensors["norm.bias"][3] = math.nan
    torch.save(tensors, tmp_path / "nan.pth")
    flags = [*base, "--weights", tmp_path / "nan.pth", "--output_dir", tmp_path / "out"]
    assert "not finite" in stopped(*flags)
    flags = segmenting(["--weights", tmp_path / "nan.pth"], streets, tmp_path / "out")
    assert "not finite" in stopped(*flags)
    assert not [*(tmp_path / "out").iterdir()]


# ------------------------------------------------------------------- evaluation: the segmentation

IDS = np.array([0, 50, 200])  # of three classes


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """train/, val/ and masks of 3 classes that a patch's brightness tells; 9 and 255 are void."""
    root = tmp_path_factory.mktemp("streets")
    for split, count in ("train", 24), ("val", 7):
        (root / split / "a").mkdir(parents=True)
        (root / f"{split}_masks" / "a").mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((split == "val", i))
            kinds = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = 40 + 80 * kinds[..., None] + rng.normal(0, 9, (32, 48, 3))
            mask = IDS[kinds].astype(np.uint8)
            mask[0], mask[1] = 9, 255
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / "a" / f"{i}.jpg", quality=95)
            Image.fromarray(mask).save(root / f"{split}_masks" / "a" / f"{i}.png")
    return root


def segmenting(base, streets, output, *flags):
    flags = ["--epochs", 12, "--num_workers", 0, "--batch_size", 4, *flags]
    flags = ["--segment", 32, 48, "--ignore_index", 9, 255, *flags]
    return [*base[:2], "--data_path", streets, "--output_dir", output, *flags]


@pytest.fixture(scope="module")
def segmented(base, streets, tmp_path_factory):
    output = tmp_path_factory.mktemp("segmented")
    return output, evaluate(*segmenting(base, streets, output))


def scores_of_pixels(model, classifier, folder, name):
    """By the classifier, as the README says: (classes, 32, 48); and the mask."""
    x = eval_linear.load_image(folder / name)[None]
    patches = eval_linear.encode_patches(model, x)
    scores = F.conv2d(patches, classifier["weight"], classifier["bias"])
    mask = Image.open((Path(f"{folder}_masks") / name).with_suffix(".png"))
    return F.interpolate(scores, (32, 48), mode="bilinear")[0], np.array(mask)


def test_segmentation_learns_what_patches_show_and_is_counted_as_by_torchmetrics(
    base, streets, segmented
):
    metrics = pytest.importorskip("torchmetrics.classification")
    output, printed = segmented
    results, classifier = results_of(output)
    scores = results["segmentation"]
    assert scores["miou"] > 60 and scores["pixel_accuracy"] > 75
    held_out = scores["held_out_miou"]
    assert held_out[scores["best"]] == max(held_out.values()) and len(held_out) == 5
    assert "14 images to train on, 10 to choose by, 7 to judge on; 3 classes" in printed
    assert results["judged"] == f"{streets}/val" and f"miou {scores['miou']:.2f} %" in printed
    assert classifier["classes"] == IDS.tolist() and [*scores["iou"]] == ["0", "50", "200"]

    model, _ = eval_linear.load_backbone(base[1])
    options = {"num_classes": 3, "ignore_index": -1}
    iou = metrics.MulticlassJaccardIndex(average=None, **options)
    pixels = metrics.MulticlassAccuracy(average="micro", **options)
    means = metrics.MulticlassAccuracy(average="macro", **options)
    for i in range(7):
        predicted, mask = scores_of_pixels(model, classifier, streets / "val", f"a/{i}.jpg")
        true = np.select([mask == number for number in IDS], [0, 1, 2], -1)
        for metric in iou, pixels, means:
            metric.update(predicted.argmax(0)[None], torch.from_numpy(true)[None])
    assert [*scores["iou"].values()] == pytest.approx((100 * iou.compute()).tolist(), abs=0.1)
    assert scores["miou"] == pytest.approx(100 * iou.compute().mean().item(), abs=0.1)
    assert scores["pixel_accuracy"] == pytest.approx(100 * pixels.compute().item(), abs=0.1)
    assert scores["class_mean"] == pytest.approx(100 * means.compute().item(), abs=0.1)


def test_a_segmentation_that_is_killed_goes_on_to_the_same_bits(base, streets, segmented, tmp_path):
    flags = segmenting(base, streets, tmp_path)
    processes = launch(eval_linear, *flags)
    wait_for(tmp_path / f"probe-{results_of(segmented[0])[0]['id']}-14.pth", processes[0])
    processes[0].kill()
    ends(processes)
    assert "epochs are done" in evaluate(*flags)
    (results, classifier), (alone, expected) = results_of(tmp_path), results_of(segmented[0])
    assert same(classifier, expected) and results["segmentation"] == alone["segmentation"]


def test_two_processes_segment_as_one(base, streets, segmented, tmp_path):
    statuses, printed = ends(launch(eval_linear, *segmenting(base, streets, tmp_path), world=2))
    assert statuses == [0, 0], printed
    (results, classifier), (alone, expected) = results_of(tmp_path), results_of(segmented[0])
    iou = [*alone["segmentation"]["iou"].values()]
    assert [*results["segmentation"]["iou"].values()] == pytest.approx(iou, abs=0.1)
    torch.testing.assert_close(classifier["weight"], expected["weight"], rtol=1e-3, atol=1e-4)


def test_constant_channels_of_patch_tokens_stay_finite():
    z = 20 + 1e-3 * torch.randn(4, 8, 5, 6)
    z[:, 3] = 7
    probe = eval_linear.PatchProbe(z, 3)
    masks = torch.zeros(4, 40, 48, dtype=torch.long)
    assert all(probe.loss(number, z, masks).isfinite() for number in range(5))
    torch.testing.assert_close(probe.norm(z)[:, 0].mean(), torch.tensor(0.0), atol=1e-3, rtol=0)


def test_segmentation_scores_of_a_matrix_worked_by_hand():
    counts = torch.tensor([[8.0, 2, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]).double()
    scores = eval_linear.segmentation_scores(counts)
    assert scores["iou"] == [pytest.approx(100 * 8 / 14), pytest.approx(100 * 4 / 7), None, 0]
    assert scores["miou"] == pytest.approx(100 * (8 / 14 + 4 / 7) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 12 / 18)
    assert scores["class_mean"] == pytest.approx(100 * (8 / 10 + 4 / 5) / 3)


def test_data_that_cannot_be_segmented_name_the_file(base, streets, tmp_path):
    def message(root, *flags):
        with pytest.raises((SystemExit, OSError, ValueError)) as end:
            evaluate(*segmenting(base, root, tmp_path / "out", *flags))
        return str(end.value)

    assert "multiples of the patch, 8" in message(streets, "--segment", 30, 48)
    assert "must have the folders train" in message(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(streets, copy)
    mask = copy / "train_masks" / "a" / "3.png"
    mask.unlink()
    assert str(mask) in message(copy)
    Image.new("RGB", (48, 32)).save(mask)
    assert f"{mask} has colours" in message(copy)
    shutil.copy(streets / "train_masks" / "a" / "3.png", mask)
    photo = copy / "train" / "a" / "3.jpg"
    exif = Image.Exif()
    exif[274] = 6  # on its side: load_image turns it upright, so its mask is another
    Image.open(photo).save(photo, exif=exif)
    for name in "train/a/4.jpg", "val/a/5.jpg":
        (copy / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out: ") as warned:
        evaluate(*segmenting(base, copy, tmp_path / "works", "--epochs", 1))
    texts = " ".join(str(warning.message) for warning in warned)
    assert f"a/3.jpg in {copy}/train has 48 x 32 pixels, its mask 32 x 48" in texts
    assert "cannot read" in texts and "4.jpg" in texts and "5.jpg" in texts
    scores = results_of(tmp_path / "works")[0]["segmentation"]
    assert 0 < scores["pixel_accuracy"] < 100

    other = copy / "val_masks" / "a" / "2.png"
    palette = Image.fromarray(np.full((32, 48), 7, dtype=np.uint8))
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(other)
    assert Image.open(other).mode == "P"
    assert f"{other} has the value 7, no class of train/" in message(copy)
    for path in (copy / "val" / "a").iterdir():
        path.write_bytes(b"no image")
    shutil.copy(streets / "val_masks" / "a" / "2.png", other)
    assert "no image can be read" in message(copy, "--epochs", 1)
    for path in (copy / "val_masks" / "a").iterdir():
        Image.new("L", (48, 32), 255).save(path)
    assert "classes in train: [0, 50, 200], in val: []: too few" in message(copy)


def test_a_run_is_known_by_its_options_weights_and_files(base, streets, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(streets, copy)
    model, _ = eval_linear.load_backbone(base[1])
    files = sorted(map(str, copy.rglob("*.png")))

    def identified(*flags, files=files):
        return eval_linear.identify_run(eval_linear.parse_args([*base, *flags]), model, files)["id"]

    first = identified()
    assert first == identified("--output_dir", "x", "--num_workers", "1")
    ids = [first, identified("--seed", "4"), identified(files=files[1:])]
    Image.new("L", (48, 32), 50).save(files[0])
    ids.append(identified())
    nn.init.ones_(model.norm.bias)
    ids.append(identified())
    assert len(set(ids)) == 5


# ----------------------------------------------------------------------------------- the README


README = (Path(simdino.__file__).parent / "README.md").read_text()
BLOCKS_OF_README = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@parametrize("number", range(len(BLOCKS_OF_README)))
def test_the_snippets_of_the_readme_run(monkeypatch, tmp_path, capsys, number):
    text, folder = BLOCKS_OF_README[number], Path(simdino.__file__).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    if "photos.npz" in text:
        features = np.array([[3.0, 0], [0, 1], [1, 1], [2, 1]])
        np.savez("photos.npz", features=features, names=["a", "b", "c", "d"], labels=[""] * 4)
    Path("snippet.py").write_text(text)
    names = runpy.run_path("snippet.py")
    assert "photos.npz" not in text or "['d' 'c' 'b']" in capsys.readouterr().out
    assert "loss" not in names or names["loss"].requires_grad


ROWS_OF_README = re.findall(
    r"\| (\d+) × (\d+)[^|]*\| ([\d.]+) \| (at most|collapsed) ([\d.]+) \|", README
)


@parametrize("images, gpus, eps_sq, kind, rate", ROWS_OF_README)
def test_the_rates_in_the_readme_follow_from_the_formula(images, gpus, eps_sq, kind, rate):
    n, eps_sq, gamma = int(images), float(eps_sq), 1 / 256 + 1 / (int(images) * int(gpus))
    z = torch.eye(n, 256) if kind == "at most" else torch.eye(1, 256).expand(n, 256)
    assert eps_sq == pytest.approx(0.05 * int(gpus))
    expected = gamma * simdino.coding_rate(z.double(), eps_sq).item()
    assert f"{expected:.{len(rate) - 2}f}" == rate
