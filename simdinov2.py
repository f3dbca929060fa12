# SPDX-License-Identifier: MIT
"""SimDINOv2: DINOv2 without prototypes, centering, KoLeo or temperatures, in one file.

    torchrun simdinov2.py                                             # the built-in data
    torchrun --nproc_per_node=W simdinov2.py --data_path /imagenet --output_dir runs/vitb16_v2
    torchrun simdinov2.py --data_path FOLDER --output_dir runs/mine   # any folder of images

On one device, python does the same as torchrun.

Read simdino.py first: the diff of the two files is what this one adds. DINOv2 adds a second task to
DINO, the masked patches of iBOT. In half of the global crops of a micro-batch, 10 to 50 % of the
patches are masked for the student: a learned token takes the place of their embeddings. For these
patches, the student's head gives unit vectors p_s. Each is pulled to p_t, the teacher's vector of
the same patch. The teacher's crops are not masked.

    loss = mean ½‖z_s - z_t‖² - γ R(Z)        z_s and z_t: of two different views of an image
         + mean ½‖p_s - p_t‖²                 mean over the masked patches of a global crop (0 if it
                                              has none), then over all global crops

CLS tokens and patches share the head. R is computed from CLS rows only. Nothing keeps the patch
rows apart directly; perhaps they do not collapse because CLS tokens are made from patch tokens.

What differs from DINOv2's default configuration, whose values are in brackets:

    registers             4 (0)           tokens without a place in the image. Without them, large
                                          ViTs store what they know of the whole image in the
                                          tokens of plain background patches
    LayerScale            0.1 (1e-5)      factors of each branch, at the start
    stochastic depth      0.2 (0.3)       share of the samples for which a branch is not computed
    momentum_teacher      0.9 (0.992)     at the start
    local crops           10 (8)
    area of global crops  0.4 to 1 (0.32 to 1)
    area of local crops   0.05 to 0.4 (0.05 to 0.32)
    positions             interpolated with antialiasing (without)

A step of the published run, in groups of 128 images:

    --batch_size = rounds x processes x --batch_size_per_gpu        1024 = 1 x 8 x 128

The first command draws ten kinds of patterns and trains on them, in three minutes on two CPU cores,
with LayerScale 1, no stochastic depth and all layers at one learning rate. k-NN accuracy rises from
19 % to 65.5, 67.9 and 66.5 % (seeds 0 to 2). The log leaves out two constants: 1 of the first term,
and 0.5 of the patches, as half of the crops have a mask. For seed 0, and in a collapse:

            step 10   step 400   collapse
    loss    -1.287     -1.818    -1.563    -comp - expa - patch
    comp     0.910      0.267     1        mean cosine of z_s and z_t
    expa     0.155      1.243     0.063    γ R. Here γ is 0.0195; in a collapse, R is 3.2
    patch    0.222      0.308     0.5      mean cosine of p_s and p_t. At best 0.5, as half of the
                                           crops have no mask and count as 0
    rank     1.6       60.6       1        directions in use by 64 images x 2 views

Section 1 is the method: loss, model, views, one training step. Its code uses nothing of the others.
Section 2 is the run: the options, the images of a step, the training loop. Section 3 holds the
helpers of the run. The result is the teacher: torch.load(".../checkpoint.pth")["teacher"] has its
weights, backbone.* and head.*; eval_linear.py judges and exports them.
Paper: "Simplifying DINO via Coding Rate Regularization", Wu et al., ICML 2025, arXiv 2502.10385.
"Official" below is the authors' code, github.com/RobinWu218/SimDINO.
"""

import argparse
import atexit
import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import OrderedDict, defaultdict
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

# torchrun starts a process for each GPU. It sets the number of processes, and for each process its
# number and that of its GPU. A single process ignores the two: they may be left over from another
# run.
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PROCESS = 0
GPU = 0
if WORLD > 1:
    PROCESS = int(os.environ.get("RANK", "0"))
    GPU = int(os.environ.get("LOCAL_RANK", "0"))

# ==================================================================================== 1. The method

# ----------------------------------------------------------------------------------------- the loss


def coding_rate(z, eps_sq):
    """Coding rate R = ½ logdet(I + d / (n ε²) ZᵀZ) in nats: paper, eq. (8).

    z: (..., n, d), n rows of length 1 or less; eps_sq: ε² > 0. Returns (...), float32 or float64.
    R is roughly the logarithm of how many balls of radius ε fit in the volume that the rows span.
    With λ the eigenvalues of ZᵀZ, R = ½ Σ log(1 + d λ / (n ε²)). For rows of length 1, Σ λ = n, and
    R has bounds. It is smallest, ½ log(1 + d / ε²), when all rows are parallel: then one λ is n and
    the others are 0. It is largest when the rows use all directions alike, min(n, d) equal λ: then
    R is (n/2) log(1 + d / (n ε²)) for n <= d, else (d/2) log(1 + 1 / ε²). For n = 64 and d = 256:

        ε²      smallest    largest
        0.05       4.3       140.6
        0.4        3.2        76.7      as in the published models
        2          2.4        35.2

    In float32, near a collapse, R is off by up to 0.001 for ε² = 0.05, and 0.3 for ε² = 0.0001.
    """
    # Autocast would form ZᵀZ in half precision. Near a collapse, rounding can then move an
    # eigenvalue below -n ε² / d, and the logarithm is NaN. A small ε² makes this more likely.
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        n, d = z.shape[-2:]
        gram = z @ z.mT if n < d else z.mT @ z  # ZZᵀ and ZᵀZ share their non-zero eigenvalues
        eye = torch.eye(min(n, d), dtype=z.dtype, device=z.device)
        # cholesky_ex skips the error check, for which the CPU would wait for the GPU.
        factor, _ = torch.linalg.cholesky_ex(eye + d / (n * eps_sq) * gram)
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # ½ logdet(LLᵀ) = Σ log diag(L)


class SimDINOLoss(torch.nn.Module):
    """loss = -coeff comp - γ R. If coeff is 1, this is mean ½‖z_s - z_t‖² - 1 - γ R.

    comp (official name, from "compression") is the mean cosine of z_s and z_t, 1 - ½‖z_s - z_t‖²,
    over all pairs of a teacher's and a student's view of an image. A view is not paired with
    itself, as such a pair teaches no invariance. expa (from "expansion") is γ R.

    eps_sq: ε². In the published models it was 0.4: the official option is 0.05, but the official
    code divides the ZᵀZ of one GPU by the rows of all 8, which is 8 x 0.05 here. group_size: n, the
    images whose rows make one Z; None, or more than all images: all are one group. R is the mean
    over groups and the teacher's views. The published models had groups of 64 (SimDINOv2: 128).
    gamma: γ. None: default_gamma of the images of one call, on all processes. A step of several
    rounds is several calls: give the default_gamma of all its images.
    expa_type: a row of Z is z_s (0), or (z_s + z_t) / 2 (1, the official default). The latter is
    shorter than 1 where z_s and z_t differ.
    """

    def __init__(self, eps_sq=0.4, group_size=64, coeff=1.0, gamma=None, expa_type=1):
        super().__init__()
        if not eps_sq > 0:  # NaN is not
            raise ValueError("eps_sq must be positive")
        if group_size is not None and group_size < 1:
            raise ValueError("group_size must be positive, or None")
        if expa_type not in (0, 1):
            raise ValueError("expa_type must be 0 or 1")
        self.eps_sq = eps_sq
        self.group_size = group_size
        self.coeff = coeff
        self.gamma = gamma
        self.expa_type = expa_type

    def forward(self, student, teacher):
        """Returns the loss, and a dictionary of comp and expa without gradient.

        student: V views of B images, (V, B, d). teacher: the first G of these views, (G, B, d).
        Rows are scaled to length 1 (ProjectionHead's have it): longer rows would raise R without
        being more diverse. Groups of n = group_size images are formed of the images of each process
        if n divides B, else of those of all processes, which are gathered. ValueError if n divides
        neither. Not checked: that B is the same on all processes.
        """
        dtype = torch.promote_types(student.dtype, torch.float32)
        student = torch.nn.functional.normalize(student.to(dtype), dim=-1)
        teacher = torch.nn.functional.normalize(teacher.detach().to(dtype), dim=-1)
        V, B, d = student.shape
        G = teacher.shape[0]
        total = B * self.processes()
        if V < 2 or G > V:
            raise ValueError(f"{G} views of the teacher and {V} of the student make no pairs")
        if 1 < total < G:  # probably (images, views, d): the features would collapse
            raise ValueError(f"{G} views of {total} images: the order is (views, images, d)")

        # comp is a mean over images, so the mean of comp over processes is that of all images.
        cosine = (teacher[:, None] * student).sum(-1).mean(-1)  # (G, V), of each pair of views
        of_same_view = cosine.diagonal()  # G of the G V pairs
        comp = (cosine.sum() - of_same_view.sum()) / (G * (V - 1))

        z = student[:G]  # (G, B, d)
        if self.expa_type == 1:
            z = (z + teacher) / 2
        n = total if self.group_size is None else min(self.group_size, total)
        if B % n != 0:
            z = self.gather(z)  # (G, total, d)
        if z.shape[1] % n != 0:
            raise ValueError(f"group_size {n} divides neither {B} images nor the {total} of all")
        z = z.unflatten(1, (-1, n))  # (G, groups, n, d)
        gamma = self.default_gamma(d, total) if self.gamma is None else self.gamma
        expa = gamma * coding_rate(z, self.eps_sq).mean()
        return -self.coeff * comp - expa, {"comp": comp.detach(), "expa": expa.detach()}

    @staticmethod
    def default_gamma(d, images):
        """The authors' (d + b) / (d b), where b is the images of a step: for d = 256, 0.0059 at 512
        images and 0.0195 at 64."""
        return 1 / d + 1 / images

    @staticmethod
    def processes():
        # By the full name, so that the class and coding_rate can be copied with torch alone
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size()
        return 1

    @classmethod
    def gather(cls, z):
        """Rows (..., B, d) of all processes in their order; those of this one carry gradient."""
        world = cls.processes()
        if world == 1:
            return z
        own = z.detach().contiguous()
        rows = [torch.empty_like(own) for _ in range(world)]
        torch.distributed.all_gather(rows, own)
        # The value of z, as z - own is 0, and `world` times its gradient. For all processes compute
        # the same R, each with a gradient through its own rows alone, and DDP will average these.
        rows[torch.distributed.get_rank()] = own + world * (z - own)
        return torch.cat(rows, dim=-2)


