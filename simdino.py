# SPDX-License-Identifier: MIT
"""SimDINO: DINO without prototypes, centering, sharpening or temperatures, in one file.

    torchrun simdino.py                                               # the built-in data
    torchrun --nproc_per_node=W simdino.py --data_path /imagenet --output_dir runs/vitb16
    torchrun simdino.py --data_path FOLDER --output_dir runs/mine     # any folder of images

An image gives V views: 2 global crops and several local ones. The student, a ViT with a small head,
maps each view to a unit vector z_s of d numbers. The teacher, whose weights are a moving average
(EMA) of the student's, maps the global views to z_t. Views of one image are pulled together, and
the features of different images, the rows of Z, are kept apart:

    loss = mean ½‖z_s - z_t‖² - γ R(Z)        over images and pairs: z_t of one view, z_s of another
    R(Z) = ½ logdet(I + d / (n ε²) ZᵀZ)       the coding rate of Z, n rows of d numbers

The first term alone is smallest when all images get the same vector: the features collapse. DINO
avoids it by centering and sharpening its scores of 65,536 prototypes. Here R is enough: at collapse
it is smallest, and so -γ R is largest. Four words, with the options that set them:

    micro-batch   the images that a process (one per GPU) takes at a time: --batch_size_per_gpu
    round         one micro-batch of each process
    step          an update of the weights by as many rounds as give --batch_size images
    group         the images of a round whose coding rate is taken together: --group_size

The published run computed R on each of 8 GPUs over its 64 images. The mean of these rates does not
depend on which GPU computes a group, or in which round. So the second command repeats that run on
W = 1, 2, 4 or 8 GPUs: each takes its share of 512 images, 64 at a time, and gradients are averaged.
In it R is a mean over 8 groups, for each of the two global views; a row of Z is (z_s + z_t) / 2.

The first command trains on ten kinds of patterns that the script draws: k-NN accuracy 63.4, 66.4
and 64.9 % (seeds 0 to 2) in 1.3 to 2.1 minutes on 2 cores; random weights 15 to 19 %, raw pixels
34.2 %. checkpoint.pth holds the trained teacher: `eval_linear.py --weights checkpoint.pth` tests
its backbone, and writes it for timm.

Section 1 is the method: loss, model, views, one training step. Section 2 is the run: the options,
the images of a step, the training loop. Section 3 holds the helpers that both stand on.
Paper: "Simplifying DINO via Coding Rate Regularization", Wu et al., ICML 2025, arXiv 2502.10385.
"Official" below is the authors' code, github.com/RobinWu218/SimDINO.
"""

import argparse
import atexit
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, groupby, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import functional as TF

# ==================================================================================== 1. The method

# ----------------------------------------------------------------------------------------- the loss


def coding_rate(z, eps_sq):
    """Coding rate R = ½ logdet(I + d / (n ε²) ZᵀZ) in nats: paper, eq. (8).

    z: (..., n, d), n rows of length 1 or less; eps_sq: ε² > 0. Returns (...). R is roughly the
    logarithm of how many balls of radius ε fit in the volume that the rows span. With λ the
    eigenvalues of ZᵀZ it is ½ Σ log(1 + d λ / (n ε²)). For unit rows Σ λ = n; then R is smallest,
    ½ log(1 + d / ε²), when all are parallel (one λ is n), and largest when the λ are equal:
    (n/2) log(1 + d / (n ε²)) for n <= d, else (d/2) log(1 + 1 / ε²). For d = 256, n = 64 and
    ε² = 0.4 these are 3.2 and 76.7. Equal λ are best for any ε; with a larger ε they gain less.
    """
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z  # ZZᵀ and ZᵀZ share their non-zero eigenvalues
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    # cholesky_ex skips the error check, for which the host would wait for the GPU.
    factor, _ = torch.linalg.cholesky_ex(eye + d / (n * eps_sq) * gram)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # ½ logdet(LLᵀ) = Σ log diag(L)


class SimDINOLoss(torch.nn.Module):
    """loss = -coeff comp - γ R. With coeff 1: mean ½‖z_s - z_t‖² - γ R, without the constant 1.

    comp (official name, from "compression"): mean cosine, 1 - ½‖z_s - z_t‖², over all pairs of a
    teacher's and a student's view. A crop paired with itself is left out: it teaches no invariance.
    R: mean coding rate over the teacher's views and over groups of group_size images. Groups are
    cut in order from this process's images if whole groups fit there, else from those of all
    processes (None, or more than all images: one group). Images left over, as at the end of a
    loader's last batch, are in no group. The rows of Z are the student's (expa_type 0) or (student
    + teacher) / 2 (1, the official default), shorter than 1 where the two disagree.
    expa (from "expansion") is γ R.
    eps_sq 0.4 and groups of 64 (SimDINOv2: 128) are those of the published models: on 8 GPUs, the
    official code sums over a GPU's rows but divides by all 8 times as many: --eps 0.05 is ε² = 0.4.
    gamma: weight of R; None for (d + b) / (d b) = 1/d + 1/b, the authors' heuristic, with b the
    images of a round: for d = 256, 0.0059 at 512, 0.0195 at 64. With several rounds a step give
    gamma, as the class sees one round only.
    """

    def __init__(self, eps_sq=0.4, group_size=64, coeff=1.0, gamma=None, expa_type=1):
        super().__init__()
        if not eps_sq > 0 or group_size is not None and group_size < 1 or expa_type not in (0, 1):
            raise ValueError("eps_sq and group_size must be positive, expa_type 0 or 1")
        self.eps_sq, self.group_size, self.coeff = eps_sq, group_size, coeff
        self.gamma, self.expa_type = gamma, expa_type

    def forward(self, student, teacher):
        """student: V views (V, B, d), teacher: the first G of them (G, B, d), unit rows.
        Returns the loss, and detached comp and expa.

        Not checked: that rows have unit length, and that B, this process's images, is the same on
        all processes. ValueError for one view, or for a group that is larger than B and does not
        divide the images of all processes.
        """
        # Autocast would form ZᵀZ in half precision. Where rounding moves an eigenvalue below
        # -n ε² / d, the logarithm is NaN: often at ε² = 0.05, seldom at 0.4.
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            student, teacher = student.to(dtype), teacher.detach().to(dtype)
            (views, images, d), shared = student.shape, teacher.shape[0]
            if views < 2:
                raise ValueError("one view makes no pair of different views")

            # comp is a mean over images: the mean of the processes' values is that of all images.
            cosine = torch.cosine_similarity(teacher[:, None], student, dim=-1).mean(-1)  # (G, V)
            comp = (cosine.sum() - cosine.diagonal().sum()) / (shared * (views - 1))

            # R is a mean over groups, not over images: a group over several processes is gathered.
            z = student[:shared]
            z = z if self.expa_type == 0 else (z + teacher) / 2  # (G, B, d)
            total = images * self.processes()
            group = min(self.group_size or total, total)
            if images % group and total % group == 0:
                z = self.gather(z)  # (G, total, d)
            elif group > images:
                raise ValueError(f"group_size {group} does not divide the {total} images")
            z = z[:, : z.shape[1] // group * group].unflatten(1, (-1, group))  # whole groups
            gamma = 1 / d + 1 / total if self.gamma is None else self.gamma
            expa = gamma * coding_rate(z, self.eps_sq).mean()
        return -self.coeff * comp - expa, {"comp": comp.detach(), "expa": expa.detach()}

    @staticmethod
    def processes():
        dist = torch.distributed  # by its full name: the class and coding_rate can be copied
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @classmethod
    def gather(cls, z):
        """Rows (..., B, d) of all processes in their order; those of this one carry gradient."""
        if (world := cls.processes()) == 1:
            return z
        own = z.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(world)]
        torch.distributed.all_gather(parts, own)
        # This has z's value and `world` times its gradient: each process back-propagates through
        # its own rows only, and DDP divides the sum over the processes by world.
        parts[torch.distributed.get_rank()] = own + world * (z - own)
        return torch.cat(parts, dim=-2)