def masked_patch_loss(student, teacher, masks):
    """Minus the mean cosine over a crop's masked patches, averaged over all 2 B crops.

    A crop without masked patches adds 0: if half of the crops have a mask, -0.5 is the best.
    student, teacher (M, d): unit rows of the masked patches, in the order of masks, bool (2 B, N).
    """
    cosine = (student * teacher.detach()).sum(-1)  # (M,)
    count = masks.sum(-1)  # masked patches of each crop
    weight_of_crop = 1 / count.clamp(min=1)
    # With output_size given, the CPU need not wait for the GPU to count the patches.
    weight = weight_of_crop.repeat_interleave(count, output_size=len(student))  # (M,)
    return -(cosine * weight).sum() / len(masks)


# ---------------------------------------------------------------------------------------- the model

OUT_DIM = 256  # d, the length of a row
ARCHS = {
    "vit_nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},  # built-in run
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """x times a learned factor for each channel. Small factors start a deep ViT close to the
    identity."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x):
        return x * self.gamma.to(x.dtype)  # in half precision under autocast


def add_branch(x, branch, keep):
    """x + branch(x). keep: (K,), the numbers of the samples that it is computed for, or None for
    all."""
    if keep is None:
        return x + branch(x)
    scale = x.shape[0] / keep.shape[0]  # so that the mean of a branch stays the same
    # x.index_add would do all this, but would keep the output of the branch for the backward pass.
    samples = x[keep]
    x = x.clone()
    x[keep] = samples + scale * branch(samples)
    return x


class Block(nn.Module):
    def __init__(self, dim, num_heads, layerscale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(  # the names are timm's
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )
        self.ls2 = LayerScale(dim, layerscale)

    def forward(self, x, keep=(None, None)):
        """keep: for the two branches, attention and MLP, an argument of add_branch."""
        x = add_branch(x, lambda x: self.ls1(self.attn(self.norm1(x))), keep[0])
        return add_branch(x, lambda x: self.ls2(self.mlp(self.norm2(x))), keep[1])


class VisionTransformer(nn.Module):
    """ViT with the parameter names of DINOv2, so that weights can be exchanged.

    forward: images (B, 3, H, W), H and W multiples of patch_size -> CLS features (B, D).
    ValueError for other sizes. drop_path_rate: the rate of stochastic depth in each block.
    grad_checkpointing: the backward pass computes the activations of a block again, so that they
    need not be kept.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.0,
        grad_checkpointing=False,
        num_register_tokens=4,
        layerscale=0.1,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.patch_size = patch_size
        self.side = img_size // patch_size
        self.num_features = embed_dim
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = grad_checkpointing
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)

    def position_embedding(self, h, w):
        """(1, 1 + h w, D) for h x w patches, interpolated from the grid of the training images."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        # As DINOv2's models with registers do
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x, masks=None):
        """(B, 3, H, W) -> (B, 1 + R + N, D): CLS token, registers, patch tokens. Registers have no
        position embedding."""
        h, w = x.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"{h} x {w} pixels: not multiples of patch size {self.patch_size}")
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position_embedding(h // self.patch_size, w // self.patch_size)
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def stochastic_depth(self, x):
        """The argument keep of each block, drawn for the samples of x. In training, each branch is
        computed for a share of 1 - drop_path_rate of them. How many these are is always the same,
        so that compiled code need not be compiled again."""
        depth = len(self.blocks)
        if not (self.training and self.drop_path_rate):
            return [(None, None)] * depth
        count = max(1, int(x.shape[0] * (1 - self.drop_path_rate)))
        order = torch.rand(depth, 2, x.shape[0], device=x.device).argsort(-1)
        return order[..., :count]  # (depth, 2 branches, count)

    def forward_features(self, x, masks=None):
        """Normed tokens by kind: x_norm_clstoken (B, D), x_norm_regtokens, x_norm_patchtokens.

        masks: bool (B, N), True for the patches that the mask token replaces.
        """
        x = self.prepare_tokens(x, masks)
        for block, keep in zip(self.blocks, self.stochastic_depth(x)):
            if self.training and self.grad_checkpointing:  # no block draws random numbers
                x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, keep)
        first_patch = 1 + self.register_tokens.shape[1]
        cls, registers, patches = self.norm(x).tensor_split([1, first_patch], dim=1)
        return {
            "x_norm_clstoken": cls[:, 0],
            "x_norm_regtokens": registers,
            "x_norm_patchtokens": patches,
        }

    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"]


class ProjectionHead(nn.Module):
    """Features (..., in_dim) -> unit rows (..., out_dim) in float32.

    After training the head is thrown away, and k-NN takes the backbone's features. The rows are
    trained to be the same for all crops of an image, whatever the colours and the scale of a crop.
    The features before the head still tell such crops apart, which other tasks may need.
    """

    def __init__(self, in_dim, hidden_dim=2048, out_dim=OUT_DIM):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim),
        )
        self.apply(init_weights)

    def forward(self, x):
        z = self.mlp(x)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


class Network(nn.Module):
    """A backbone, and the head that its CLS and patch tokens share."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views, index, masks=None):
        """Unit rows (V, B, d) of V views: batches (B, 3, H, W), two global ones first; and unit
        rows (M, d) of patches of the global views.

        index (M,): which patches, of all 2 B N in one row. masks: bool (2 B, N), where patches are
        replaced by the mask token. The teacher gets index, but no masks.
        """
        tokens = self.backbone.forward_features(torch.cat(views[:2]), masks)
        features = tokens["x_norm_clstoken"]
        if len(views) > 2:  # there are local views
            features = torch.cat([features, self.backbone(torch.cat(views[2:]))])
        patches = tokens["x_norm_patchtokens"].flatten(0, 1)[index]
        rows = self.head(torch.cat([features, patches]))
        z, p = rows.split([len(features), len(patches)])
        return z.unflatten(0, (len(views), -1)), p


# ---------------------------------------------------------------------- the views, and augmentation


class MultiCrop:
    """uint8 (3, H, W) -> list of uint8 views, two global ones first: random resized crops.

    A crop's share of the area is drawn from scale, its aspect from 3/4 to 4/3. Images differ in
    size, so each is cropped in the data-loading worker that decodes it. The rest of the
    augmentation is arithmetic on batches of crops of one size: the GPU does it (augment).
    """

    def __init__(
        self,
        global_size=224,
        local_size=96,
        global_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        local_crops=10,
    ):
        bicubic = InterpolationMode.BICUBIC
        global_crop = v2.RandomResizedCrop(global_size, global_scale, interpolation=bicubic)
        local_crop = v2.RandomResizedCrop(local_size, local_scale, interpolation=bicubic)
        self.crops = [global_crop] * 2 + [local_crop] * local_crops

    def __call__(self, image):
        return [crop(image) for crop in self.crops]


def block_masks(crops, side, probability, ratios, seed):
    """Bool (crops, side * side): which patches are masked, in rectangles, as DINOv2 draws them.

    int(crops * probability) random crops get a mask. ratios: the lowest and the highest share of
    the patches to mask. This range is cut into as many equal parts as there are masks, and each
    mask draws its share from its own part. Rectangles of about 4 patches to half the crop (fewer if
    fewer remain), aspect 0.3 to 1 / 0.3, are added until the share is reached, or 10 in a row are
    rejected: they do not fit, or mask nothing new, or too much. seed: of numpy's default_rng.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((crops, side, side), dtype=bool)
    masked = int(crops * probability)
    bounds = np.linspace(*ratios, masked + 1)  # mask i: a share between bounds i and i + 1
    for i in range(masked):
        remaining = int(side**2 * rng.uniform(bounds[i], bounds[i + 1]))  # patches to be masked
        rejected = 0
        while remaining > 0 and rejected < 10:
            rejected += 1
            largest = min(remaining, side**2 // 2)
            area = 4 + (largest - 4) * rng.random()  # uniform; largest may be below 4
            aspect = 0.3 ** rng.uniform(-1, 1)
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if max(h, w) < side:
                y = rng.integers(side - h + 1)
                x = rng.integers(side - w + 1)
                rectangle = masks[i, y : y + h, x : x + w]
                new = rectangle.size - rectangle.sum()
                if 0 < new <= remaining:
                    rectangle[:] = True
                    remaining -= new
                    rejected = 0
    return torch.from_numpy(rng.permutation(masks)).flatten(1)


def augment(views):
    """On the device: uint8 batches (B, 3, h, w), two global views first -> normalised float32.

    How often views are blurred and solarised is DINO's choice for each kind of view.
    """
    first, second, *local = views
    augmented = [photometric(first, blur=1.0), photometric(second, blur=0.1, solarize=0.2)]
    if local:
        augmented += photometric(torch.cat(local), blur=0.5).split(len(first))
    return augmented


def photometric(x, blur, solarize=0.0):
    """DINO's augmentation of uint8 x (B, 3, h, w): flip, jitter, grayscale, blur, solarisation.

    Each operation is drawn for each crop by itself; only the order of the four operations of jitter
    is one for the batch. blur, solarize: the probabilities that differ by view. The
    operations are torchvision's, up to rounding. h and w must be above 6, for the blur.
    """
    x = torch.where(uniform(x) < 0.5, x.flip(-1), x)
    x = x / 255
    x = torch.where(uniform(x) < 0.8, color_jitter(x), x)
    x = torch.where(uniform(x) < 0.2, TF.rgb_to_grayscale(x, 3), x)
    x = torch.where(uniform(x) < blur, gaussian_blur(x, sigma=uniform(x, 0.1, 2.0)), x)
    if solarize:
        x = torch.where((uniform(x) < solarize) & (x >= 128 / 255), 1 - x, x)
    return normalize_colors(x)


def uniform(x, low=0.0, high=1.0):
    """A random number for each image of x, (B, 1, 1, 1), drawn on its device."""
    return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)


def color_jitter(x):
    """Brightness, contrast, saturation and hue of x in [0, 1], in an order drawn for the batch."""
    operations = ["brightness", "contrast", "saturation", "hue"]
    for number in torch.randperm(4).tolist():
        if operations[number] == "brightness":
            x = blend(x, torch.zeros_like(x), uniform(x, 0.6, 1.4))
        elif operations[number] == "contrast":
            gray_level = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
            x = blend(x, gray_level, uniform(x, 0.6, 1.4))
        elif operations[number] == "saturation":
            x = blend(x, TF.rgb_to_grayscale(x), uniform(x, 0.8, 1.2))
        else:
            x = adjust_hue(x, uniform(x, -0.1, 0.1))
    return x


def blend(x, other, factor):
    """x at factor 1, other at factor 0; kept in [0, 1]."""
    return torch.lerp(other, x, factor).clamp(0, 1)


def adjust_hue(x, shift):
    """Rotate the hue of x, (B, 3, H, W) in [0, 1], by shift (B, 1, 1, 1) turns, through HSV."""
    r, g, b = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    # The hue in sixths of a turn, times chroma. Where the largest channel is blue, the hue is
    # 4 + (r - g) / chroma; where green, 2 + (b - r) / chroma; where red, (g - b) / chroma.
    hue_chroma = r - g + 4 * chroma
    hue_chroma = torch.where(value == g, b - r + 2 * chroma, hue_chroma)
    hue_chroma = torch.where(value == r, g - b, hue_chroma)
    hue = hue_chroma / chroma.clamp(min=1e-8) + 6 * shift
    # Back to RGB. This is the usual formula of all three channels at once.
    k = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6  # (B, 3, H, W)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius=6):  # radius: 3 times the largest sigma, 2
    """Blur each image of x (B, 3, H, W) by its own sigma (B, 1, 1, 1), borders reflected."""
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    # Gaussian weights of sum 1: softmax takes the exponential and divides by the sum.
    kernels = torch.softmax(-((offsets / sigma.view(-1, 1)) ** 2) / 2, dim=-1)  # (B, taps)
    kernels = kernels.repeat_interleave(3, dim=0)[:, None, None]  # (3 B, 1, 1, taps)
    # Each channel of each image becomes a channel of one image, convolved by its own kernel.
    padded = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)  # (3 B, H + 12, W + 12)
    blurred = F.conv2d(padded, kernels, groups=len(kernels))  # along the rows
    blurred = F.conv2d(blurred, kernels.mT, groups=len(kernels))  # along the columns
    return blurred.view_as(x)


MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)


def normalize_colors(x):
    """(B, 3, H, W) in [0, 1] -> mean 0 and variance 1 over ImageNet."""
    # non_blocking: the CPU does not wait for the GPU
    mean = torch.tensor(MEAN).view(3, 1, 1).to(x.device, non_blocking=True)
    std = torch.tensor(STD).view(3, 1, 1).to(x.device, non_blocking=True)
    return (x - mean) / std


# ---------------------------------------------------------------------------------- a training step


# What a step returns for the log: the names on the terminal, and those in log.txt
FIGURES = {
    "loss": "train_loss",
    "comp": "train_comp_loss",
    "expa": "train_expa_loss",
    "patch": "train_patch_cosine",
}


class SimDINO:
    """Student, teacher and optimizer, and the step that trains them.

    backbone: maps images (B, 3, H, W) of two sizes to features (B, D), as VisionTransformer does,
    and gives tokens by forward_features; it has no buffers. head: maps features to unit rows.
    rounds: micro-batches that this process takes in a step. patch_weight: of the masked patches'
    loss. layerwise_decay, patch_embed_lr_mult: see parameter_groups.

    R prevents collapse if the learning rate is not too high: in the example below, which has no
    warm-up, the rank stays at 2 or less with 1e-3. A teacher is used as in DINO: the mean of many
    past students is a steadier target than the student, and has better features.

        images = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8)  # or a list of such images
        make_views = MultiCrop(32, 16, local_crops=6)
        backbone = VisionTransformer(32, 8, **ARCHS["vit_nano"], layerscale=1.0)
        model = SimDINO(backbone, ProjectionHead(96, 512), SimDINOLoss())
        for step in range(100):
            views = default_collate([make_views(image) for image in images])
            masks = block_masks(128, 4, 0.5, (0.1, 0.5), step)  # of 2 x 64 crops, 4 x 4 patches
            index = masks.flatten().nonzero().flatten()
            micro_batches = [(step, views, masks, index)]  # step: the seed of what is drawn
            means, rows = model.step(micro_batches, lr=1e-4, weight_decay=0.04, momentum=0.9)
            print(step, means.tolist(), effective_rank(rows))  # FIGURES; rank
    """

    def __init__(
        self,
        backbone,
        head,
        loss_fn,
        clip_grad=3.0,
        rounds=1,
        dtype=torch.float32,
        patch_weight=1.0,
        layerwise_decay=0.9,
        patch_embed_lr_mult=0.2,
    ):
        self.student = Network(backbone, head)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.model = self.student  # build() may put DistributedDataParallel around it
        self.loss_fn = loss_fn
        self.clip_grad = clip_grad
        self.rounds = rounds
        self.dtype = dtype
        self.patch_weight = patch_weight
        self.params = list(self.student.parameters())
        self.device = self.params[0].device
        groups = parameter_groups(self.student, layerwise_decay, patch_embed_lr_mult)
        # Not in the groups: loading a checkpoint would bring back its own, also where
        # --resume_anyway is to change them.
        self.lr_scales = [group.pop("lr_scale") for group in groups]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.saved = {  # the parts of a checkpoint that hold tensors
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }

    def step(self, micro_batches, lr, weight_decay, momentum):
        """The whole method: one update of the weights, from `rounds` micro-batches of this process.

        A micro-batch is (seed, views, masks, index): the views as MultiCrop gives them, each a
        batch; masks of block_masks; index (M,), the places of True in masks.flatten(), found
        before, as the CPU would have to wait for a GPU that finds them.
        The gradient is the mean over the micro-batches of all processes. Returns for the log: a
        tensor of the FIGURES, means over the micro-batches of this process; and of the last
        micro-batch, (z_s + z_t) / 2 of both global views, (2 B, d).
        """
        figures = []
        self.optimizer.zero_grad()
        for number, (seed, views, masks, index) in enumerate(micro_batches, start=1):
            torch.manual_seed(seed)  # for augmentation and stochastic depth
            views = augment([view.to(self.device, non_blocking=True) for view in views])
            masks = masks.to(self.device, non_blocking=True)
            index = index.to(self.device, non_blocking=True)
            is_last = number == self.rounds
            self.model.require_backward_grad_sync = is_last  # DDP, if any, averages once a step
            with self.autocast:
                with torch.no_grad():
                    z_t, p_t = self.teacher(views[:2], index)  # (2, B, d), (M, d)
                z_s, p_s = self.model(views, index, masks)  # (V, B, d), (M, d)
            loss, stats = self.loss_fn(z_s, z_t)
            patch_loss = masked_patch_loss(p_s, p_t, masks)
            loss = loss + self.patch_weight * patch_loss
            stats["patch"] = -patch_loss.detach()  # the mean cosine, 0 for crops without mask
            self.scaler.scale(loss / self.rounds).backward()
            stats["loss"] = loss.detach()
            figures.append(torch.stack([stats[name] for name in FIGURES]))

        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:  # backbone and head, each as a whole, as DINOv2 does
            nn.utils.clip_grad_norm_(self.student.backbone.parameters(), self.clip_grad)
            nn.utils.clip_grad_norm_(self.student.head.parameters(), self.clip_grad)
        for group, lr_scale in zip(self.optimizer.param_groups, self.lr_scales):
            group["lr"] = lr * lr_scale
            group["weight_decay"] = weight_decay * group["decay_scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():  # the teacher: exponential moving average of the student
            torch._foreach_lerp_(list(self.teacher.parameters()), self.params, 1 - momentum)
        rows = (z_s[:2].detach() + z_t).flatten(0, 1) / 2
        return torch.stack(figures).mean(0), rows

    def is_finite(self):
        """Whether all weights and AdamW's moments are finite. The CPU waits for the GPU here."""
        tensors = [*self.params, *self.teacher.parameters()]
        for state in self.optimizer.state.values():
            tensors += state.values()
        return torch.stack(torch._foreach_norm(tensors)).isfinite().all().item()