@torch.no_grad()
def effective_rank(rows):
    """How many directions rows (n, d) use: exp of the entropy of the eigenvalues of ZᵀZ.

    1 when all rows are alike, at most min(n, d). The built-in run rises from 1 to 63: its 128 rows
    are 2 views of 64 images. Below 2, and not rising, is a collapse. The host waits here.
    """
    gram = (rows.mT @ rows).nan_to_num().cpu().double()  # eigvalsh raises on NaN
    p = torch.linalg.eigvalsh(gram).numpy().clip(min=1e-12)  # small: a GPU would take longer
    p /= p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# ---------------------------------------------------------------------------------------- the model

ARCHS = {
    "vit_nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},  # built-in run
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(  # the names are timm's
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x, keep=None):
        """keep: (2, B, 1, 1), stochastic depth's factors for the two branches; None: no drop."""
        attn = self.attn(self.norm1(x))
        x = x + (attn if keep is None else keep[0].to(attn.dtype) * attn)
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if keep is None else keep[1].to(mlp.dtype) * mlp)


class VisionTransformer(nn.Module):
    """ViT whose parameters are named as in DINO and timm, so that weights travel both ways.

    forward: images (B, 3, H, W), H and W multiples of patch_size -> CLS features (B, D); a list of
    such batches, of several sizes -> their CLS features concatenated in that order. Other sizes are
    a ValueError. grad_checkpointing = True: activations of a block are computed again in the
    backward pass instead of kept.
    """

    def __init__(
        self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, drop_path_rate=0.0
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.patch_size, self.side = patch_size, img_size // patch_size
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, False
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def position_embedding(self, h, w):
        """(1, 1 + h w, D) for a grid of h x w patches, bicubic from the grid trained on."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        # DINO adds 0.1, as side * (h / side) could be rounded down to h - 1. Its weights expect the
        # small shift that comes with it.
        factor = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x):
        """(B, 3, H, W) -> (B, 1 + N, D): CLS and patch tokens with their position embedding."""
        h, w = x.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"{h} x {w} pixels: not multiples of patch size {self.patch_size}")
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.position_embedding(h // self.patch_size, w // self.patch_size)

    def stochastic_depth(self, x):
        """keep of each block for the samples of x. A branch is dropped at a rate that rises with
        depth to drop_path_rate; a kept one is divided by 1 - rate: the mean stays."""
        depth = len(self.blocks)
        if not (self.training and self.drop_path_rate):
            return [None] * depth
        rate = torch.linspace(0, self.drop_path_rate, depth, device=x.device).view(-1, 1, 1, 1, 1)
        return (torch.rand(depth, 2, x.shape[0], 1, 1, device=x.device) >= rate) / (1 - rate)

    def forward(self, x):
        if isinstance(x, (list, tuple)):  # views of equal size that follow each other: one pass
            sizes = groupby(x, key=lambda view: view.shape[-2:])
            return torch.cat([self(torch.cat(list(views))) for _, views in sizes])
        x = self.prepare_tokens(x)
        for block, keep in zip(self.blocks, self.stochastic_depth(x)):
            if self.training and self.grad_checkpointing:
                x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, keep)
        return self.norm(x[:, 0])


class ProjectionHead(nn.Module):
    """Features (..., in_dim) -> unit rows (..., out_dim) in float32: no prototypes."""

    def __init__(self, in_dim, hidden_dim=2048, out_dim=256):
        super().__init__()
        first, second = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        last = nn.Linear(hidden_dim, out_dim)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
        self.apply(init_weights)

    def forward(self, x):
        z = self.mlp(x)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------- the views, and augmentation


class MultiCrop:
    """Runs in workers: uint8 (3, H, W) -> list of uint8 views, two global ones first.

    Random resized crops: a share of the area within scale, aspect 3/4 to 4/3. Images differ in
    size, so each is cropped where it is decoded, and few bytes are sent. All else is arithmetic on
    batches of crops of one size, which the training device does (augment).
    """

    def __init__(
        self,
        global_size=224,
        local_size=96,
        global_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        local_crops=10,
    ):
        self.crops = [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * local_crops

    def __call__(self, image):
        height, width = image.shape[1:]
        views, draws = [], torch.rand(len(self.crops), 10, 4, dtype=torch.float64).tolist()
        for (size, (low, high)), tries in zip(self.crops, draws):
            for share, aspect, top, left in tries:
                area = height * width * (low + (high - low) * share)
                ratio = (4 / 3) ** (2 * aspect - 1)  # uniform in its logarithm
                h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
                if h <= height and w <= width:
                    break
            h, w = min(max(h, 1), height), min(max(w, 1), width)  # if no try fits
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            crop = image[None, :, y : y + h, x : x + w]
            views.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0])
        return views


def augment(views):
    """On the device: uint8 batches (B, 3, h, w), two global views first -> normalised float32.

    How often views are blurred and solarised is DINO's choice for each kind of view.
    """
    first, second, *local = views
    views = [photometric(first, blur=1.0), photometric(second, blur=0.1, solarize=0.2)]
    return views + [*photometric(torch.cat(local), blur=0.5).split(len(first))] if local else views


def photometric(x, blur, solarize=0.0):
    """DINO's augmentation of uint8 x (B, 3, h, w): flip, jitter, grayscale, blur, solarisation.

    Each is drawn for each image; only the order of jitter is drawn for the batch. blur, solarize:
    the probabilities that differ by view. All operations equal torchvision's.
    """
    x = torch.where(uniform(x) < 0.5, x.flip(-1), x) / 255
    x = torch.where(uniform(x) < 0.8, color_jitter(x), x)
    x = torch.where(uniform(x) < 0.2, grayscale(x), x)
    x = torch.where(uniform(x) < blur, gaussian_blur(x, sigma=uniform(x, 0.1, 2.0)), x)
    if solarize:
        x = torch.where((uniform(x) < solarize) & (x >= 128 / 255), 1 - x, x)
    return normalize(x)


def uniform(x, low=0.0, high=1.0):
    """A random number for each image of x, (B, 1, 1, 1), drawn on its device."""
    return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)


def color_jitter(x):
    """Brightness, contrast, saturation and hue of x in [0, 1], in an order drawn for the batch."""
    operations = [
        lambda x: blend(x, torch.zeros_like(x[:, :1]), uniform(x, 0.6, 1.4)),
        lambda x: blend(x, grayscale(x).mean((1, 2, 3), keepdim=True), uniform(x, 0.6, 1.4)),
        lambda x: blend(x, grayscale(x), uniform(x, 0.8, 1.2)),
        lambda x: adjust_hue(x, uniform(x, -0.1, 0.1)),
    ]
    for i in torch.randperm(4).tolist():
        x = operations[i](x)
    return x


class Fusible(nn.Module):
    """A function of pixels. With --compile, its operations share one pass over memory."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@Fusible
def grayscale(x):  # (B, 3, H, W) -> (B, 1, H, W)
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


@Fusible
def blend(x, other, factor):
    return torch.lerp(other, x, factor).clamp_(0, 1)


@Fusible
def adjust_hue(x, shift):
    """Rotate the hue of x, (B, 3, H, W) in [0, 1], by shift (B, 1, 1, 1) turns, through HSV."""
    value, (r, g, b) = x.amax(1, keepdim=True), x.split(1, dim=1)
    chroma = value - x.amin(1, keepdim=True)
    # In sixths of a turn, times chroma
    hue = torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(value == r, g - b, hue) / chroma.clamp(min=1e-8) + 6 * shift
    # HSV to RGB: V - C clamp(min(k, 4 - k), 0, 1), k = (hue + 5, 3, 1 for R, G, B) mod 6
    k = (hue + 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius=6):  # radius: 3 times the largest sigma, 2
    """Blur each image of x (B, 3, H, W) by its own sigma (B, 1, 1, 1), by two band matrices."""

    def band(size):  # (B, 1, size, size), rows sum to 1, borders reflected
        offset = torch.arange(-min(radius, size - 1), min(radius, size - 1) + 1, device=x.device)
        weight = (-((offset / sigma.view(-1, 1)) ** 2) / 2).softmax(-1)  # (B, taps)
        at = (torch.arange(size, device=x.device) + offset[:, None]).abs()
        at = (size - 1) - ((size - 1) - at).abs()
        taps = torch.eye(size, dtype=x.dtype, device=x.device)[at]  # (taps, size, size)
        return torch.einsum("bk,kij->bij", weight, taps)[:, None]

    return band(x.shape[2]) @ (x.flatten(1, 2) @ band(x.shape[3])[:, 0].mT).view_as(x)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def normalize(x):
    """(B, 3, H, W) in [0, 1] -> mean 0 and variance 1 over ImageNet."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(x.device, non_blocking=True)
    return torch.addcmul(-mean / std, x, 1 / std)  # (x - mean) / std


# ---------------------------------------------------------------------------------- a training step


class SimDINO:
    """Student, teacher and optimizer, and the step that trains them.

    backbone: maps a batch of images, or a list of batches of two sizes (global views first), to
    one feature (D,) per image in that order, as VisionTransformer does; it has no buffers.
    head: maps features to unit rows. rounds: micro-batches that this process takes in a step.
    """

    def __init__(self, backbone, head, loss_fn, clip_grad=3.0, rounds=1, dtype=torch.float32):
        self.student = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.model = self.student  # or, around it, DistributedDataParallel
        self.params = list(self.student.parameters())
        decayed = {"params": [p for p in self.params if p.ndim > 1], "decays": 1.0}
        others = {"params": [p for p in self.params if p.ndim <= 1], "decays": 0.0}  # biases, norms
        self.optimizer = torch.optim.AdamW([decayed, others], fused=True)
        self.loss_fn, self.clip_grad, self.rounds = loss_fn, clip_grad, rounds
        self.device, self.dtype = self.params[0].device, dtype
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.parts = {"student": self.student, "teacher": self.teacher}  # go into checkpoints
        self.parts |= {"optimizer": self.optimizer, "scaler": self.scaler}

    def step(self, micro_batches, lr, weight_decay, momentum):
        """One step over this process's micro-batches, (seed, views) each: the whole algorithm.

        The gradient is the mean over all processes' micro-batches. Returns, for the log, this
        process's mean loss, comp and expa, and z_s, z_t of its last micro-batch.
        """
        metrics = []
        self.optimizer.zero_grad()
        for taken, (seed, views, *_) in enumerate(micro_batches, start=1):
            torch.manual_seed(seed)  # for augmentation and stochastic depth
            views = augment([view.to(self.device, non_blocking=True) for view in views])
            self.model.require_backward_grad_sync = taken == self.rounds  # DDP: once a step
            with self.autocast:
                with torch.no_grad():
                    z_t = self.teacher(views[:2]).unflatten(0, (2, -1))  # (2, B, d)
                z_s = self.model(views).unflatten(0, (len(views), -1))  # (V, B, d)
            loss, stats = self.loss_fn(z_s, z_t)
            self.scaler.scale(loss / self.rounds).backward()
            metrics.append(torch.stack([loss.detach(), *stats.values()]))

        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:  # each tensor by itself, as DINO does
            grads = [p.grad for p in self.params]
            norms = torch.stack(torch._foreach_norm(grads))
            torch._foreach_mul_(grads, (self.clip_grad / (norms + 1e-6)).clamp(max=1).unbind())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group["decays"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():  # the teacher: exponential moving average of the student
            torch._foreach_lerp_(list(self.teacher.parameters()), self.params, 1 - momentum)
        return torch.stack(metrics).mean(0), z_s.detach(), z_t


# ====================================================================================== 2. The run

# torchrun sets these: the number of processes, this process's number, that of its GPU
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
PROCESS = int(os.environ.get("RANK") or 0) % WORLD  # RANK may be left over from another run
GPU = int(os.environ.get("LOCAL_RANK") or 0)
# The built-in run's options, where they are not the paper's ImageNet recipe
SMALL = """--arch vit_nano --patch_size 8 --hidden_dim 512 --drop_path_rate 0 --global_crops_size 32
--local_crops_size 16 --global_crops_scale 0.25 1 --local_crops_scale 0.15 0.4
--local_crops_number 6 --epochs 8 --lr 0.005 --warmup_epochs 1 --weight_decay_end 0.04
--momentum_teacher 0.8 --saveckp_freq 0 --eval_freq 4"""
# Options that may change on resume (schedules follow --epochs). Other changes are refused.
FREE = {"data_path", "output_dir", "pretrained_weights", "small_images", "resume_anyway", "eps"}
FREE |= {"batch_size_per_gpu", "epochs", "max_steps", "amp", "compile", "grad_checkpointing"}
FREE |= {"num_workers", "saveckp_freq", "eval_freq"}
# Flags of the official scripts that are not here, and what to write instead
UNUSED = """--out_dim --norm_last_layer --use_bn_in_head --z_dim --use_simdino --teacher_temp
--warmup_teacher_temp --warmup_teacher_temp_epochs --freeze_last_layer --optimizer --dist_url
--local_rank --local-rank --track_wandb --track_swan"""
OFFICIAL = dict.fromkeys(UNUSED.split(), "nothing, as it has no use here")
OFFICIAL |= {"--use_fp16": "--amp fp16", "--reduce_cov": "--group_size 0 --eps_sq EPS (if 1)"}


def within(kind, low, high=1e9):
    """A type for argparse: a number of this kind from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {low:g} to {high:g}")
        return kind(text)

    return number


def parse_args(argv=None):
    """The options: those of argv (the command line), then SMALL or the paper's ImageNet recipe."""
    examples = "\n".join(__doc__.split("\n")[2:4])
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = f"Train a vision transformer on images without labels.\n\n{examples}"
    parser.epilog = f"Without --data_path, or with --small_images, the defaults are:\n{SMALL}"
    parser.error, parser.usage = sys.exit, "torchrun %(prog)s [options]"

    def add(flag, kind, default, text, **more):
        text += "" if default is None else f" [{str(default).strip('[]')}]"
        metavar = None if "choices" in more else "TEXT" if kind is str else "N"
        parser.add_argument(flag, type=kind, default=default, help=text, metavar=metavar, **more)

    def switch(flag, text):
        parser.add_argument(flag, action="store_true", help=text)

    count, size = within(int, 0), within(int, 1)
    share, weight, positive = within(float, 0, 1), within(float, 0), within(float, 1e-12)
    add("--data_path", str, None, "folder of train/ and val/, of class folders, or of images")
    add("--output_dir", str, f"output_{Path(__file__).stem}", "folder for everything it writes")
    add("--pretrained_weights", str, None, "start from this file: ours, or named as DINO's, timm's")
    switch("--small_images", "the built-in run's defaults, for images of about 32 pixels")
    switch("--resume_anyway", "go on with a checkpoint of other options or other images")
    add("--seed", count, 0, "seed of all that is random")

    add("--arch", str, "vit_base", "size of the backbone", choices=ARCHS)
    add("--patch_size", size, 16, "side of a patch, pixels")
    add("--hidden_dim", size, 2048, "width of the projection head")
    add("--drop_path_rate", within(float, 0, 0.99), 0.1, "stochastic depth: rate at the last block")
    add("--global_crops_size", size, 224, "side of the 2 global views, pixels")
    add("--local_crops_size", size, 96, "side of the local views, pixels")
    add("--global_crops_scale", share, [0.4, 1.0], "range of the share of the area", nargs=2)
    add("--local_crops_scale", share, [0.05, 0.4], "range of the share of the area", nargs=2)
    add("--local_crops_number", count, 10, "local views of an image")

    add("--coeff", weight, 1.0, "weight of the mean cosine")
    add("--eps_sq", positive, 0.4, "square of the radius epsilon in the coding rate R")
    text = "images whose R is taken together [64, with --eps a micro-batch]; 0: all, in one round"
    add("--group_size", count, None, text)
    add("--eps", positive, None, "official flag for --eps_sq: N times the groups of a step")
    add("--gamma", weight, None, "weight of R [1 / 256 + 1 / batch_size]")
    add("--expa_type", int, 1, "R of z_s: 0, or of (z_s + z_t) / 2: 1", choices=(0, 1))

    add("--epochs", size, 100, "passes over the images, in whole steps")
    add("--batch_size", size, None, "images of a step, on all GPUs [512; small images: 64]")
    text = "images that a GPU takes at a time [64]; without --batch_size: that many x GPUs a step"
    add("--batch_size_per_gpu", size, None, text)
    add("--lr", positive, 5e-4, "peak learning rate for 256 images a step; it scales with them")
    add("--min_lr", weight, 1e-6, "learning rate that is approached at the end")
    add("--warmup_epochs", weight, 10.0, "epochs in which the learning rate rises from 0")
    add("--weight_decay", weight, 0.04, "weight decay at the start")
    add("--weight_decay_end", weight, 0.4, "weight decay that is approached at the end")
    add("--clip_grad", weight, 3.0, "largest gradient norm of a tensor; 0: no clipping")
    add("--momentum_teacher", share, 0.996, "momentum of the teacher at the start; approaches 1")
    add("--max_steps", count, 0, "stop early, after so many steps; 0: after --epochs")

    text = "auto: bf16 or else fp16 on GPUs, off: float32"
    add("--amp", str, "auto", text, choices=("auto", "bf16", "fp16", "off"))
    switch("--compile", "compile transformer blocks and colour jitter into fewer kernels")
    switch("--grad_checkpointing", "compute activations twice: slower, a quarter of the memory")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    add("--num_workers", count, min(10, cores), "data-loading workers per GPU")
    add("--saveckp_freq", count, 10, "keep a copy after epoch 1 and then every N epochs; 0: none")
    add("--eval_freq", count, 10, "k-NN accuracy every N epochs; 0: none")

    argv = sys.argv[1:] if argv is None else argv
    for flag in OFFICIAL.keys() & {text.split("=")[0] for text in argv}:
        sys.exit(f"{flag} is an official flag that is not here: write {OFFICIAL[flag]}")
    args = parser.parse_args(argv)
    if small := args.small_images or args.data_path is None:
        args = parser.parse_args([*SMALL.split(), *argv])
    for pixels in [args.global_crops_size, args.local_crops_size][: 1 + args.local_crops_number]:
        if pixels % args.patch_size:
            sys.exit(f"crops of {pixels} pixels: no multiple of --patch_size {args.patch_size}")
    if args.warmup_epochs >= args.epochs:
        sys.exit(f"--warmup_epochs {args.warmup_epochs:g} must be below --epochs {args.epochs}")

    usual, batch = 64, args.batch_size or (64 if small else 512)
    size = args.batch_size_per_gpu or usual
    if args.batch_size_per_gpu and not args.batch_size:  # as in DINO: a step of one round
        batch = size * WORLD
    size = min(size, max(1, batch // WORLD))
    group = (size if args.eps else usual) if args.group_size is None else args.group_size
    group, in_round = min(group or batch, batch), size * WORLD
    if batch % in_round:
        fit = f"{max(1, batch // in_round) * in_round} or {(batch // in_round + 1) * in_round}"
        sys.exit(f"--batch_size {batch} is not made of rounds of {WORLD} x {size}: try {fit}")
    if size % group and (group % size or in_round % group):  # in no micro-batch, nor made of them
        fit = f"a divisor of {size}, or a multiple that divides {in_round}"
        sys.exit(f"--group_size {group} does not fit {WORLD} processes x {size} images: try {fit}")
    args.batch_size, args.batch_size_per_gpu, args.group_size = batch, size, group
    args.eps_sq = args.eps * batch / group if args.eps else args.eps_sq
    return args


def seed_from(*numbers):
    """One 32-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@lru_cache(maxsize=1)
def order_of(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


class MicroBatches(Dataset):
    """Item i is micro-batch i % parts of step i // parts: its seed, views, and unreadable files.

    An epoch's images, in random order, are cut into whole steps of batch_size (the rest is left
    out), and these into parts of batch_size_per_gpu. All that is random is drawn from (seed, epoch,
    image) in the workers and from (seed, step, part) on the device. So a run depends on
    batch_size_per_gpu but, up to rounding, not on the number of processes; on a CPU, a resumed run
    ends with the same bits.
    """

    def __init__(self, images, args):
        self.images, self.seed = images, args.seed
        self.batch, self.size = args.batch_size, args.batch_size_per_gpu

    def __getitem__(self, i):
        n, (step, part) = len(self.images), divmod(i, self.batch // self.size)
        epoch, step_of_epoch = divmod(step, n // self.batch)
        first = step_of_epoch * self.batch + part * self.size
        chosen = epoch * n + order_of(n, self.seed, epoch)[first : first + self.size]
        views, _, problems = default_collate([self.images[key] for key in chosen.tolist()])
        return seed_from(self.seed, step, part), views, [*filter(None, problems)]


def build(args, device):
    """Student, teacher, optimizer and loss as the options say; compiled, and wrapped by DDP."""
    amp = args.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
    torch.manual_seed(seed_from(args.seed))
    shape = {"img_size": args.global_crops_size, "patch_size": args.patch_size, **ARCHS[args.arch]}
    backbone = VisionTransformer(**shape, drop_path_rate=args.drop_path_rate)
    backbone.grad_checkpointing = args.grad_checkpointing
    head, n = ProjectionHead(shape["embed_dim"], args.hidden_dim), args.batch_size
    gamma = 1 / 256 + 1 / n if args.gamma is None else args.gamma
    loss_fn = SimDINOLoss(args.eps_sq, args.group_size, args.coeff, gamma, args.expa_type)
    rounds = n // (args.batch_size_per_gpu * WORLD)
    model = SimDINO(backbone.to(device), head.to(device), loss_fn, args.clip_grad, rounds, dtype)
    if device.type == "cpu":  # there, fused attention has a slow backward pass in bf16
        torch.backends.cuda.enable_flash_sdp(dtype == torch.float32)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it splits graphs; blocks need none
        blocks = *model.student.backbone.blocks, *model.teacher.backbone.blocks
        for part in (*blocks, grayscale, blend, adjust_hue):
            part.compile(dynamic=False)
    if WORLD > 1:
        ddp = nn.parallel.DistributedDataParallel
        model.model = ddp(model.student, gradient_as_bucket_view=True)
    return model


def cosine_schedule(base, final, total_steps, warmup_steps=0):
    """(total_steps,) values: linear from 0 to base over the warm-up, then half a cosine."""
    progress = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * progress)) / 2
    return np.concatenate([np.linspace(0, base, warmup_steps), cosine])


def main():
    """Train; save after each epoch, every 15 minutes, at the end, and at a signal."""
    args, device = parse_args(), start_process()
    cuda, output = device.type == "cuda", Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "log.txt").touch()  # a folder that cannot be written is known at the start
    images, judged = open_images(args)
    batch, per_epoch = args.batch_size, len(images) // args.batch_size
    steps = args.epochs * per_epoch
    end = min(steps, args.max_steps or steps)
    model = build(args, device)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    millions = sum(p.numel() for p in model.params) / 1e6
    say(f"{WORLD} x {card}, {str(model.dtype)[6:]}: {args.arch}, {millions:.1f} M parameters")
    shares = f"{model.rounds} rounds x {WORLD} processes x {args.batch_size_per_gpu}"
    say(f"a step: {batch} images = {shares}; {steps} steps = {args.epochs} epochs of {per_epoch}")

    # Start, or resume. metrics: a row for each finished step of the current epoch
    path, state = output / "checkpoint.pth", {"epoch": 0, "log": [], "metrics": []}
    run = vars(args) | {"images": hashlib.sha256(b"\0".join(images.names)).hexdigest()[:16]}
    if any(all_gather(path.exists())):
        state = restore(path, run, model)
    elif args.pretrained_weights:
        load_pretrained(args.pretrained_weights, model)
    log, metrics = state["log"], state["metrics"]
    del metrics[per_epoch - 1 :]  # with --resume_anyway, the epoch may now be shorter
    done = state["epoch"] * per_epoch + len(metrics)
    state |= {"step": done, "args": run}
    if len({*all_gather((run["images"], done))}) > 1:
        sys.exit("the processes find different images or checkpoints: they have to share a disk")

    # Schedules, one value a step
    warmup = int(args.warmup_epochs * per_epoch)
    lr = cosine_schedule(args.lr * batch / 256, args.min_lr, steps, warmup).tolist()
    wd = cosine_schedule(args.weight_decay, args.weight_decay_end, steps).tolist()
    momentum = cosine_schedule(args.momentum_teacher, 1.0, steps).tolist()

    # Of the micro-batches of a step, process p takes number p, WORLD + p, 2 WORLD + p, ...
    caught, parts = catch_signals(), model.rounds * WORLD
    items = range(done * parts + PROCESS, end * parts, WORLD)
    workers = {"num_workers": args.num_workers, "pin_memory": cuda, "worker_init_fn": catch_signals}
    workers["timeout"] = 900 * bool(args.num_workers)  # seconds: a worker that hangs ends the run
    data = iter(DataLoader(MicroBatches(images, args), batch_size=None, sampler=items, **workers))
    saved, chunk = time.monotonic(), 3
    while True:
        epoch, i = divmod(done, per_epoch)
        due = judged and i == 0 and (epoch % args.eval_freq == 0 or done >= end)
        if due and (not log or log[-1]["knn"] is None):
            accuracy = knn_accuracy(*(embed(model, split, workers) for split in judged))
            say(f"k-NN accuracy after epoch {epoch}: {accuracy:.1f} %")
            if log:
                log[-1]["knn"] = accuracy
                save(path, model, state)
        if done >= end:
            break

        # A chunk of at most 10 steps, about 5 seconds, in which nothing waits for the device
        clock, waited, new, unread = time.monotonic(), 0.0, [], []
        if cuda and i == 0:
            torch.cuda.reset_peak_memory_stats()  # the peak of training, not of k-NN
        for step in range(done, min(done + chunk, done - i + per_epoch, end)):
            asked = time.monotonic()
            micro_batches = [next(data) for _ in range(model.rounds)]
            waited += time.monotonic() - asked
            unread += chain(*(files for *_, files in micro_batches))
            means, z_s, z_t = model.step(micro_batches, lr[step], wd[step], momentum[step])
            new.append(means)

        # The host waits for the device, and the processes exchange what they have
        new, now, k = torch.stack(new).tolist(), time.monotonic(), len(new)
        more = [WORLD * len(unread) / k, waited / k, (now - clock) / k]
        told = [row + more for row in new], unread, max(caught, default=0), now - saved > 900
        rows, files, signals, late = zip(*all_gather(told))
        rows, done, number = np.mean(rows, axis=0), done + k, max(signals)
        check(np.isfinite(rows).all() and model.scaler.get_scale() >= 1, done)  # 1 without fp16
        named = round(sum(row[-3] for row in metrics))  # at most three in an epoch
        for file in [*chain(*files)][: max(0, 3 - named)]:
            say(f"another image takes the place of one that cannot be read: {file}")
        metrics += rows.tolist()
        chunk = int(np.clip(5 / rows[0, -1], 1, 10))
        over = done % per_epoch == 0
        rank = effective_rank(((z_s[:2] + z_t) / 2).flatten(0, 1))
        loss, comp, expa, bad, wait, seconds = np.mean(metrics, axis=0).tolist()
        line = f"epoch {epoch + 1}/{args.epochs} step {done}/{steps} loss {rows[-1, 0]:.3f} "
        line += f"comp {rows[-1, 1]:.3f} expa {rows[-1, 2]:.3f} rank {rank:.1f} "
        line += f"{batch / seconds:.0f} img/s ETA {timedelta(seconds=int((end - done) * seconds))}"
        if on_terminal() or over or done >= end or now // 60 > clock // 60:
            say(line, stays=over or done >= end)
        if over:
            span = slice(done - per_epoch, done)
            entry = {"epoch": epoch, "train_loss": loss, "train_comp_loss": comp}
            entry |= {"train_expa_loss": expa, "train_lr": float(np.mean(lr[span]))}
            entry |= {"train_wd": float(np.mean(wd[span])), "rank": rank, "knn": None}
            entry |= {"dist": (z_s[:2] - z_t).norm(dim=-1).mean().item(), "img_s": batch / seconds}
            entry |= {"data_wait": wait / seconds, "bad_images": round(bad * per_epoch)}
            entry["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
            if log and rank < min(2, 1.05 * log[-1]["rank"]):  # low, and not on its way up
                text = "a larger --group_size or --gamma, a smaller --eps_sq or a lower --lr"
                say(f"warning: collapse, all features are alike: try {text}")
            log.append(entry)
            metrics.clear()
        state |= {"step": done, "epoch": done // per_epoch}
        if over and args.saveckp_freq and epoch % args.saveckp_freq == 0:
            save(output / f"checkpoint{epoch:04}.pth", model, state)
        if number or max(late) or over or done >= end:
            save(path, model, state)
            saved = time.monotonic()
        if number:
            say(f"{signal.Signals(number).name}: saved {path} at step {done}; rerun to resume")
            os._exit(128 + number)
    if WORLD > 1:
        time.sleep(0.2)  # gloo's threads must finish, or PyTorch 2.6 would wait for ever
        dist.destroy_process_group()
    atexit.unregister(os._exit)


# ====================================================================== 3. What the run stands on

# ----------------------------------------------------------------------- the processes, and signals


def start_process():
    """The device of this process, which joins the others."""
    atexit.register(os._exit, 1)  # Python would wait for workers, which catch signals; see main()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", GPU) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif torch.version.cuda:
        say(f"no GPU, so on the CPU; an NVIDIA card needs a driver for CUDA {torch.version.cuda}")
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def all_gather(value):
    """The values of all processes, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def on_terminal():
    return getattr(sys.stdout, "isatty", bool)()  # it may be None, or what a notebook puts there


def say(text, stays=True):
    """Print on the first process; on a terminal, the next line replaces one that does not stay."""
    if on_terminal():  # clear the line; cut one that does not stay, so that it does not wrap
        text = "\r\033[K" + text[: None if stays else shutil.get_terminal_size().columns - 1]
    try:
        if PROCESS == 0:
            print(text, end="\n" if stays or not on_terminal() else "", flush=True)
    except OSError:  # a closed terminal or pipe costs the line, not the run
        sys.stdout = None


def catch_signals(worker=None):
    """A list to which signals are added from now on; the process saves, then ends itself. Ctrl-C
    after a first signal ends it at once. Workers catch signals to outlive them until it ends."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if PROCESS == 0 and worker is None:
            with suppress(Exception):  # without print(), which it may have interrupted
                os.write(sys.stderr.fileno(), b"\nends soon, or after k-NN; at once: Ctrl-C\n")

    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    for number in signal.Signals:  # under nohup SIGHUP stays ignored
        if number.name in names and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return caught


# ---------------------------------------------------------------------- the images and their labels

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
EXTENSIONS += (".ppm", ".pgm")
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE", "lost+found")  # names that begin so are skipped


def load_image(path):
    """An image that Pillow reads -> uint8 (3, H, W), RGB on white, upright by its EXIF data.

    Of several frames, the first. Grayscale of more than 8 bits is stretched from its own lowest to
    its highest value. OSError for what cannot be read, and for more than 179 million pixels,
    Pillow's limit: a file of a few bytes may claim any number of them.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            tag, raw = getattr(image, "tag_v2", {}).get, str(image.tile)  # tag: of a TIFF
            deep = max(tag(258, [8])) > 8 or ";16" in raw
            misread = [
                tag(277, 1) > len(image.getbands()),  # it drops bands beyond colours
                deep and (tag(284) == 2 or tag(262) == 0),  # band after band; white is 0
                2 in tag(339, []) and image.mode == "L",  # signed bytes
                "libtiff" in raw and ("32B" in raw or "16BS" in raw),  # compressed, big-endian
            ]
            if any(misread):
                raise ValueError("a kind of TIFF that Pillow misreads")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip at 255
                pixels = np.asarray(image, dtype=float)
                finite = pixels[np.isfinite(pixels)]
                pixels = np.nan_to_num((pixels - finite.min()) / max(np.ptp(finite), 1e-12))
                image = Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
            elif deep and max(high for _, high in image.getextrema()[:3]) < 64:
                raise ValueError("16-bit colours below 2^14: Pillow reads the upper 8 bits alone")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image if image.mode == "RGB" else image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception as error:  # there is no end to what a decoder may raise
        raise OSError(f"{os.fspath(path)!a} ({' '.join(str(error).split())})") from error


class Images(Dataset):
    """Item epoch * len + i: transform(image i), its label, and which file could not be read, or "".

    What is drawn for it depends on (seed, epoch, i) alone, not on the worker. Another image, drawn
    likewise, takes the place of one that cannot be read.
    """

    def __init__(self, root, names, labels, transform, seed=0):
        self.root, self.transform, self.seed = str(root), transform, seed
        self.names, self.labels = np.array(names), np.array(labels)  # arrays: workers share them

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, index = divmod(key, len(self))
        seed, problem = seed_from(self.seed, epoch, index), ""
        torch.default_generator.manual_seed(seed)  # seeds the CPU's generator only
        for attempt in range(1000):
            try:
                image = load_image(os.path.join(self.root, os.fsdecode(self.names[index])))
                return self.transform(image), self.labels[index], problem
            except OSError as error:
                problem = problem or str(error)
                index = np.random.default_rng((seed, attempt)).integers(len(self))
        raise OSError(f"none of 1000 images in {self.root} can be read, nor {problem}")


def find_images(root):
    """Sorted names (bytes, relative to root) of the images below root, each folder visited once;
    the number of all other files by their ending; real paths of folders and of linked images."""
    names, others, seen, folders, links = [], Counter(), set(), [root], []
    while folders or links:
        folder = (folders or links).pop()  # links last, so that a folder keeps its own name
        real = os.path.realpath(folder)
        entries = [] if real in seen else sorted(os.scandir(folder), key=lambda entry: entry.name)
        seen.add(real)
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                continue
            linked = entry.is_symlink()
            exists = not linked or os.path.exists(entry)  # not a broken link, nor one to itself
            if exists and entry.is_dir():
                (links if linked else folders).append(entry.path)
            elif exists and entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                names.append(os.fsencode(entry.path)[len(os.fsencode(root)) + 1 :])
                if linked:
                    seen.add(os.path.realpath(entry))
            else:
                others[os.path.splitext(entry.name)[1]] += 1
    return sorted(names), others, seen


def find_data(root):
    """[(folder, names, labels)], label -1 for none: of the images to train on and, where k-NN is
    possible, of those to judge by. Says what there is, what is not used, and why no k-NN."""
    used = [name for name in ("train", "val", "test") if os.path.lexists(root / name)][:2]
    if "train" not in used:
        used = [""]
    elif unused := [x for x in os.listdir(root) if x not in used and not x.startswith(HIDDEN)]:
        unused.sort(key=lambda name: (os.path.isfile(root / name), name))  # folders first
        say(f"not used: {', '.join(unused[:5])}{', ...' * (len(unused) > 5)} in {root}")
    splits, places, classes = [], [], None
    for folder in [root / name for name in used]:
        names, others, seen = find_images(folder)
        places.append(seen)
        firsts = [os.fsdecode(name).rpartition(os.sep)[0].split(os.sep)[0] for name in names]
        here = sorted({*firsts} - {""})  # the first folder of a name, if it has one, is its class
        classes = here if classes is None else classes
        index = {name: i for i, name in enumerate(classes)}
        splits.append((folder, names, [index.get(name, -1) for name in firsts]))
        say(f"{folder}: {len(names)} images, {len(here)} class folders {', '.join(here[:3])}")
        if others:
            say(f"not read: {others.total()} files, with endings {dict(others.most_common(5))}")
    # Of the first and the last split, real folders, linked images, and the folders of these
    first, last = [{*seen, *map(os.path.dirname, seen)} for seen in (places[0], places[-1])]
    unknown, common = {*here} - {*classes}, places[0] & last or places[-1] & first
    if not common and here and len(classes) > 1 and not unknown:
        return splits
    text = f"; not in train/: {', '.join(sorted(unknown)[:3])}" if unknown else ""
    say(f"no k-NN accuracy: it needs train/ and other images of its classes in val/ or test/{text}")
    return splits[:1]


def open_images(args):
    """Images to train on; Images to learn from and to judge by for k-NN, or none."""
    root = Path(args.output_dir, "patterns") if args.data_path is None else Path(args.data_path)
    if args.data_path is None and PROCESS == 0 and not root.exists():
        render_patterns(root)
    all_gather("the patterns are drawn")
    splits = find_data(root)
    n, in_round = len(splits[0][1]), args.batch_size_per_gpu * WORLD
    if n < args.batch_size:
        fit = n // in_round * in_round or min(n, args.group_size) // WORLD * WORLD
        advice = f"try --batch_size {fit}" if fit else "give another --data_path"
        sys.exit(f"{n} images in {splits[0][0]}, fewer than a step: {advice}")
    side, scales = args.global_crops_size, (args.global_crops_scale, args.local_crops_scale)
    crop = MultiCrop(side, args.local_crops_size, *scales, args.local_crops_number)
    images, center = Images(*splits[0], crop, args.seed), partial(center_crop, size=side)
    judged = [Images(*split, center) for split in splits if splits[1:] and args.eval_freq]
    for some in [images, *judged]:
        some[0]  # raises if no image can be read
    return images, judged


# -------------------------------------------------------------------------------- the built-in data


def draw_pattern(kind, rng, size=32):
    """One of ten patterns at random angle, scale, phase, polarity, contrast: a grayscale image.

    Half of its pixels are light and half dark, so that brightness tells nothing of the kind.
    """
    angle, cells = rng.uniform(0, 2 * np.pi), rng.uniform(2.2, 4.2)
    y, x = (np.mgrid[: 2 * size, : 2 * size] / (2 * size) - 0.5) * cells
    p = x * np.cos(angle) + y * np.sin(angle) + rng.uniform()
    q = y * np.cos(angle) - x * np.sin(angle) + rng.uniform()
    u, v = abs(p % 1 - 0.5), abs(q % 1 - 0.5)  # distances from the middle of a cell
    bond = abs((p + 0.5 * (np.floor(q) % 2)) % 1 - 0.5)  # every other row half a cell on
    odd = (np.floor(p) + np.floor(q)) % 2
    height = (
        u,  # stripes
        (p % 1 - 0.5) * (q % 1 - 0.5),  # checks
        np.hypot(u, v),  # discs
        abs(np.hypot(u, v) - 0.3),  # rings
        np.maximum(u, v),  # squares
        abs((p + v) % 1 - 0.5),  # zigzags
        np.maximum(bond, v),  # bricks
        np.where(odd, abs(2 * p % 1 - 0.5), abs(2 * q % 1 - 0.5)),  # weave
        p % 1 - 2 * v,  # triangles
        np.hypot(bond, q % 1),  # scallops
    )[kind]
    light = np.sign(height - np.median(height)) * rng.choice([-1, 1])
    light = light.reshape(size, 2, size, 2).mean((1, 3))
    noise = rng.normal(0, rng.uniform(3, 15), (size, size))
    light = 128 + rng.uniform(-15, 15) + rng.uniform(50, 110) * light + noise
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def render_patterns(root):
    """The built-in data: PNG files root/{train,val}/<kind>/<number>.png, always the same ones."""
    temporary = Path(f"{root}.partial")
    for split, count in ("train", 320), ("val", 80):
        for kind, number in product(range(10), range(count)):
            file = temporary / split / str(kind) / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_pattern(kind, np.random.default_rng((split == "val", kind, number))).save(file)
    temporary.rename(root)


# ---------------------------------------------------------------------------------------- the k-NN


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size): for 224, Resize(256), CenterCrop(224) if it is larger."""
    short = min(image.shape[1:])
    image = TF.center_crop(image, [min(side, 2 * short) for side in image.shape[1:]])  # trim
    short = max(size, min(short, size * 8 // 7))
    image = TF.resize(image, short, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, size)


@torch.no_grad()
def embed(model, images, workers):
    """On all processes: unit features (n, D) of the teacher's backbone and labels (n,), of the
    images that have a label and can be read."""
    rows, share = [], math.ceil(len(images) / WORLD)  # equal shares: some images are taken twice
    chosen = [i % len(images) for i in range(PROCESS * share, (PROCESS + 1) * share)]
    for x, label, problems in DataLoader(images, 256, sampler=chosen, **workers):
        with model.autocast:
            z = model.teacher.backbone(normalize(x.to(model.device) / 255))
        label[torch.tensor([problem > "" for problem in problems])] = -1
        rows.append(torch.cat([F.normalize(z.float(), dim=-1), label[:, None].to(z.device)], dim=1))
    rows = SimDINOLoss.gather(torch.cat(rows))[: len(images)]
    rows = rows[rows[:, -1] >= 0]
    if len(rows) < len(images):
        say(f"k-NN: {len(images) - len(rows)} images have no label or are unreadable: left out")
    return rows[:, :-1], rows[:, -1].long()


def knn_accuracy(train, val, k=20, temperature=0.07):
    """Top-1 accuracy on val, %: the k nearest of train vote with exp(cosine / temperature).

    train, val: unit features (n, D) and labels (n,).
    """
    (bank, labels), hits = train, 0
    for z, y in zip(*(column.split(256) for column in val)):
        cosine, nearest = (z @ bank.mT).topk(min(k, len(bank)))
        votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == y).sum().item()
    return 100 * hits / len(val[1])


# ------------------------------------------------------------------------- weights and checkpoints


def read(path):
    """The dictionary in a .pth file; no code in it is run. ValueError for all else."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # there is no end to what a damaged file may make its reader raise
        raise ValueError(f"missing, damaged or not plain data: {type(error).__name__}") from error


def load_pretrained(path, model):
    """Start student and teacher from weights named as here, in DINO or in timm. Positions of
    another grid are interpolated; the head is taken if its shapes are this head's."""
    backbone, head = {}, {}
    try:
        state = read(path)
        for name, tensor in state.get("teacher", state.get("model", state)).items():
            name = name.replace("module.", "").replace("backbone.", "")
            (head if name.startswith("head.") else backbone)[name.removeprefix("head.")] = tensor
        cls, grid = backbone["pos_embed"].tensor_split([1], dim=1)
        grid = grid.unflatten(1, (math.isqrt(grid.shape[1]), -1)).permute(0, 3, 1, 2).float()
        size = 2 * [model.student.backbone.side]
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True).flatten(2).mT
        backbone["pos_embed"] = torch.cat([cls, grid], dim=1)
        model.student.backbone.load_state_dict(backbone)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        other = f"eval_linear.py --weights {path} --export start.pth reads other formats"
        why = f"{' '.join(str(error).split())}; is it of this --arch and --patch_size?"
        sys.exit(f"cannot start from {path}: {why} {other}")
    fits = {k: x.shape for k, x in model.student.head.state_dict().items()}
    head = {k: x for k, x in head.items() if k in fits and x.shape == fits[k]}
    if len(head) == len(fits):
        model.student.head.load_state_dict(head)
    for p in model.params if WORLD > 1 else []:  # path may be another file on another machine
        dist.broadcast(p.data, src=0)
    model.teacher.load_state_dict(model.student.state_dict())
    say(f"starts from {path}: backbone{' and head' if len(head) == len(fits) else ''}")