def parameter_groups(student, layerwise_decay, patch_embed_lr_mult):
    """AdamW's groups of parameters. decay_scale: 0 for biases, norms and LayerScale, which have one
    dimension. lr_scale: 1 for the head and the last norm, layerwise_decay for the last block, its
    square for the block before, and so on down to embeddings and tokens; for the patch embedding
    also times patch_embed_lr_mult."""
    depth = len(student.backbone.blocks)
    groups = defaultdict(list)
    for name, p in student.named_parameters():
        block = re.match(r"backbone\.blocks\.(\d+)", name)
        if name.startswith(("backbone.norm.", "head.")):
            distance = 0
        elif block:
            distance = depth - int(block[1])
        else:
            distance = depth + 1
        is_patch_embed = name.startswith("backbone.patch_embed.")
        decay_scale = float(p.ndim > 1)
        groups[decay_scale, distance, is_patch_embed].append(p)
    options = []
    for (decay_scale, distance, is_patch_embed), params in groups.items():
        lr_scale = layerwise_decay**distance
        if is_patch_embed:
            lr_scale *= patch_embed_lr_mult
        options.append({"params": params, "decay_scale": decay_scale, "lr_scale": lr_scale})
    return options


# ======================================================================================= 2. The run

# -------------------------------------------------------------------------------------- the options

# The defaults of the built-in run, where they are not the paper's ImageNet recipe
SMALL = {
    "arch": "vit_nano",
    "patch_size": 8,
    "hidden_dim": 512,
    "drop_path_rate": 0.0,
    "layerscale": 1.0,
    "global_crops_size": 32,
    "global_crops_scale": [0.25, 1.0],
    "local_crops_size": 16,
    "local_crops_scale": [0.15, 0.4],
    "local_crops_number": 6,
    "epochs": 8,
    "batch_size": 64,
    "lr": 0.005,
    "layerwise_decay": 1.0,
    "patch_embed_lr_mult": 1.0,
    "warmup_epochs": 1.0,
    "weight_decay_end": 0.04,
    "momentum_teacher": 0.8,
    "saveckp_freq": 0,
    "eval_freq": 4,
}
# Options that may change when a run is resumed. With any other change, restore() refuses.
MAY_CHANGE_ON_RESUME = {
    "data_path",  # the images are compared instead: see start_run
    "output_dir",
    "pretrained_weights",
    "small_images",
    "resume_anyway",
    "epochs",  # the schedules then follow the new number
    "max_steps",
    "amp",
    "compile",
    "grad_checkpointing",
    "num_workers",
    "saveckp_freq",
    "eval_freq",
}


def parse_args(argv=None):
    """The options on the command line, or in argv. The defaults are the paper's ImageNet recipe; in
    the built-in run and with --small_images, SMALL."""
    parser = argparse.ArgumentParser(
        usage="torchrun %(prog)s [options]",
        description="Train a vision transformer on images without labels.\n\n"
        "    torchrun %(prog)s                         # the built-in data\n"
        "    torchrun %(prog)s --data_path /imagenet   # the paper's recipe",
        epilog=f"Without --data_path, or with --small_images, other defaults hold:\n{SMALL}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def option(flag, default, text, **settings):
        if default is not None:
            settings.setdefault("type", type(default))
            text = f"{text} [{str(default).strip('[]')}]"  # a list has brackets already
        parser.add_argument(flag, default=default, help=text, **settings)

    def switch(flag, text):
        parser.add_argument(flag, action="store_true", help=text)

    home = os.path.expanduser  # a shell leaves the ~ of --output_dir=~/runs as it is
    option(
        "--data_path", None, "folder of train/ and val/, of class folders, or of images", type=home
    )
    option("--output_dir", "output_simdinov2", "folder for all that the run writes", type=home)
    option("--pretrained_weights", None, "weights to start from, our names or DINOv2's", type=home)
    switch("--small_images", "take the built-in run's defaults")
    switch("--resume_anyway", "resume although options or images differ from the checkpoint's")
    option("--seed", 0, "seed of all that is random")
    option("--arch", "vit_base", "size of the backbone", choices=ARCHS)
    option("--patch_size", 16, "side of a patch in pixels")
    option("--hidden_dim", 2048, "width of the projection head")
    option("--drop_path_rate", 0.2, "stochastic depth: rate at each block")
    option("--num_register_tokens", 4, "register tokens, which have no place in the image")
    option("--layerscale", 0.1, "LayerScale's factors at the start")
    option("--global_crops_size", 224, "side of the 2 global views in pixels")
    option("--local_crops_size", 96, "side of the local views in pixels")
    option("--local_crops_number", 10, "local views of an image")
    option("--global_crops_scale", [0.4, 1.0], "share of the area: from, to", type=float, nargs=2)
    option("--local_crops_scale", [0.05, 0.4], "share of the area: from, to", type=float, nargs=2)
    option("--mask_sample_probability", 0.5, "share of the global views that are masked")
    option(
        "--mask_ratio_min_max", [0.1, 0.5], "share that is masked: from, to", type=float, nargs=2
    )
    option("--ibot_loss_weight", 1.0, "weight of the masked patches' loss")
    option("--coeff", 1.0, "weight of the mean cosine")
    option("--eps_sq", 0.4, "square of the radius epsilon in the coding rate R")
    option("--group_size", 128, "n, the images of a group, which has one coding rate R")
    option("--gamma", None, "weight of R [1 / 256 + 1 / batch_size]", type=float)
    option("--expa_type", 1, "R is that of z_s (0) or of (z_s + z_t) / 2 (1)", choices=(0, 1))
    option("--epochs", 100, "passes over the images; an incomplete last step is left out")
    option("--batch_size", 1024, "images of a step, on all GPUs")
    option(
        "--batch_size_per_gpu", None, "images that a GPU takes at a time [128 or fewer]", type=int
    )
    option("--lr", 0.004, "the peak learning rate is this times sqrt(batch_size / 1024)")
    option("--layerwise_decay", 0.9, "a block's learning rate is this times the next block's")
    option("--patch_embed_lr_mult", 0.2, "factor of the patch embedding's learning rate")
    option("--min_lr", 1e-6, "learning rate at the end")
    option("--warmup_epochs", 10.0, "epochs in which the learning rate rises from 0")
    option("--weight_decay", 0.04, "weight decay at the start")
    option("--weight_decay_end", 0.4, "weight decay at the end")
    option("--clip_grad", 3.0, "largest gradient norm of backbone, of head; 0: no clipping")
    option("--momentum_teacher", 0.9, "momentum of the teacher at the start; it rises to 1")
    option("--max_steps", 0, "stop early, after so many steps; 0: after --epochs")
    option(
        "--amp",
        "auto",
        "for GPUs. auto: bf16, or fp16 if the GPU has no bf16; off: float32, as auto on a CPU",
        choices=("auto", "bf16", "fp16", "off"),
    )
    switch("--compile", "compile the transformer's blocks")
    switch("--grad_checkpointing", "slower, a quarter of the memory")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    option("--num_workers", min(10, cores), "data-loading workers per GPU")
    option("--saveckp_freq", 10, "keep a copy after epoch 1 and then every N epochs; 0: none")
    option("--eval_freq", 10, "k-NN accuracy at the start, the end and every N epochs; 0: none")

    args = parser.parse_args(argv)
    if args.data_path is None or args.small_images:
        parser.set_defaults(**SMALL)
        args = parser.parse_args(argv)  # the values in argv win
    if args.batch_size_per_gpu is None:
        args.batch_size_per_gpu = min(128, args.batch_size // WORLD)
    args.group_size = min(args.group_size, args.batch_size)

    check_sizes(parser, args)
    return args


def check_sizes(parser, args):
    """End the program if the sizes do not fit together."""
    micro_batch = args.batch_size_per_gpu
    round_size = WORLD * micro_batch
    if round_size < 1 or args.batch_size % round_size:
        parser.error(
            f"--batch_size {args.batch_size} must be a multiple of the {WORLD} processes "
            f"x --batch_size_per_gpu {micro_batch}"
        )
    group = args.group_size
    if group < 1:
        parser.error("--group_size must be at least 1")
    # A group lies in one micro-batch, or joins whole micro-batches of a round.
    is_within_process = micro_batch % group == 0
    is_within_round = group % micro_batch == 0 and round_size % group == 0
    if not is_within_process and not is_within_round:
        parser.error(
            f"--group_size {group} must divide --batch_size_per_gpu {micro_batch}, or be a "
            f"multiple of it that divides the {round_size} images of all processes in a round"
        )
    for size in (args.global_crops_size, args.local_crops_size):
        if size % args.patch_size:
            parser.error(
                f"views of {size} pixels: not a multiple of --patch_size {args.patch_size}"
            )
    if args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}; "
            "for a short try, see --max_steps"
        )