def check(finite, step):
    if not finite:
        sys.exit(f"not finite by step {step}: try --amp off, or --resume_anyway and a lower --lr")


def save(path, model, state):
    """Write model and state to path, which is never half written, and the log beside it."""
    numbers = [*model.params, *chain(*(x.values() for x in model.optimizer.state.values()))]
    check(all(x.isfinite().all() for x in numbers), state["step"])
    if PROCESS == 0:
        partial_path = path.with_suffix(f".partial{os.getpid()}")  # two runs may share a folder
        try:
            with partial_path.open("wb") as file:
                torch.save(state | {k: x.state_dict() for k, x in model.parts.items()}, file)
                file.flush()
                os.fsync(file.fileno())
            lines = "".join(json.dumps(entry) + "\n" for entry in state["log"])
            path.with_name("log.txt").write_text(lines)
            partial_path.replace(path)
        except (OSError, RuntimeError) as error:  # torch.save's has the disk's as context
            partial_path.unlink(missing_ok=True)
            sys.exit(f"cannot write {path}: {error.__context__ or error}")
    all_gather("saved: from here on, a process may end")


def restore(path, run, model):
    """Load the checkpoint at path into model, if it is of this run; -> what else it holds."""
    try:
        state = read(path)
        old = state.get("args", {})
        changed = [key for key in run if key not in FREE and old.get(key) != run[key]]
        if changed and not run["resume_anyway"]:
            text = "; ".join(f"{key} {old.get(key)}, not {run[key]}" for key in changed)
            ways = "give another --output_dir, or --resume_anyway"
            sys.exit(f"{path} is of another run ({text}): {ways}")
        for name, part in model.parts.items():
            if values := state.pop(name):  # empty: the scaler of a run without fp16
                part.load_state_dict(values)
        text = ", so --pretrained_weights is not read" if run["pretrained_weights"] else ""
        say(f"resumed {path}, saved at step {state['step']}{text}")
        return {key: state[key] for key in ("epoch", "log", "metrics")}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        sys.exit(f"cannot resume {path}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no valid text
    try:
        main()
    except OSError as error:  # its text names a file or folder, and what is wrong with it
        sys.exit(str(error))