# ----------------------------------------------------------------------------- the images of a step


def seed_from(*numbers):
    """One 32-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Images(Dataset):
    """Item (epoch, i) is image i, transformed for this epoch, and its label, -1 for none.

    All that is random in an item is drawn from (seed, epoch, i) alone, whichever worker does it. If
    the image cannot be read, a random other one takes its place, with label -1.
    """

    def __init__(self, root, names, labels, transform, seed=0):
        self.root = str(root)
        self.names = np.array(names)  # forked workers share an array, but would copy a list
        self.labels = np.array(labels)
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.names)

    def __getitem__(self, item):
        epoch, index = item
        label = self.labels[index]
        # torch.manual_seed would also seed the GPU, which workers must not touch.
        torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))
        for _ in range(1000):
            try:
                image = load_image(os.path.join(self.root, self.names[index]))
                return self.transform(image), label
            except OSError as error:
                warnings.warn(f"another image takes its place: {error}", stacklevel=1)
                index = torch.randint(len(self), ()).item()
                label = -1
        raise OSError(f"1000 times, a random image in {self.root} could not be read")


@lru_cache(maxsize=1)
def shuffled(n, seed, epoch):
    """The numbers of n images in the order of this epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class MicroBatches(Dataset):
    """Item (step, number): one of the micro-batches of a step, as SimDINO.step takes it.

    An epoch's images, in random order, are cut into steps of batch_size images; the rest is left
    out. A step is cut into micro-batches. The views of an image are drawn from (seed, epoch,
    image), all else from (seed, step, number). So with the same batch_size_per_gpu, a run is the
    same on any number of processes, up to rounding. On a CPU, a resumed run ends with the same
    bits.
    """

    def __init__(self, images, args):
        self.images = images
        self.seed = args.seed
        self.batch_size = args.batch_size
        self.size = args.batch_size_per_gpu
        self.side = args.global_crops_size // args.patch_size
        self.probability = args.mask_sample_probability
        self.ratios = args.mask_ratio_min_max

    def __getitem__(self, item):
        step, number = item
        n = len(self.images)
        epoch, step_of_epoch = divmod(step, n // self.batch_size)
        start = step_of_epoch * self.batch_size + number * self.size
        chosen = shuffled(n, self.seed, epoch)[start : start + self.size].tolist()
        views, _ = default_collate([self.images[epoch, i] for i in chosen])
        seed = seed_from(self.seed, step, number)
        masks = block_masks(2 * self.size, self.side, self.probability, self.ratios, seed)
        index = masks.flatten().nonzero().flatten()
        return seed, views, masks, index


# ------------------------------------------------------------------------------------- the training


def build(args, device):
    """Student, teacher, optimizer and loss as the options say; compiled, and wrapped by DDP."""
    amp = args.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
    torch.manual_seed(args.seed)
    backbone = VisionTransformer(
        args.global_crops_size,
        args.patch_size,
        **ARCHS[args.arch],
        drop_path_rate=args.drop_path_rate,
        grad_checkpointing=args.grad_checkpointing,
        num_register_tokens=args.num_register_tokens,
        layerscale=args.layerscale,
    )
    head = ProjectionHead(backbone.num_features, args.hidden_dim)
    gamma = args.gamma
    if gamma is None:
        gamma = SimDINOLoss.default_gamma(OUT_DIM, args.batch_size)
    loss_fn = SimDINOLoss(args.eps_sq, args.group_size, args.coeff, gamma, args.expa_type)
    model = SimDINO(
        backbone.to(device),
        head.to(device),
        loss_fn,
        clip_grad=args.clip_grad,
        rounds=args.batch_size // (args.batch_size_per_gpu * WORLD),
        dtype=dtype,
        patch_weight=args.ibot_loss_weight,
        layerwise_decay=args.layerwise_decay,
        patch_embed_lr_mult=args.patch_embed_lr_mult,
    )
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would split the graph of a block
        for block in [*model.student.backbone.blocks, *model.teacher.backbone.blocks]:
            block.compile(dynamic=False)
    if WORLD > 1:
        ddp = nn.parallel.DistributedDataParallel
        model.model = ddp(model.student, gradient_as_bucket_view=True)
    millions = sum(p.numel() for p in model.params) / 1e6
    say(f"{args.arch} in {dtype}, with its head {millions:.1f} million parameters")
    return model


def cosine_schedule(base, final, total_steps, warmup_steps=0):
    """A list of total_steps values: linear from 0 to base over the warm-up, then half a cosine."""
    warmup = np.linspace(0, base, warmup_steps)
    progress = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * progress)) / 2
    return [*warmup.tolist(), *cosine.tolist()]


def schedules(args, steps_per_epoch):
    """Learning rate, weight decay and momentum of the teacher: lists with a value for each step."""
    steps = args.epochs * steps_per_epoch
    warmup_steps = int(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * math.sqrt(args.batch_size / 1024)
    return {
        "lr": cosine_schedule(peak_lr, args.min_lr, steps, warmup_steps),
        "weight_decay": cosine_schedule(args.weight_decay, args.weight_decay_end, steps),
        "momentum": cosine_schedule(args.momentum_teacher, 1.0, steps),
    }


def start_run(args, path, images, model):
    """Returns run, the dictionary of a new run, or of the one saved at path, whose tensors are then
    loaded into model."""
    run = {
        "args": vars(args),
        "images_hash": hash_files(images.root, images.names),
        "epoch": 0,  # how many epochs are finished
        "figures": [],  # the FIGURES of each finished step of the current epoch
        "log": [],  # a dictionary for each finished epoch
    }
    # If one process finds a checkpoint, all load it. Where it is missing, torch.load says so.
    if any(gather_values(os.path.lexists(path))):
        restore(path, run, model)
    is_new = run["epoch"] == 0 and not run["figures"]
    if is_new and args.pretrained_weights is not None:
        load_pretrained(args.pretrained_weights, model)
    steps_per_epoch = len(images) // args.batch_size
    if len(run["figures"]) >= steps_per_epoch:  # only with --resume_anyway and fewer images
        run["figures"] = run["figures"][: steps_per_epoch - 1]  # the last step is done again
    run["step"] = run["epoch"] * steps_per_epoch + len(run["figures"])
    if len(set(gather_values((run["images_hash"], run["step"])))) > 1:
        sys.exit("the processes find different images or checkpoints: they have to share a disk")
    return run


class Stream:
    """The micro-batches of a DataLoader, and the seconds that were spent waiting for them."""

    def __init__(self, loader):
        self.micro_batches = iter(loader)
        self.waited = 0.0

    def take(self, count):
        """Yields the next ones, one by one: a list of many could need too many open files."""
        for _ in range(count):
            started = time.monotonic()
            micro_batch = next(self.micro_batches)
            self.waited += time.monotonic() - started
            yield micro_batch


def take_steps(model, stream, schedule, steps):
    """Train for these steps, in which the CPU does not wait for the GPU. Returns their FIGURES, a
    row for each step, and the rows of Z that the last step returned."""
    figures = []
    for step in steps:
        settings = {name: values[step] for name, values in schedule.items()}  # lr and so on
        means, rows = model.step(stream.take(model.rounds), **settings)
        figures.append(means)
    return torch.stack(figures), rows


def meet(figures, signals, last_save):
    """Wait for the GPU and for all processes. Returns the means of their figures, a list for each
    step; a signal that one of them caught, or 0; and the seconds since the last save."""
    report = {
        "figures": figures.tolist(),
        "signal": max(signals, default=0),
        "unsaved": time.monotonic() - last_save,
    }
    reports = gather_values(report)
    means = np.mean([each["figures"] for each in reports], axis=0).tolist()
    caught = max(each["signal"] for each in reports)
    unsaved = max(each["unsaved"] for each in reports)
    return means, caught, unsaved


def check_finite(figures, model):
    """End the run if a loss, a weight or a moment is not finite."""
    is_finite = all(math.isfinite(loss) for loss, *_ in figures) and model.is_finite()
    # In fp16, each overflow halves the scale, from 65,536; without fp16, get_scale() is 1.
    if not is_finite or model.scaler.get_scale() < 1:
        sys.exit("not finite: try --amp off, or --resume_anyway and a lower --lr")


def show_progress(run, job, rank, images_per_second, passing):
    """Print the figures of the last step, and how long the rest will take."""
    figures = [f"{name} {value:.3f}" for name, value in zip(FIGURES, run["figures"][-1])]
    left = (job.last_step - run["step"]) * job.args.batch_size / images_per_second
    line = (
        f"epoch {run['epoch'] + 1}/{job.args.epochs} step {run['step']}/{job.last_step} "
        f"{' '.join(figures)} rank {rank:.1f} "
        f"{images_per_second:.0f} img/s ETA {timedelta(seconds=int(left))}"
    )
    say(line, passing=passing)


def end_epoch(run, schedule, rank, images_per_second, data_wait):
    """Add an entry for the epoch to the log of run."""
    steps = slice(run["step"] - len(run["figures"]), run["step"])
    means = np.mean(run["figures"], axis=0).tolist()
    entry = {
        "epoch": run["epoch"],  # counted from 0
        **dict(zip(FIGURES.values(), means)),
        "train_lr": float(np.mean(schedule["lr"][steps])),
        "train_wd": float(np.mean(schedule["weight_decay"][steps])),
        "rank": rank,
        "knn": None,  # log_knn_accuracy sets it
        "img_s": images_per_second,
        "data_wait": data_wait,  # share of the time
    }
    run["log"].append(entry)
    run["epoch"] += 1
    run["figures"] = []


def open_stream(images, args, model, steps, loader_options):
    """The Stream of the micro-batches that this process takes in these steps."""
    # Of the micro-batches of a step, process p takes number p, WORLD + p, 2 WORLD + p, ...
    numbers = range(PROCESS, model.rounds * WORLD, WORLD)
    items = product(steps, numbers)
    dataset = MicroBatches(images, args)
    # batch_size=None: an item is a batch already
    return Stream(DataLoader(dataset, batch_size=None, sampler=items, **loader_options))


def warn_of_few_steps(schedule, steps):
    """Print how much of its first weights the teacher keeps, if it is much."""
    kept = math.prod(schedule["momentum"][:steps])
    if kept > 0.1:
        say(
            f"only {steps} steps: the teacher, which is the result, keeps {100 * kept:.0f} % "
            "of its first weights. More steps or a lower --momentum_teacher would change that"
        )


def train_epoch(run, job, clock):
    """Train to the end of the epoch, or to the last step of the job. Prints lines, and saves: after
    epochs (but at most once a minute), every 15 minutes, at a signal, and at the end."""
    first_step = run["step"]  # not that of the epoch, after an interruption
    end_of_epoch = (run["epoch"] + 1) * job.steps_per_epoch
    stop = min(end_of_epoch, job.last_step)
    # After some ten rounds, the CPU waits for the GPU, and a line may be printed or the run saved.
    steps_at_a_time = math.ceil(10 / job.model.rounds)
    started = time.monotonic()
    job.stream.waited = 0.0
    while run["step"] < stop:
        steps = range(run["step"], min(run["step"] + steps_at_a_time, stop))
        figures, rows = take_steps(job.model, job.stream, job.schedule, steps)
        figures, caught, unsaved = meet(figures, job.signals, clock.saved)
        check_finite(figures, job.model)
        run["step"] = steps.stop
        run["figures"] += figures

        now = time.monotonic()
        images_per_second = job.args.batch_size * (run["step"] - first_step) / (now - started)
        rank = effective_rank(rows)  # of the first process, which prints it
        passing = run["step"] < stop
        if not passing or os.isatty(1) or now - clock.printed > 60:
            show_progress(run, job, rank, images_per_second, passing)
            clock.printed = now

        is_end_of_epoch = run["step"] == end_of_epoch
        if is_end_of_epoch:
            data_wait = job.stream.waited / (now - started)
            end_epoch(run, job.schedule, rank, images_per_second, data_wait)
            save_copy(run, job)
        # Not after every epoch: with few images, saving would take most of the time.
        is_due = unsaved > 15 * 60 or (is_end_of_epoch and unsaved > 60)
        if caught or is_due or run["step"] == job.last_step:
            save(job.path, run, job.model)
            clock.saved = time.monotonic()
        if caught:
            say(f"{signal.Signals(caught).name}: saved {job.path} at step {run['step']}")
            os._exit(128 + caught)


def save_copy(run, job):
    """After some epochs: a checkpoint that stays."""
    finished = run["epoch"] - 1  # counted from 0, as in the log
    if job.args.saveckp_freq and finished % job.args.saveckp_freq == 0:
        save(job.path.with_name(f"checkpoint{finished:04}.pth"), run, job.model)


def main():
    """Train. run: the progress, which a checkpoint holds beside the tensors. job: the objects of
    this process."""
    args = parse_args()
    device = start_process()
    path = Path(args.output_dir, "checkpoint.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    images, knn_images = open_images(args)
    model = build(args, device)
    steps_per_epoch = len(images) // args.batch_size
    last_step = args.epochs * steps_per_epoch
    say(
        f"a step: {args.batch_size} images = {model.rounds} rounds x {WORLD} processes x "
        f"{args.batch_size_per_gpu}; {last_step} steps = {args.epochs} epochs x {steps_per_epoch}"
    )
    if args.max_steps:
        last_step = min(last_step, args.max_steps)
    schedule = schedules(args, steps_per_epoch)
    warn_of_few_steps(schedule, last_step)
    run = start_run(args, path, images, model)
    if run["step"] == 0:  # a full disk, or another run in this folder, is then noticed at once
        save(path, run, model)
    if run["step"] >= last_step:
        say(f"nothing is left to train: all {last_step} steps are done")
    signals = catch_signals()
    loader_options = choose_loader_options(args, device)
    loader_options["worker_init_fn"] = ignore_signals
    stream = open_stream(images, args, model, range(run["step"], last_step), loader_options)
    job = SimpleNamespace(
        args=args,
        path=path,
        model=model,
        schedule=schedule,
        stream=stream,
        signals=signals,
        knn_images=knn_images,
        loader_options=loader_options,
        steps_per_epoch=steps_per_epoch,
        last_step=last_step,
    )
    clock = SimpleNamespace(saved=time.monotonic(), printed=0.0)  # when these happened last
    log_knn_accuracy(run, job)  # before the first epoch, or where an interruption prevented it
    while run["step"] < last_step:
        train_epoch(run, job, clock)
        log_knn_accuracy(run, job)
    say(f"the result is in {path}: eval_linear.py judges and exports it")
    end_process()


# ======================================================================== 3. The helpers of the run

# ------------------------------------------------------------------------ the processes and signals

# How a run ends:
#     after its last step      end_process, status 0
#     at a signal              train_epoch saves, then leaves with status 128 + signal
#     at an error              Python prints it, status 1; torchrun then ends the other processes
# A signal of torchrun or of a terminal reaches the data-loading workers, too. They ignore signals,
# as the current steps still need their images. So a usual exit of Python would hang: it sends the
# workers SIGTERM and waits for them. os._exit does not wait.


def start_process():
    """Connect this process with the others. Returns its device."""
    if __name__ == "__main__":
        # Leave without waiting for workers or threads. An exit before end_process is an error: 1.
        atexit.register(os._exit, 1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", GPU) if cuda else torch.device("cpu")
    name = "the CPU"
    if cuda:
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name()
    elif torch.version.cuda:
        name = f"the CPU (PyTorch finds no GPU with a driver for CUDA {torch.version.cuda})"
    say(f"processes: {WORLD}, on {name}")
    if WORLD > 1:  # waits for the others
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(hours=1),  # the wait for the slowest process, as disks differ
            device_id=device if cuda else None,
        )
    return device


def end_process():
    """The end of a run without errors."""
    if WORLD > 1:
        time.sleep(0.2)  # gloo's threads must finish, or PyTorch 2.6 would wait for ever
        dist.destroy_process_group()
    if __name__ == "__main__":
        atexit.unregister(os._exit)
        atexit.register(os._exit, 0)


def gather_values(value):
    """The values of all processes, in their order: any Python objects."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(x):
    """The rows of x, (n, ...), of all processes, in their order; n is the same on each."""
    rows = [x]
    if WORLD > 1:
        rows = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(rows, x)
    return torch.cat(rows)


def wait_for_all():
    """Returns when all processes are here."""
    if WORLD > 1:
        dist.barrier()


def say(text, passing=False):
    """Print on the first process. passing: on a terminal, the next text takes the place of this."""
    end = "\n"
    if os.isatty(1):
        if passing:
            text = text[: shutil.get_terminal_size().columns - 1]  # one line
            end = ""
        text = "\r\033[K" + text  # to the line's start, and clear it
    try:
        if PROCESS == 0:
            print(text, end=end, flush=True)
    except OSError:  # the terminal or the pipe is closed: the run goes on without printing
        sys.stdout = None


SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)


def catch_signals():
    """A list, to which signals are added from now on. With one, train_epoch saves and ends."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C after a signal ends the run at once

    for number in SIGNALS:
        signal.signal(number, handler)
    return caught


def ignore_signals(worker):
    """For the data-loading workers: see above."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def choose_loader_options(args, device):
    """Arguments of DataLoader: how many workers load images, and how they are started."""
    options = {"num_workers": args.num_workers, "pin_memory": device.type == "cuda"}
    if args.num_workers:
        options["timeout"] = 900  # seconds: a worker that hangs ends the run
        if sys.platform == "linux":
            # Without this, Python 3.14 lets a server process start the workers. torchrun's SIGTERM
            # ends it while its workers are still needed; after an error, it never ends.
            options["multiprocessing_context"] = "fork"
    return options


# ---------------------------------------------------------------------- the images and their labels

SPLITS = ("val", "valid", "validation", "test")  # names of a folder to judge on


def load_image(path):
    """An image file -> uint8 (3, H, W), RGB, upright by its EXIF data; the first of several frames.
    OSError, which names the file, if it cannot be decoded. RuntimeError if it cannot be opened or
    read, as the machine may be at fault: this ends the run, which can go on later."""
    try:
        if Path(path).is_fifo():
            raise ValueError("a pipe, which might never end")
        # Pillow would scramble an uncompressed TIFF file with an orientation, opened by its name.
        with open(path, "rb") as file, Image.open(file) as image:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least 1024 pixels.
            image.draft("RGB", (1024, 1024))
            if image.mode.startswith(("I", "F")):  # convert() would clip their values at 255
                raise ValueError(f"mode {image.mode} has more than 8 bits: convert the file first")
            return TF.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # there is no end to what a decoder may raise
        # Errors of the operating system have a number; those of decoders have none.
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise RuntimeError(f"cannot read {path}") from error
        raise OSError(f"cannot read {path}: {error}") from error


def find_images(root):
    """The names of all images below root, relative to root, and their classes: the first folder of
    a name, "" if it has none. Files and folders whose names begin with "." are skipped."""

    def raise_error(error):  # otherwise os.walk would skip a folder that cannot be read
        raise error

    names = []
    classes = []
    others = 0
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=raise_error):
        parent = Path(folder).parent
        if os.path.islink(folder) and parent.resolve().is_relative_to(Path(folder).resolve()):
            raise OSError(f"{folder} is a link to a folder that it is in: it has no end")
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        for file in sorted(name for name in files if not name.startswith(".")):
            if file.lower().endswith(IMG_EXTENSIONS):
                names.append(str(below / file))
                classes.append(below.parts[0] if below.parts else "")
            else:
                others += 1
    count = len(set(classes) - {""})
    say(f"{root}: {len(names)} images in {count} folders, {others} other files")
    return names, classes


def hash_files(root, names):
    """A hash of the names, and of the bytes of up to eight of the files: others may have the same
    names."""
    digest = hashlib.sha256(os.fsencode("\n".join(names)))
    for name in names[:: len(names) // 8 + 1]:
        with suppress(OSError):  # a file that cannot be read
            digest.update(Path(root, name).read_bytes())
    return digest.hexdigest()[:16]


def find_training_folder(args):
    """The folder of the data, and the one in it to train on, which may be the same."""
    root = Path(args.output_dir, "patterns")
    if args.data_path is not None:
        root = Path(args.data_path)
    elif PROCESS == 0 and not root.exists():
        render_patterns(root)  # images of any other source could be written here as well
    wait_for_all()  # the files are there
    train = root
    if os.path.lexists(root / "train"):
        train = root / "train"
        folders = {path.name for path in root.iterdir() if path.is_dir()}
        unused = sorted(folders - {"train", *SPLITS})
        if unused:
            say(f"{root}: train/ is what is trained on, not {', '.join(unused)}")
    if not train.is_dir():
        sys.exit(f"there is no folder {train}")
    return root, train


def open_images(args):
    """The Images to train on, and those of open_knn_images."""
    root, train = find_training_folder(args)
    names, classes = find_images(train)
    if len(names) < args.batch_size:
        sys.exit(
            f"{train} has {len(names)} images, fewer than a step: --batch_size {args.batch_size}"
        )
    known_classes = sorted(set(classes) - {""})
    label_of = {name: label for label, name in enumerate(known_classes)}
    labels = [label_of.get(name, -1) for name in classes]
    crop = MultiCrop(
        args.global_crops_size,
        args.local_crops_size,
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
    )
    images = Images(train, names, labels, crop, args.seed)
    images[0, 0]  # an error here if no image can be read
    return images, open_knn_images(args, root, images, label_of)


def open_knn_images(args, root, train, label_of):
    """For k-NN, which learns from "train" and is judged on "val": a dictionary of the two Images.
    Without these, a line says why, and the dictionary is empty."""
    folders = [root / name for name in SPLITS]
    found = [folder for folder in folders if folder.is_dir() and not folder.samefile(train.root)]
    has_train = Path(train.root) != root
    if not args.eval_freq:
        say("no k-NN accuracy: --eval_freq is 0")
        return {}
    if len(label_of) < 2:
        say(f"no k-NN accuracy: {train.root} has fewer than two class folders")
        return {}
    if not (found and has_train):
        say(f"no k-NN accuracy: {root} does not have both train and val")
        return {}
    val = found[0]
    names, classes = find_images(val)
    labels = [label_of.get(name, -1) for name in classes]
    if max(labels, default=-1) < 0:
        say(f"no k-NN accuracy: no image in {val} has a class of {train.root}")
        return {}
    center = partial(center_crop, size=args.global_crops_size)
    return {
        "train": Images(train.root, train.names, train.labels, center),
        "val": Images(val, names, labels, center),
    }


# -------------------------------------------------------------------------------- the built-in data


def draw_pattern(kind, rng, size=32):
    """One of ten patterns at random angle, scale, phase, polarity, contrast: a grayscale image.

    Each kind is a height at every pixel. Those above the median are light and the others dark, so
    that half are light, and brightness tells nothing of the kind.
    """
    angle = rng.uniform(0, 2 * np.pi)
    cells = rng.uniform(2.2, 4.2)  # along a side
    y, x = (np.mgrid[: 2 * size, : 2 * size] / (2 * size) - 0.5) * cells
    # Coordinates in cells, rotated and shifted
    p = x * np.cos(angle) + y * np.sin(angle) + rng.uniform()
    q = y * np.cos(angle) - x * np.sin(angle) + rng.uniform()
    u = abs(p % 1 - 0.5)  # distances from the middle of a cell
    v = abs(q % 1 - 0.5)
    bond = abs((p + 0.5 * (np.floor(q) % 2)) % 1 - 0.5)  # every other row half a cell on
    odd = (np.floor(p) + np.floor(q)) % 2
    heights = [
        u,  # stripes
        (p % 1 - 0.5) * (q % 1 - 0.5),  # checks
        np.hypot(u, v),  # discs
        abs(np.hypot(u, v) - 0.3),  # rings
        np.maximum(u, v),  # squares
        abs((p + v) % 1 - 0.5),  # zigzags
        np.maximum(bond, v),  # bricks
        np.where(odd, abs((2 * p) % 1 - 0.5), abs((2 * q) % 1 - 0.5)),  # weave
        p % 1 - 2 * v,  # triangles
        np.hypot(bond, q % 1),  # scallops
    ]
    height = heights[kind]
    light = np.sign(height - np.median(height)) * rng.choice([-1, 1])
    light = light.reshape(size, 2, size, 2).mean((1, 3))  # of 2 x 2, for smooth edges
    noise = rng.normal(0, rng.uniform(3, 15), (size, size))
    light = 128 + rng.uniform(-15, 15) + rng.uniform(50, 110) * light + noise
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def render_patterns(root):
    """The built-in data: PNG files root/{train,val}/<kind>/<number>.png, always the same ones."""
    temporary = Path(f"{root}.partial")
    for split, count in [("train", 320), ("val", 80)]:
        for kind in range(10):
            folder = temporary / split / str(kind)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng((split == "val", kind, number))
                draw_pattern(kind, rng).save(folder / f"{number:03}.png")
    temporary.rename(root)


# ------------------------------------------------------------------------------------ k-NN and rank


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size), the centre of the image.

    If the short side is larger than size * 8 / 7, it is resized to that: the usual 256 for a size
    of 224. If it is smaller than size, it is resized to size. In between it stays, where DINO would
    resize it to 256.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    # Of a long strip only the middle is resized, as the whole strip could need much memory.
    middle = TF.center_crop(image, [min(height, 2 * short), min(width, 2 * short)])
    new_short = max(size, min(short, size * 8 // 7))
    resized = TF.resize(middle, new_short, InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(resized, [size, size])


def log_knn_accuracy(run, job):
    """If it is due, and not in the log yet: print the k-NN accuracy, and save it in the log's entry
    of the epoch that is over, if one is."""
    if not job.knn_images:
        return
    is_between_epochs = not run["figures"]
    is_due = is_between_epochs and run["epoch"] % job.args.eval_freq == 0
    is_end = run["step"] >= job.last_step
    entry = None  # of the epoch that is over
    if is_between_epochs and run["log"]:
        entry = run["log"][-1]
    is_known = entry is not None and entry["knn"] is not None
    if is_known or not (is_due or is_end):
        return
    say("k-NN: computing the features of all images", passing=True)
    bank = embed(job.model, job.knn_images["train"], job.loader_options)
    val = embed(job.model, job.knn_images["val"], job.loader_options)
    accuracy = knn_accuracy(bank, val)
    when = f"epoch {run['epoch']}" if is_between_epochs else f"step {run['step']}"
    say(f"k-NN accuracy after {when}: {accuracy:.1f} %")
    if entry is not None:
        entry["knn"] = accuracy
        save(job.path, run, job.model)


@torch.no_grad()
def embed(model, images, loader_options):
    """On all processes: unit features (n, D) of the teacher's backbone and labels (n,), of the
    images that have a label and can be read."""
    n = len(images)
    # gather_rows needs equally many images of each process. So some may be taken twice.
    per_process = math.ceil(n / WORLD)
    items = [(0, i % n) for i in range(PROCESS * per_process, (PROCESS + 1) * per_process)]
    own_features = []
    own_labels = []
    for x, y in DataLoader(images, batch_size=256, sampler=items, **loader_options):
        with model.autocast:
            features = model.teacher.backbone(normalize_colors(x.to(model.device) / 255))
        own_features.append(F.normalize(features.float(), dim=-1))
        own_labels.append(y.to(model.device))
    features = gather_rows(torch.cat(own_features))[:n]
    labels = gather_rows(torch.cat(own_labels))[:n]
    is_labelled = labels >= 0
    left_out = n - int(is_labelled.sum())
    if left_out:
        text = f"k-NN leaves out {left_out} of {n} images in {images.root}"
        say(f"{text}: they cannot be read, or have no class of train/")
    if left_out == n:
        sys.exit(f"no image is left in {images.root}")
    if not features.isfinite().all():
        sys.exit("the features are not finite: see the weights, or --amp")
    return features[is_labelled], labels[is_labelled]


def knn_accuracy(train, val, k=20, temperature=0.07):
    """Top-1 accuracy on val in %: the k nearest of train vote with exp(cosine / temperature), as in
    DINO. train, val: unit features (n, D) and labels (n,)."""
    bank, bank_labels = train
    features, labels = val
    classes = int(bank_labels.max()) + 1
    correct = 0
    for z, y in zip(features.split(256), labels.split(256)):
        cosine, nearest = (z @ bank.mT).topk(min(k, len(bank)))
        votes = torch.zeros(len(z), classes, device=z.device)
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(labels)


@torch.no_grad()
def effective_rank(rows):
    """How many directions the rows (n, d) use: exp of the entropy of the eigenvalues of ZᵀZ, scaled
    to the sum 1.

    The rank is 1 when all rows are parallel, and at most min(n, d). How it develops in a healthy
    run is told at the top of simdino.py.
    """
    # The CPU waits for the GPU here. The eigenvalues of a small matrix are found faster on the CPU.
    eigenvalues = torch.linalg.eigvalsh((rows.mT @ rows).double().cpu()).clamp(min=0)
    p = eigenvalues / eigenvalues.sum()
    return torch.special.entr(p).sum().exp().item()  # entr: -p log p, and 0 for 0


# -------------------------------------------------------------------------- weights and checkpoints


def load_pretrained(path, model):
    """Start student and teacher from the weights in a file, with our names or those of DINOv2 (its
    files of a backbone alone). Positions of another grid are interpolated. A head is taken if it
    has the shapes of this one."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    backbone = {}
    head = {}
    for name, tensor in state.get("teacher", state).items():
        name = name.removeprefix("module.").removeprefix("backbone.").removeprefix("dino_")
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunks: blocks.0.3.attn
        if name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        else:
            backbone[name] = tensor
    student = model.student
    cls, grid = backbone["pos_embed"].tensor_split([1], dim=1)
    side = math.isqrt(grid.shape[1])
    if side != student.backbone.side:
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        size = [student.backbone.side] * 2
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True).flatten(2).mT
        backbone["pos_embed"] = torch.cat([cls, grid], dim=1)
    own = student.backbone.state_dict()
    for name in ("mask_token", "register_tokens"):  # some weights lack them: they start anew
        backbone.setdefault(name, own[name])
    student.backbone.load_state_dict(backbone)
    loaded = "backbone"
    own_head = student.head.state_dict()
    if all(name in head and head[name].shape == own_head[name].shape for name in own_head):
        student.head.load_state_dict({name: head[name] for name in own_head})
        loaded = "backbone and head"
    if WORLD > 1:  # the files of two machines may differ: all take the weights of process 0
        for p in model.params:
            dist.broadcast(p.data, src=0)
    model.teacher.load_state_dict(student.state_dict())
    if not model.is_finite():
        sys.exit(f"{path} has weights that are not finite")
    say(f"starts from {path}: {loaded}")


def save(path, run, model):
    """Write run and model to path, which is never half written. Write log.txt beside it."""
    if PROCESS == 0:
        partial_path = path.with_suffix(f".partial{os.getpid()}")  # two runs may share a folder
        try:
            states = {name: part.state_dict() for name, part in model.saved.items()}
            # On a full disk, torch.save raises an error that does not say so; write() says it.
            content = io.BytesIO()
            torch.save(run | states, content)
            with partial_path.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            lines = [json.dumps(entry) + "\n" for entry in run["log"]]
            path.with_name("log.txt").write_text("".join(lines))
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)
    wait_for_all()  # a process may end only when all is saved


def restore(path, run, model):
    """Load the checkpoint at path into run and model. SystemExit if it is of another run."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    old = state["args"] | {"images_hash": state["images_hash"]}
    new = run["args"] | {"images_hash": run["images_hash"]}
    changes = []
    for name in new:
        if name not in MAY_CHANGE_ON_RESUME and old.get(name) != new[name]:
            changes.append(f"{name} {old.get(name)}, not {new[name]}")
    if changes and not run["args"]["resume_anyway"]:
        text = "; ".join(changes)
        sys.exit(f"{path} is of another run ({text}): give another --output_dir or --resume_anyway")
    if state["step"] == 0:  # nothing is learned: start from what the options say now
        return
    for name, part in model.saved.items():
        if state[name]:  # the scaler's is empty if the run was without fp16
            part.load_state_dict(state[name])
    for name in ("epoch", "figures", "log"):
        run[name] = state[name]
    say(f"resumed {path}, saved at step {state['step']}")


if __name__ == "__main__":
    main()
