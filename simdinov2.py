# SPDX-License-Identifier: MIT
"""SimDINOv2: DINOv2 without prototypes, Sinkhorn, KoLeo or temperatures, in one file.

    torchrun simdinov2.py                                             # the built-in data
    torchrun --nproc_per_node=W simdinov2.py --data_path /imagenet --output_dir runs/vitb16_v2
    torchrun simdinov2.py --data_path FOLDER --output_dir runs/mine   # any folder of images

Read simdino.py first: what both do stands in each in the same words. As DINOv2 to DINO, this adds
a second task: in half of the global crops rectangles of patches are hidden from the student, and
its output there, p_s, is pulled to the teacher's for the same patch, p_t, who sees the crop whole:

    loss = mean ½‖z_s - z_t‖² - γ R(Z)        CLS tokens, as in SimDINO, of crops with gaps too
         + mean ½‖p_s - p_t‖²                 of a crop's hidden patches; 0 where none is

No rate keeps patches apart. What speaks against their collapse: they share the head with the CLS
tokens, whose rate is kept high, and these are made of patches by attention. Registers are tokens
for notes that the model else writes over patches of the background. LayerScale lets each branch
start small. The lower a block, the lower its learning rate: all others build on it. The recipe
takes 1,024 images a step, in groups and rounds of 128.

The first command trains on ten kinds of patterns that the script draws: k-NN accuracy 70.6, 68.6
and 67.1 % (seeds 0 to 2) in 2.3 minutes on 2 CPU cores; random weights give 14 to 18 %, raw pixels
34.2 %.

Section 1 is the method, in the order in which an image meets it; section 2 is what runs it.
"Simplifying DINO via Coding Rate Regularization", Wu et al., ICML 2025, arXiv 2502.10385.
"Official" below is the authors' code, github.com/RobinWu218/SimDINO.
"""

import argparse
import atexit
import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import OrderedDict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import groupby
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import functional as TF

# ==================================================================================== 1. The method

# ----------------------------------------------------------------------------------------- the loss


def coding_rate(z, eps_sq):
    """Coding rate R = ½ logdet(I + d / (n ε²) ZᵀZ) of n unit rows, in nats: paper, eq. (8).

    z: (..., n, d); eps_sq: ε² > 0. Returns (...). It is ½ Σ log(1 + d λ / (n ε²)) over the
    eigenvalues λ of ZᵀZ, whose sum is n for unit rows: the log-volume that they fill, counted in
    balls of radius ε. Smallest, ½ log(1 + d / ε²), when all are alike, the collapse: one λ is n.
    Largest when they are spread evenly: (n/2) log(1 + d / (n ε²)) for n <= d orthogonal rows, else
    (d/2) log(1 + 1 / ε²). For d = 256, n = 64, ε² = 0.4: 3.2 and 76.7. A direction with λ below
    n ε² / d hardly counts: a larger ε asks for fewer directions, each of which has to be used more.
    """
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z  # ZZᵀ and ZᵀZ share their non-zero eigenvalues
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    factor, _ = torch.linalg.cholesky_ex(eye + d / (n * eps_sq) * gram)  # _ex: no wait for the GPU
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # ½ logdet(LLᵀ) = Σ log diag(L)


class SimDINOLoss(torch.nn.Module):
    """loss = -coeff comp - γ R; with coeff 1: mean ½‖z_s - z_t‖² - γ R, less a constant, 1.

    comp ("compression", the official name): mean cosine, 1 - ½‖z_s - z_t‖², over the pairs of a
    teacher's global view and a student's view. Pairs of the very same crop are left out: they agree
    without knowing what two views of an image share.
    R: mean coding rate over the two global views and over groups of group_size images, cut in order
    from the batch of all processes (None, or more than it has: all are one group). The rows of Z
    are the student's (expa_type 0), or (student + teacher) / 2 (1, the official default), shorter
    than 1 where the two disagree. expa ("expansion") = γ R.
    eps_sq 0.4, groups of 64: what the published models ran on. On 8 GPUs of 64 images the official
    code sums over each GPU's 64 rows but divides by all 512: its --eps 0.05 is ε² = 8 * 0.05.
    gamma: weight of R; None for (d + b) / (d b) = 1/d + 1/b, the authors' heuristic, with b the
    images of the whole batch: for d = 256, 0.0059 at 512, 0.0195 at 64. If gradients are
    accumulated over rounds, give it: this class sees the images of one round only.
    """

    def __init__(self, eps_sq=0.4, group_size=64, coeff=1.0, gamma=None, expa_type=1):
        super().__init__()
        if not eps_sq > 0:
            raise ValueError(f"eps_sq must be positive, not {eps_sq}")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, or None, not {group_size}")
        if expa_type not in (0, 1):
            raise ValueError(f"expa_type must be 0 or 1, not {expa_type}")
        self.eps_sq, self.group_size, self.coeff = eps_sq, group_size, coeff
        self.gamma, self.expa_type = gamma, expa_type

    def forward(self, student, teacher):
        """student (V, B, d), its 2 global views first, teacher (2, B, d): unit rows.

        B, this process's images, is the same on all. Returns the loss and detached comp and expa.
        ValueError if the group does not divide the batch of all processes.
        """
        # Autocast would form ZᵀZ in half precision, and near collapse, where all eigenvalues but
        # one are close to 0, those of the rounded matrix are negative: the logarithm is NaN.
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            student, teacher = student.to(dtype), teacher.detach().to(dtype)
            views, images, d = student.shape

            # comp is a mean over images: the mean of the processes' values is that of the batch.
            cosine = torch.cosine_similarity(teacher[:, None], student, dim=-1).mean(-1)  # (2, V)
            comp = (cosine.sum() - cosine.diagonal().sum()) / (2 * views - 2)  # not the same view

            # R is a mean over groups, not over images: a group that spans processes is gathered.
            z = student[:2] if self.expa_type == 0 else (student[:2] + teacher) / 2  # (2, B, d)
            batch = images * self.processes()
            group = min(self.group_size or batch, batch)
            if batch % group:
                raise ValueError(f"group_size {group} does not divide the batch of {batch} images")
            if images % group:
                z = self.gather(z)  # (2, batch, d)
            gamma = (d + batch) / (d * batch) if self.gamma is None else self.gamma
            expa = gamma * coding_rate(z.unflatten(1, (-1, group)), self.eps_sq).mean()
        return -self.coeff * comp - expa, {"comp": comp.detach(), "expa": expa.detach()}

    @staticmethod
    def processes():
        dist = torch.distributed  # by its full name, so that the class can be copied alone
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @classmethod
    def gather(cls, z):
        """Rows (..., B, d) of all processes in order of rank; this process's carry gradient."""
        world = cls.processes()
        if world == 1:
            return z
        own = z.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(world)]
        torch.distributed.all_gather(parts, own)
        # Equal to z, its gradient world times z's: DDP divides the sum over the processes, each of
        # which has the gradient of its own rows, by world.
        parts[torch.distributed.get_rank()] = own + world * (z - own)
        return torch.cat(parts, dim=-2)


def masked_patch_loss(student, teacher, masks):
    """Minus the mean cosine over a crop's masked patches, averaged over all 2 B crops, 0 for one
    without any: where half have a mask, -0.5 at best. student, teacher (M, d): rows of the M masked
    patches, in the order of masks, bool (2 B, N)."""
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        cosine = torch.cosine_similarity(student.to(dtype), teacher.detach().to(dtype), dim=-1)
        count = masks.sum(-1)
        weight = 1 / count.clamp(min=1).to(dtype)  # of a patch: one over those masked in its crop
        weight = weight.repeat_interleave(count, output_size=len(student))  # size given: no wait
        return -(cosine * weight).sum() / len(masks)


@torch.no_grad()
def effective_rank(rows):
    """How many directions rows (n, d) use: exp of the entropy of the eigenvalues of ZᵀZ.

    1 when all rows are alike, at most min(n, d). The built-in run rises from 1 to 63: its 128 rows
    are 2 views of 64 images. Below 2 after the first epochs is a collapse. The host waits for it.
    """
    rows = rows.float()
    gram = (rows.mT @ rows).nan_to_num()  # eigvalsh raises on NaN
    p = torch.linalg.eigvalsh(gram).clamp(min=1e-12)
    return torch.special.entr(p / p.sum()).sum().exp()


# ---------------------------------------------------------------------------------------- the model

ARCHS = {
    "vit_nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},  # of the built-in run
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
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """Factors of a branch's channels; small ones start a deep ViT close to the identity."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x):
        return x * self.gamma.to(x.dtype)


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

    def forward(self, x, keep=None):
        """keep: (2, K), the K samples that pass through each of the two branches; None: all do."""
        if keep is None:
            x = x + self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm2(x)))
        scale = len(x) / keep.shape[1]  # keeps the expectation
        kept = x[keep[0]]  # index_put, unlike index_add and index_copy, stores none for backward
        x = x.index_put((keep[0],), kept + scale * self.ls1(self.attn(self.norm1(kept))))
        kept = x[keep[1]]
        return x.index_put((keep[1],), kept + scale * self.ls2(self.mlp(self.norm2(kept))))


class VisionTransformer(nn.Module):
    """ViT whose parameters are named as in DINOv2, so that weights travel both ways.

    forward: images (B, 3, H, W), H and W multiples of patch_size -> CLS features (B, D); a list of
    such batches, of several sizes -> their CLS features concatenated in that order. ValueError for
    another size. grad_checkpointing = True: activations of a block are computed again in the
    backward pass instead of kept.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.0,
        num_register_tokens=4,
        layerscale=0.1,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.patch_size, self.side = patch_size, img_size // patch_size
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, False
        self.num_register_tokens = num_register_tokens
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
        """(1, 1 + h w, D) for a grid of h x w patches, bicubic from the grid trained on."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x, masks=None):
        """(B, 3, H, W) -> (B, T, D): CLS and patches with positions, registers between without."""
        h, w = x.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"{h} x {w} pixels: not multiples of patch size {self.patch_size}")
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embedding(h // self.patch_size, w // self.patch_size)
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def stochastic_depth(self, x):
        """keep of each block: drop_path_rate of the samples of x, drawn anew for each branch, skip
        it and are not computed: less work, as many in every step, and so tensors of fixed shape."""
        depth = len(self.blocks)
        if not (self.training and self.drop_path_rate):
            return [None] * depth
        kept = max(1, int(len(x) * (1 - self.drop_path_rate)))
        return torch.rand(depth, 2, len(x), device=x.device).argsort(-1)[..., :kept]

    def forward_features(self, x, masks=None):
        """Normed tokens by kind: x_norm_clstoken (B, D), x_norm_regtokens, x_norm_patchtokens.

        masks: bool (B, N), True for the patches that the mask token replaces.
        """
        x = self.prepare_tokens(x, masks)
        for block, keep in zip(self.blocks, self.stochastic_depth(x)):
            if self.training and self.grad_checkpointing:
                x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, keep)
        cls, registers, patches = self.norm(x).tensor_split([1, 1 + self.num_register_tokens], 1)
        names = "x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"
        return dict(zip(names, (cls[:, 0], registers, patches)))

    def forward(self, x):
        if isinstance(x, (list, tuple)):  # one pass for neighbours of equal size
            runs = groupby(x, key=lambda batch: batch.shape[-2:])
            return torch.cat([self(torch.cat(list(run))) for _, run in runs])
        return self.forward_features(x)["x_norm_clstoken"]


class ProjectionHead(nn.Module):
    """Features (..., in_dim) -> unit rows (..., out_dim) in float32: no prototypes."""

    def __init__(self, in_dim, hidden_dim=2048, out_dim=256):
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


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Network(nn.Sequential):
    """A backbone and the head that its CLS and patch tokens share."""

    def forward(self, views, index, masks=None):
        """Unit rows: of all CLS tokens (V, B, d), and of the indexed patches (M, d).

        views: batches, two global ones first; masks: bool (2 B, N), True where patches are hidden;
        index (M,): where masks are True among the 2 B N patches, listed by the CPU: the GPU would
        wait for M. The teacher gets index and no masks: it sees all and answers for those patches.
        """
        tokens = self.backbone.forward_features(torch.cat(views[:2]), masks)
        cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]
        if views[2:]:
            cls = torch.cat([cls, self.backbone(views[2:])])
        rows = self.head(torch.cat([cls, patches.flatten(0, 1)[index]]))
        return rows[: len(cls)].unflatten(0, (len(views), -1)), rows[len(cls) :]


# ---------------------------------------------------------------------- the views, and augmentation


class MultiCrop:
    """In the workers: uint8 (3, H, W) -> list of uint8 views, two global ones first.

    Random resized crops (share of the area by scale, aspect 3/4 to 4/3) and nothing else: what
    changes colours runs on whole batches, on the device (augment).
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
            h, w = min(max(h, 1), height), min(max(w, 1), width)  # where none of 10 tries fits
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            crop = image[None, :, y : y + h, x : x + w]
            views.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0])
        return views


def block_masks(crops, side, probability, ratios, seed):
    """Bool (crops, side * side): patches to hide, in rectangles, as iBOT and DINOv2 draw them.

    int(crops * probability) crops, any of them, get a mask. The shares to hide are spread evenly
    over ratios, (lowest, highest). Rectangles of about 4 patches or more, aspect 0.3 to 1 / 0.3,
    hide what is left until 10 tries in a row hide nothing new or too much. seed: of numpy's draws.
    """
    rng, masks = np.random.default_rng(seed), np.zeros((crops, side, side), dtype=bool)
    bounds = np.linspace(*ratios, int(crops * probability) + 1)
    for mask, low, high in zip(masks, bounds, bounds[1:]):
        left, tries = int(side**2 * rng.uniform(low, high)), 0
        while left > 0 and tries < 10:
            share, stretch, down, right = rng.random(4)
            area, aspect = 4 + (min(left, side**2 // 2) - 4) * share, 0.3 ** (2 * stretch - 1)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            y, x, tries = int(down * (side - h + 1)), int(right * (side - w + 1)), tries + 1
            block = mask[y : y + h, x : x + w]
            new = h * w - block.sum()
            if max(h, w) < side and 0 < new <= left:
                block[:] = True
                left, tries = left - new, 0
    return torch.from_numpy(rng.permutation(masks)).flatten(1)


def augment(views):
    """On the device: uint8 batches (B, 3, h, w), two global views first -> normalised float32."""
    first, second, *local = views
    views = [photometric(first, blur=1.0), photometric(second, blur=0.1, solarize=0.2)]
    if local:
        views += photometric(torch.cat(local), blur=0.5).split(len(first))
    return views


def photometric(x, blur, solarize=0.0):
    """DINO's augmentation of uint8 x (B, 3, h, w), drawn for each image.

    blur, solarize: the two probabilities that differ by view. All operations equal torchvision's.
    """
    x = torch.where(uniform(x) < 0.5, x.flip(-1), x) / 255
    x = torch.where(uniform(x) < 0.8, color_jitter(x), x)
    x = torch.where(uniform(x) < 0.2, grayscale(x), x)
    x = torch.where(uniform(x) < blur, gaussian_blur(x, sigma=uniform(x, 0.1, 2.0)), x)
    if solarize:
        x = torch.where((uniform(x) < solarize) & (x >= 128 / 255), 1 - x, x)
    return normalize(x)


def uniform(x, low=0.0, high=1.0):
    """A number for each image of x, (B, 1, 1, 1), drawn on its device."""
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


def grayscale(x):  # (B, 3, H, W) -> (B, 1, H, W)
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def blend(x, other, factor):
    return torch.lerp(other, x, factor).clamp_(0, 1)


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
    """Student, teacher and optimizer, and the step that trains them: what a checkpoint holds.

    groups: AdamW's; patch_weight: of the masked patches' loss; rounds: how many blocks of images
    this process takes one after the other in a step.
    """

    def __init__(self, student, groups, loss_fn, patch_weight, clip_grad, rounds, dtype):
        self.student, self.params = student, list(student.parameters())
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.model = self.student  # or, around it, DistributedDataParallel
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.loss_fn, self.patch_weight = loss_fn, patch_weight
        self.clip_grad, self.rounds = clip_grad, rounds
        self.device, self.dtype = self.params[0].device, dtype
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.parts = {"student": self.student, "teacher": self.teacher}  # of a checkpoint
        self.parts |= {"optimizer": self.optimizer, "scaler": self.scaler}

    def step(self, blocks, lr, weight_decay, momentum):
        """A step over this process's blocks of (seed, views, masks, index): the whole algorithm.

        The gradient is the mean over the blocks of all processes: that of their whole batch.
        Returns means of the loss and its parts, and z_s, z_t of the last block, for the log.
        """
        figures = []
        self.optimizer.zero_grad()
        for taken, (seed, views, masks, index) in enumerate(blocks, start=1):
            torch.manual_seed(seed)  # of augmentation and stochastic depth
            views = augment([view.to(self.device, non_blocking=True) for view in views])
            masks, index = (x.to(self.device, non_blocking=True) for x in (masks, index))
            self.model.require_backward_grad_sync = taken == self.rounds  # DDP: once a step
            with self.autocast:
                with torch.no_grad():
                    z_t, p_t = self.teacher(views[:2], index)  # (2, B, d), (M, d)
                z_s, p_s = self.model(views, index, masks)  # (V, B, d), (M, d)
            loss, stats = self.loss_fn(z_s, z_t)
            patch_loss = masked_patch_loss(p_s, p_t, masks)
            loss = loss + self.patch_weight * patch_loss
            self.scaler.scale(loss / self.rounds).backward()
            figures.append(torch.stack([loss.detach(), *stats.values(), patch_loss.detach()]))

        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:  # backbone and head, each as a whole, as DINOv2 does
            nn.utils.clip_grad_norm_(self.student.backbone.parameters(), self.clip_grad)
            nn.utils.clip_grad_norm_(self.student.head.parameters(), self.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay * group["decays"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():  # the teacher: exponential moving average of the student
            torch._foreach_lerp_(list(self.teacher.parameters()), self.params, 1 - momentum)
        return torch.stack(figures).mean(0), z_s.detach(), z_t


def parameter_groups(student, layerwise_decay, patch_embed_lr_mult):
    """AdamW's groups. decays: all but biases, norms and LayerScale. lr_scale: layerwise_decay for
    each layer below the last norm and head; the embeddings and tokens are the lowest layer."""
    depth, groups = len(student.backbone.blocks), {}
    for name, p in student.named_parameters():
        block = re.match(r"backbone\.blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 0  # 0: the embeddings and tokens
        if name.startswith(("backbone.norm.", "head.")):
            layer = depth + 1
        scale = layerwise_decay ** (depth + 1 - layer)
        scale *= patch_embed_lr_mult if "patch_embed" in name else 1
        groups.setdefault((scale, p.ndim > 1), []).append(p)
    return [{"params": p, "lr_scale": s, "decays": d} for (s, d), p in groups.items()]


# ================================================================================== 2. What runs it

SCRIPT = Path(__file__)
RANK = int(os.environ.get("RANK", "0"))  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""  # clears the line it is printed on
SAID, LOCKS = [0.0], []  # when the last line was printed; files that are locked
MEMORY = "(if memory is short: --num_workers 0, a larger /dev/shm: docker's --shm-size)"
BUSY, SIGNALS = [], []  # not empty: a step is being taken; the signals that wait for its end

# ------------------------------------------------------------------------ one run of many processes


def start_process():
    """The device of this process, which joins the others."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        if LOCAL_RANK >= torch.cuda.device_count():
            stop(f"no GPU for process {LOCAL_RANK}: lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # off by default for matrix products, not here
    atexit.register(end_workers)
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def meet(value):
    """The values of all processes, in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def leave(status=0):
    """End the group where all processes agree to, or gloo's threads may abort; with a status or a
    message, end the process too."""
    if WORLD > 1 and dist.is_initialized():
        time.sleep(0.2)  # until gloo's threads hold nothing: PyTorch 2.6 would wait for ever
        dist.destroy_process_group()
    if status:
        raise SystemExit(status if RANK == 0 or isinstance(status, int) else 1)


class together:
    """with together(): what stops one process inside stops all at its end, with one line."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        problem = getattr(error, "code", error and f"{SCRIPT.name}: {reason(error)}")
        if kind and not issubclass(kind, (SystemExit, OSError)):  # what nobody expects
            traceback.print_exception(error)
        problem = next(filter(None, meet(problem)), None)
        if problem:
            leave(problem)


@contextmanager
def or_stop(message):
    """If what is inside fails, end the run with message and the reason in one line."""
    try:
        yield
    except Exception as error:  # there is no end to what a file may make its reader raise
        raise SystemExit(f"{SCRIPT.name}: {message} ({reason(error)})") from error


def stop(message, agreed=False):
    """End this process with status 1 and one line; agreed: all of them, and the first says it."""
    end = leave if agreed else sys.exit
    end(f"{SCRIPT.name}: {message}")


def reason(error):
    """An exception's text in one line; of a worker's, which holds a traceback, the last line."""
    lines = str(error).split("\n")
    text = lines[-1] or lines[-2] if "Traceback" in str(error) else " ".join(lines)
    return " ".join(text.split())[:300] or type(error).__name__


def say(text, end="\n"):
    """Print on the first process. end="": progress; on a terminal the next line takes its place,
    elsewhere there is one a minute."""
    if RANK == 0 and (CLEAR or end or time.monotonic() - SAID[0] > 60):
        SAID[0] = time.monotonic()
        text = text if end else text[: shutil.get_terminal_size().columns - 1]
        print(CLEAR + text, end=end if CLEAR else "\n", flush=True)


def answer(number, _):
    """Handler of SIGINT and SIGTERM: ends the process or, if BUSY, lets it save first."""
    if not BUSY:
        say(f"{signal.Signals(number).name}: {SCRIPT.name} ends")
        raise SystemExit(128 + number)
    SIGNALS.append(number)


def last_words(kind, error, trace):
    """As sys.excepthook: one line if another process or a worker ended first, or the traceback."""
    if WORLD > 1 and re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
        line = f"{SCRIPT.name}: process {RANK} ends, as another one has, most likely"
        print(f"{line} ({reason(error)})", file=sys.stderr)
    elif "DataLoader worker" in str(error):
        print(f"{SCRIPT.name}: {reason(error)} {MEMORY}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def ignore_signals(_):
    """In a data loading process: the main process answers, and needs it until it ends."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit: kill the data loading processes, which ignore other signals."""
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler raises when a worker dies
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in active_children():
        worker.kill()


def seed_from(*numbers):
    """One 32-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --------------------------------------------------------------------------- the images, the labels

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
EXTENSIONS += (".ppm", ".pgm", ".jp2")
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE", "lost+found")  # how names begin that do not exist


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def load_image(path):
    """Any image that Pillow reads -> uint8 (3, H, W), RGB, upright by its EXIF orientation.

    More than 8 bits a pixel are stretched from the image's own lowest to its highest value.
    OSError for what cannot be read.
    """
    try:
        path = os.fspath(path)
        if path.lower().endswith((".jpg", ".jpeg")):
            with suppress(RuntimeError, AttributeError):  # no JPEG inside, or no decoder there
                data = torchvision.io.read_file(path)  # 1.2 to 1.4 times as fast as Pillow
                return torchvision.io.decode_jpeg(data, "RGB", apply_exif_orientation=True)
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip at 255
                pixels = np.nan_to_num(np.asarray(image, dtype=float), posinf=0, neginf=0)
                pixels = 255 * (pixels - pixels.min()) / max(np.ptp(pixels), 1e-12)
                image = Image.fromarray(pixels.round().astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # there is no end to what a decoder may raise
        raise OSError(f"{path!r} ({reason(error)})") from error


class Images(Dataset):
    """images[epoch * len + i] -> transform(image i), its label, what could not be read or "".

    What is drawn for it depends on (seed, epoch, i) alone, not on the worker. Another image, drawn
    likewise, takes the place of one that cannot be read; the last item then says which and why.
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


class MaskedBlocks(Dataset):
    """blocks[keys]: views and problems of the images with these keys, masks of their global crops,
    bool (2 B, N), and where these are True, (M,): drawn from the seed and the first key."""

    def __init__(self, images, side, probability, ratios):
        self.images, self.options = images, (side, probability, ratios)

    def __getitem__(self, keys):
        views, _, problems = default_collate([self.images[key] for key in keys])
        masks = block_masks(2 * len(keys), *self.options, (self.images.seed, keys[0]))
        return views, problems, masks, masks.flatten().nonzero().flatten()


def find_images(root):
    """Sorted names (bytes, relative to root) of the images below root, each folder visited once."""
    names, folders, links, seen = [], [""], [], set()
    while folders or links:
        folder = (folders or links).pop()  # links last, so that a folder keeps its own name
        path = os.path.join(root, folder)
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        for entry in os.scandir(path):
            name = os.path.join(folder, entry.name)
            nowhere = entry.is_symlink() and not os.path.exists(entry)  # broken, or to itself
            if entry.name.startswith(HIDDEN) or nowhere:
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                names.append(os.fsencode(name))
    return sorted(names)


def class_of(name):
    """The first folder of a name below its split, or None: the image has no label."""
    folder, separator, _ = os.fsdecode(name).partition(os.sep)
    return folder if separator else None


def find_data(root):
    """-> train, val, why: (folder, names, labels) of each, label -1 for none; val None, and why."""
    if not root.is_dir():
        stop(f"{root} is not a folder: --data_path needs one of images")
    inside = sorted(entry.name for entry in os.scandir(root) if os.path.isdir(entry))
    split, val, why = root / "train", None, f"{root} has no val/ or test/ but {inside[:5]}"
    if not split.is_dir():
        split_like = r"(?i)(train|val|valid|test)(ing|idation)?([\W_]?(\d+|images|imgs|data|set))?"
        if found := [name for name in inside if re.fullmatch(split_like, name)]:
            stop(f"{root} has {found} but no train/: rename one, or give it as --data_path")
        split = root
    with or_stop(f"cannot list {split}"):
        names = find_images(split)
    folders = [class_of(name) for name in names]
    classes = {name: i for i, name in enumerate(sorted(set(folders) - {None}))}
    for held_out in (root / "val", root / "test"):
        if val or not held_out.is_dir():
            continue
        with or_stop(f"cannot list {held_out}"):
            judged = [name for name in find_images(held_out) if class_of(name)]
        unknown = sorted({class_of(name) for name in judged} - classes.keys())
        if len(classes) < 2:
            why = f"{split} has fewer than two class folders"
        elif not judged:
            why = f"{held_out} has no images in class folders"
        elif unknown:
            why = f"of the class folders of {held_out} {', '.join(unknown[:5])} are not in {split}"
        else:
            val, why = (held_out, judged, [classes[class_of(name)] for name in judged]), ""
    return (split, names, [classes.get(folder, -1) for folder in folders]), val, why


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
        for kind in range(10):
            folder = temporary / split / str(kind)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng((split == "val", kind, number))
                draw_pattern(kind, rng).save(folder / f"{number:03}.png")
    temporary.rename(root)


# ----------------------------------------------------------------------------------- the evaluation


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size): Resize(256), CenterCrop(224); small ones are not cut."""
    short = max(size, min(*image.shape[1:], size * 8 // 7))
    image = TF.resize(image, short, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, size)


@torch.no_grad()
def embed(encode, images, num_workers, device):
    """Of this process's share: unit features and, last, the label; -1: none, -2: cannot be read."""
    share = math.ceil(len(images) / WORLD)
    batch = math.ceil(share / math.ceil(share / 256))  # of one size: one graph, if compiled
    own = np.arange(RANK, (share + -share % batch) * WORLD, WORLD)
    surplus = torch.from_numpy(own >= len(images)).split(batch)
    sampler, rows = (own % len(images)).tolist(), []
    workers = {"num_workers": num_workers, "worker_init_fn": ignore_signals}
    loader = DataLoader(images, batch, sampler=sampler, **workers)
    for (x, label, problems), skip in zip(loader, surplus):
        z = F.normalize(encode(normalize(x.to(device) / 255)).float(), dim=-1)
        label[torch.tensor([problem > "" for problem in problems])] = -2
        rows.append(torch.cat([z, label.masked_fill(skip, -1)[:, None].to(z)], dim=1))
    return torch.cat(rows)


def knn(model, judged, num_workers):
    """k-NN accuracy of the teacher's backbone; judged: Images to learn from and to judge by."""
    with together(), or_stop(f"k-NN {MEMORY}"), model.autocast:
        rows = [embed(model.teacher.backbone, x, num_workers, model.device) for x in judged]
    rows = [SimDINOLoss.gather(part) for part in rows]
    if unread := sum((part[:, -1] == -2).sum().item() for part in rows):
        say(f"{unread} images that cannot be read are left out of the k-NN accuracy")
    rows = [part[part[:, -1] >= 0] for part in rows]
    return knn_accuracy(*((part[:, :-1], part[:, -1].long()) for part in rows))


def knn_accuracy(train, val, k=20, temperature=0.07):
    """Top-1 accuracy on val in per cent, neighbours in train voting with exp(cosine / temperature).

    train, val: unit features (n, D) and labels (n,).
    """
    bank, labels = train
    hits = 0
    for z, y in zip(*(column.split(256) for column in val)):
        cosine, nearest = (z @ bank.mT).topk(min(k, len(bank)))
        votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == y).sum().item()
    return 100 * hits / len(val[1])


# -------------------------------------------------------------------------------------- the options

TINY, INF, AMP = 1e-12, math.inf, ("auto", "bf16", "fp16", "off")
OPTIONS = {  # flag: (default on the built-in data, the paper's on ImageNet, range, help)
    "--arch": ("vit_nano", "vit_base", tuple(ARCHS), "backbone, one of " + ", ".join(ARCHS)),
    "--patch_size": (8, 16, (1, INF), "side of a patch, pixels"),
    "--hidden_dim": (512, 2048, (1, INF), "width of the projection head"),
    "--drop_path_rate": (0.0, 0.2, (0, 1 - 1e-6), "share of a batch that skips a branch"),
    "--num_register_tokens": (4, 4, (0, INF), "register tokens"),
    "--layerscale": (1.0, 0.1, (0, INF), "what the LayerScale factors start from"),
    "--global_crops_size": (32, 224, (1, INF), "side of the 2 global views, pixels"),
    "--local_crops_size": (16, 96, (1, INF), "side of the local views, pixels"),
    "--global_crops_scale": ([0.4, 1.0], [0.4, 1.0], (TINY, 1), "share of the area, global view"),
    "--local_crops_scale": ([0.15, 0.4], [0.05, 0.4], (TINY, 1), "share of the area, local view"),
    "--local_crops_number": (6, 10, (0, INF), "local views of an image"),
    "--mask_sample_probability": (0.5, 0.5, (0, 1), "share of the global crops that are masked"),
    "--mask_ratio_min_max": ([0.1, 0.5], [0.1, 0.5], (TINY, 1), "share of their patches masked"),
    "--ibot_loss_weight": (1.0, 1.0, (0, INF), "weight of the masked patches' loss"),
    "--coeff": (1.0, 1.0, (0, INF), "weight of comp, the mean cosine"),
    "--eps_sq": (0.4, 0.4, (TINY, INF), "ε² of the coding rate R"),
    "--group_size": (64, 128, (0, INF), "images whose R is taken together; 0: those of a step"),
    "--eps": (None, None, (TINY, INF), "official flag: ε² = EPS batch_size / group, a GPU a group"),
    "--gamma": (None, None, (0, INF), "weight γ of R; by default (d + n) / (d n), n = batch_size"),
    "--expa_type": (1, 1, (0, 1), "R of the student's rows (0) or of (student + teacher) / 2 (1)"),
    "--epochs": (8, 100, (1, INF), "passes over the data"),
    "--batch_size": (64, 1024, (1, INF), "images of a step, all processes and rounds together"),
    "--batch_size_per_gpu": (64, 128, (1, INF), "images of a process at a time; alone: a step's"),
    "--lr": (0.005, 0.004, (TINY, INF), "peak learning rate, times the root of batch_size / 1024"),
    "--layerwise_decay": (1.0, 0.9, (TINY, 1), "factor of the learning rate to the block before"),
    "--patch_embed_lr_mult": (1.0, 0.2, (0, INF), "factor of the patch embedding's learning rate"),
    "--min_lr": (1e-6, 1e-6, (0, INF), "learning rate at the end"),
    "--warmup_epochs": (1.0, 10.0, (0, INF), "epochs over which the learning rate rises from 0"),
    "--weight_decay": (0.04, 0.04, (0, INF), "weight decay at the start"),
    "--weight_decay_end": (0.04, 0.4, (0, INF), "weight decay at the end"),
    "--clip_grad": (3.0, 3.0, (0, INF), "largest gradient norm of backbone, of head; 0: any"),
    "--momentum_teacher": (0.8, 0.9, (0, 1), "the teacher's momentum at the start; 1 at the end"),
    "--amp": ("auto", "auto", AMP, "auto: bf16 or else fp16 on GPUs; off: float32 without TF32"),
    "--num_workers": (1, min(10, os.cpu_count()), (0, INF), "data loading processes of a process"),
    "--saveckp_freq": (0, 10, (0, INF), "keep a copy of the checkpoint every so many epochs"),
    "--eval_freq": (4, 10, (0, INF), "k-NN accuracy every so many epochs; 0: never"),
    "--max_steps": (0, 0, (0, INF), "stop after so many steps of the schedule set by --epochs"),
    "--seed": (0, 0, (0, INF), "of weights, order, views, masks, augmentation, depth"),
}
# What may differ when a run is resumed; all else is the run.
FREE = "data_path output_dir compile grad_checkpointing small_images eps epochs amp num_workers "
FREE += "saveckp_freq eval_freq max_steps"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="defaults: [on built-in data | on --data_path]")
    parser.error = refuse = partial(stop, agreed=True)  # all processes have the same flags
    parser.add_argument("--data_path", help="train/ and val/, class folders, or a folder of images")
    parser.add_argument("--output_dir", default=f"output_{SCRIPT.stem}", help="of all it writes")
    text = "start from the backbone (and head) in FILE: ours, official SimDINO(v2), DINO(v2), timm"
    parser.add_argument("--pretrained_weights", metavar="FILE", help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    text = "with --data_path: the defaults of the built-in data, for images of some 32 pixels"
    parser.add_argument("--small_images", action="store_true", help=text)
    text = "compute the activations of a block again in the backward pass: slower, less memory"
    parser.add_argument("--grad_checkpointing", action="store_true", help=text)
    for flag, (built_in, imagenet, allowed, text) in OPTIONS.items():
        many = 2 if isinstance(built_in, list) else None
        kind = float if many or built_in is None else type(built_in)
        choices = allowed if kind is str else None
        text += f" [{built_in} | {imagenet}]"
        parser.add_argument(flag, type=kind, nargs=many, choices=choices, help=text)
    args = parser.parse_args(argv)
    if args.data_path == "":
        refuse("--data_path is empty")
    if args.batch_size_per_gpu and args.batch_size is None:  # as in DINO: a step of one round
        args.batch_size = args.batch_size_per_gpu * WORLD
    official = args.eps is not None and args.group_size is None  # there, what a GPU takes at a time
    small = args.small_images or not args.data_path
    for flag, (built_in, imagenet, allowed, _) in OPTIONS.items():
        if getattr(args, flag[2:]) is None:
            setattr(args, flag[2:], built_in if small else imagenet)
        value = getattr(args, flag[2:])
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, str | None):
                continue
            if not (math.isfinite(number) and allowed[0] <= number <= allowed[1]):
                refuse(f"{flag} {number} is not in the range from {allowed[0]:g} to {allowed[1]:g}")
        if isinstance(value, list) and value[0] > value[1]:
            refuse(f"{flag} takes two numbers, the lower one first")
        if flag.endswith("crops_size") and value % args.patch_size:
            refuse(f"{flag} {value} is not a multiple of --patch_size {args.patch_size}")
    if args.warmup_epochs >= args.epochs:
        refuse(f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}")

    n, own = args.batch_size, min(args.batch_size_per_gpu, max(1, args.batch_size // WORLD))
    at_once, group = own * WORLD, own if official else min(args.group_size or n, n)
    if n % at_once:
        fit = f"{max(1, n // at_once) * at_once} or {(n // at_once + 1) * at_once}"
        refuse(f"--batch_size {n} is not made of rounds of {WORLD} x {own} images: {fit} would be")
    if own % group and (group % own or at_once % group):  # inside no process, nor made of wholes
        fit = f"it must divide {own}, or be a multiple of it that divides {at_once}"
        refuse(f"--group_size {group} does not fit {WORLD} processes x {own} images: {fit}")
    args.batch_size_per_gpu, args.group_size = own, group
    if args.eps is not None:
        args.eps_sq = args.eps * n / group
    return args


def precision(amp, device):
    """The type that --amp means; "auto" is bf16 or else fp16 on GPUs, float32 on CPUs."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def cosine_schedule(base, final, total_steps, warmup_steps=0):
    """(total_steps,) values: linear from 0 to base over the warm-up, then half a cosine."""
    progress = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * progress)) / 2
    return np.concatenate([np.linspace(0, base, warmup_steps), cosine])


def block_keys(n, args, start, end, rank=RANK, world=WORLD):
    """Yield the keys, epoch * n + image, of each block that process rank takes from step start on.

    A step's images are cut into blocks of batch_size_per_gpu; round k of the process is block
    k * world + rank. So the blocks are the same whatever the number of processes.
    """
    size = args.batch_size_per_gpu
    for step in range(start, end):
        epoch, i = divmod(step, n // args.batch_size)
        if i == 0 or step == start:
            order = epoch * n + np.random.default_rng((args.seed, epoch)).permutation(n)
        images = order[i * args.batch_size : (i + 1) * args.batch_size]
        for block in range(rank, args.batch_size // size, world):
            yield images[block * size : (block + 1) * size].tolist()


# ------------------------------------------------------------------------------ weights from a file

WRAPPERS = {"module", "backbone", "_orig_mod"}  # parts of names: of DDP, DINO, torch.compile
HEADS = {"head", "dino_head", "ibot_head"}  # used in training; timm's classifier
# Beside tensors, official checkpoints hold their arguments and NumPy's learning rates.
SCALAR = np.float64(0).__reduce__()[0]  # rebuilds it; NumPy 1 and 2 pickle it by different names
SAFE = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [argparse.Namespace, np.dtype, type(np.dtype("float64"))]


def read_safetensors(path):
    """Tensors by name: 8 bytes with the length of a JSON header, the header, the numbers."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            x, dtype = data[start + begin : start + end], types[entry["dtype"]]
            x = torch.frombuffer(x, dtype=dtype) if x else torch.empty(0, dtype=dtype)
            tensors[name] = x.view(entry["shape"])
    return tensors


def read_weights(path, key="teacher"):
    """-> tensors of the backbone and of the head's mlp in path, by the names used here; the rest.

    path: a checkpoint, which has them under key or "model", or the tensors alone, of simdino.py,
    simdinov2.py, the official SimDINO(v2), DINO, DINOv2, timm; .pth or .safetensors.
    """
    reading = or_stop(f"the weights {path} are missing, damaged, no checkpoint or have code inside")
    with reading, torch.serialization.safe_globals(SAFE):
        if str(path).endswith(".safetensors"):
            state = read_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        state = {type(state).__name__: state}
    weights = state.get(key, state.get("model", state))
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        stop(f"no weights under {key} in {path}; what it has: {', '.join(map(str, state))}")

    tensors, mlp, left_out = {}, {}, set()
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part not in WRAPPERS]
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", ".".join(parts))  # chunks of FSDP
        if re.match(r"(dino_)?head\.mlp\.", name):
            mlp[name.partition(".")[2]] = tensor
        elif parts[0] in HEADS:
            left_out.add(".".join(parts[:2]))
        else:
            tensors["register_tokens" if name == "reg_token" else name] = tensor
    if not {"patch_embed.proj.weight", "pos_embed"} <= tensors.keys():
        stop(f"{path} holds no vision transformer: no patch_embed.proj.weight and pos_embed")
    if math.isqrt(tensors["pos_embed"].shape[1]) ** 2 == tensors["pos_embed"].shape[1]:
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))  # timm: none for CLS
    return tensors, mlp, left_out


def load_pretrained(path, backbone, head):
    """Start backbone, and head if path has one that fits; positions are interpolated."""
    tensors, mlp, left_out = read_weights(path)
    tensors.setdefault("mask_token", backbone.mask_token.detach())  # timm has none
    try:
        cls, grid = tensors["pos_embed"].split([1, tensors["pos_embed"].shape[1] - 1], dim=1)
        if (side := math.isqrt(grid.shape[1])) != backbone.side:
            grid = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            size = backbone.side, backbone.side
            grid = F.interpolate(grid, size, mode="bicubic", antialias=True).flatten(2).mT
            tensors["pos_embed"] = torch.cat([cls, grid], dim=1)
        backbone.load_state_dict(tensors)
    except RuntimeError as error:  # lists what is missing, left over or of another shape
        text = " ".join(str(error).split())
        stop(f"{path} does not fit this --arch, --patch_size and method: {text}")
    shapes = [{k: x.shape for k, x in part.items()} for part in (mlp, head.state_dict())]
    if fits := shapes[0] == shapes[1]:
        head.load_state_dict(mlp)
    left_out |= {"head.mlp"} if mlp and not fits else set()
    text = "backbone and head" if fits else "backbone; the head starts anew"
    say(f"{path}: {text}; left out: {', '.join(sorted(left_out)) or 'nothing'}")


# ---------------------------------------------------------------------------------- the checkpoints


def claim(output):
    """Make the folder, and lock it as long as this process lives."""
    with or_stop(f"cannot write to --output_dir {output}"):
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    with suppress(ImportError, OSError):  # there is no fcntl on Windows, no lock on some disks
        import fcntl

        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"another run is writing to {output}: choose another --output_dir")
    LOCKS.append(lock)


def write(path, dump):
    """dump(file) to a temporary file, then rename: path is never half written."""
    partial_path = path.with_suffix(".partial")
    try:
        with open(partial_path, "wb") as file:
            dump(file)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except Exception as error:  # a full disk: torch.save has an error of its own to say of it
        why = reason(error.__context__ or error)
        raise SystemExit(f"{SCRIPT.name}: cannot write {path} ({why})") from error
    finally:  # also after a signal
        partial_path.unlink(missing_ok=True)


def same_run(old, new):
    """ValueError that names what differs where new is not as in old."""
    differ = [f"its {k} is {old.get(k)}, not {v}" for k, v in new.items() if old.get(k) != v]
    if differ:
        raise ValueError(f"it is of another run: {'; '.join(differ)}")


def restore(path, run, parts):
    """Load student, teacher, optimizer and scaler from path, if it is of this run; -> the rest."""
    with or_stop(f"cannot resume {path}: move {path.parent} away, or choose another --output_dir"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        same_run(state["args"], {k: v for k, v in run.items() if k not in FREE.split()})
        for name, part in parts.items():
            if state[name]:  # not the scaler of a run without one
                part.load_state_dict(state[name])
        return state


# --------------------------------------------------------------------------------------------- main


def open_images(args, root):
    """Images to train on, those to judge by (train, val; or none), and why there are none."""
    train, val, why = find_data(root)
    total, block = len(train[1]), args.batch_size_per_gpu * WORLD
    if total < WORLD:
        stop(f"{train[0]} has {total} images ({', '.join(EXTENSIONS)})")
    if total < args.batch_size:
        fit = total // block * block or max(min(total, args.group_size) // WORLD, 1) * WORLD
        stop(f"{train[0]} has {total} images, fewer than a step: try --batch_size {fit}")
    sizes = args.global_crops_size, args.local_crops_size
    scales = args.global_crops_scale, args.local_crops_scale
    images = Images(*train, MultiCrop(*sizes, *scales, args.local_crops_number), args.seed)
    center = partial(center_crop, size=args.global_crops_size)
    judged = [Images(*split, center) for split in (train, val) if val and args.eval_freq]
    for some in (images, *judged[1:]):
        some[0]  # ends here if no image can be read
    return images, judged, why if args.eval_freq else "--eval_freq 0"


def build(args, device):
    """Student, teacher, optimizer and loss, as the options say."""
    torch.manual_seed(seed_from(args.seed))
    shape = {"img_size": args.global_crops_size, "patch_size": args.patch_size, **ARCHS[args.arch]}
    shape |= {"num_register_tokens": args.num_register_tokens, "layerscale": args.layerscale}
    backbone = VisionTransformer(**shape, drop_path_rate=args.drop_path_rate)
    backbone.grad_checkpointing = args.grad_checkpointing
    head, n = ProjectionHead(shape["embed_dim"], args.hidden_dim), args.batch_size
    d = head.mlp[-1].out_features
    gamma = (d + n) / (d * n) if args.gamma is None else args.gamma
    loss_fn = SimDINOLoss(args.eps_sq, args.group_size, args.coeff, gamma, args.expa_type)
    rounds, dtype = n // (args.batch_size_per_gpu * WORLD), precision(args.amp, device)
    student = Network(OrderedDict(backbone=backbone, head=head)).to(device)
    groups = parameter_groups(student, args.layerwise_decay, args.patch_embed_lr_mult)
    weight, clip_grad = args.ibot_loss_weight, args.clip_grad
    return SimDINO(student, groups, loss_fn, weight, clip_grad, rounds, dtype)


def prepare(model, compiled):
    """Compile the blocks and what changes colours, and wrap the student for several processes."""
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # block by block: there is nothing to split
        for block in (*model.student.backbone.blocks, *model.teacher.backbone.blocks):
            block.compile(dynamic=False)
        for name in "adjust_hue", "blend", "grayscale", "normalize":
            globals()[name] = torch.compile(globals()[name])
    if model.device.type == "cpu":  # there, the fused attention's backward pass is slow in bf16
        torch.backends.cuda.enable_flash_sdp(model.dtype == torch.float32)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if WORLD > 1:
        ids = [model.device.index] if model.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        model.model = ddp(model.student, ids, gradient_as_bucket_view=True)


def announce(args, model, images, steps, why):
    """The first line: what the run does, and on what; then why there is no k-NN accuracy."""
    card = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    size = f"{sum(p.numel() for p in model.params) / 1e6:.1f} M parameters"
    line = f"{WORLD} x {card}, {str(model.dtype)[6:]}: {args.arch}, {size}; "
    line += f"a step: {args.batch_size} images = {model.rounds} rounds x {WORLD} processes x "
    line += f"{args.batch_size_per_gpu}"
    say(f"{line}; {steps} steps = {args.epochs} epochs of {len(images)} images, {images.root}")
    if args.data_path and steps < 2000:
        say(f"{steps} steps are few: a smaller --batch_size or more --epochs makes more of them")
    if why:
        say(f"no k-NN accuracy: {why}")


def advice(images):
    """What to do about a collapse on uint8 images (B, 3, H, W)."""
    if images.float().std((1, 2, 3)).median() < 2:
        return "the images are (nearly) constant"
    return "try a smaller --eps_sq, a larger --gamma or a lower --lr"


def main():
    args = parse_args()
    device, output = start_process(), Path(args.output_dir)
    root = Path(args.data_path or output / "patterns")
    with together():
        if RANK == 0:
            claim(output)
            if not (args.data_path or root.exists()):
                render_patterns(root)
    with together():
        images, judged, why = open_images(args, root)
        run = vars(args) | {"image_list": digest(b"\0".join(images.names))}
        if args.pretrained_weights:
            run["pretrained_weights"] = digest(Path(args.pretrained_weights).read_bytes())
    if len(set(meet(run["image_list"]))) > 1:
        stop(f"the processes do not find the same images in {images.root}", agreed=True)
    model = build(args, device)
    weights, cuda = sum(p.numel() for p in model.params), device.type == "cuda"
    n, per_epoch = args.batch_size, len(images) // args.batch_size
    steps = args.epochs * per_epoch
    end = min(steps, args.max_steps or steps)
    announce(args, model, images, steps, why)

    # Resume
    path, log, figures, done = output / "checkpoint.pth", [], [], 0
    found = any(meet(path.exists()))  # on several machines: all resume, or none
    with together():
        if found:
            state = restore(path, run, model.parts)
            done, log, figures = state["step"], state["log"], state["figures"]
            if done < end:
                log = log[: done // per_epoch]  # an epoch that goes on is logged at its end
            say(f"resumed {path} at step {done}")
        elif args.pretrained_weights:
            load_pretrained(args.pretrained_weights, model.student.backbone, model.student.head)
            model.teacher.load_state_dict(model.student.state_dict())
        if RANK == 0 and shutil.disk_usage(output).free < 16 * weights:
            stop(f"--output_dir {output} has no room for a checkpoint of {16e-9 * weights:.2g} GB")
    prepare(model, args.compile)

    # Schedules, one value a step
    warmup = int(args.warmup_epochs * per_epoch)
    lr = cosine_schedule(args.lr * math.sqrt(n / 1024), args.min_lr, steps, warmup).tolist()
    wd = cosine_schedule(args.weight_decay, args.weight_decay_end, steps).tolist()
    momentum = cosine_schedule(args.momentum_teacher, 1.0, steps).tolist()

    keys = block_keys(len(images), args, done, end)
    workers = {"num_workers": args.num_workers, "worker_init_fn": ignore_signals}
    masking = args.mask_sample_probability, args.mask_ratio_min_max
    masked = MaskedBlocks(images, model.student.backbone.side, *masking)
    loader = DataLoader(masked, batch_size=None, sampler=keys, pin_memory=cuda, **workers)
    data, views, waited, unread, named = iter(loader), [], 0.0, 0, set()

    def blocks(step):
        """This process's blocks of a step, as they come from the workers."""
        nonlocal views, waited, unread
        for block in range(RANK, n // args.batch_size_per_gpu, WORLD):
            asked = time.perf_counter()
            with or_stop(f"cannot load images {MEMORY}"):
                views, problems, *masks = next(data)
            waited += time.perf_counter() - asked
            for problem in filter(None, problems):
                unread += 1
                if problem not in named and len(named) < 5:
                    print(f"{CLEAR}unreadable, another takes its place: {problem}", flush=True)
                    named.add(problem)
            yield seed_from(args.seed, step, block), views, *masks

    def store(name="checkpoint.pth"):
        """Write the checkpoint, and the log that it holds as a file."""
        tensors = [x for values in model.optimizer.state.values() for x in values.values()]
        tensors += [*model.params, *model.teacher.parameters()]
        with together():
            if not all(x.isfinite().all() for x in tensors):
                stop(f"weights are not finite after step {done}: try a lower --lr or --amp off")
            if RANK == 0:
                state = {key: part.state_dict() for key, part in model.parts.items()}
                state |= {"step": done, "epoch": done // per_epoch, "args": run}
                write(output / name, partial(torch.save, state | {"log": log, "figures": figures}))
                lines = "".join(json.dumps(entry) + "\n" for entry in log)
                write(output / "log.txt", lambda file: file.write(lines.encode()))

    def judge():
        """k-NN accuracy after the epoch that the log ends with, where it is due and not known."""
        due = done >= end or done % max(1, args.eval_freq * per_epoch) == 0
        if judged and due and log[-1]["knn"] is None:
            log[-1]["knn"] = knn(model, judged, args.num_workers)
            say(f"k-NN accuracy after epoch {len(log)}: {log[-1]['knn']:.1f} %")
            store()

    if log:
        judge()
    elif judged and not done and not args.data_path:
        say(f"k-NN accuracy of random weights: {knn(model, judged, args.num_workers):.1f} %")
    saved = time.monotonic()
    while done < end:
        epoch = done // per_epoch
        first, clock, pending, waited, unread = done, time.perf_counter(), [], 0.0, 0
        stop_at = min(end, (epoch + 1) * per_epoch)
        BUSY.append(epoch)
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # the peak of training, not of k-NN
        for step in range(done, stop_at):
            figure, z_s, z_t = model.step(blocks(step), lr[step], wd[step], momentum[step])
            pending.append(figure)
            done = step + 1
            if done != stop_at and done % 10 and not (SIGNALS and WORLD == 1):
                continue

            # Every 10 steps the host waits for the device, and the processes for one another.
            late = time.monotonic() - saved > 900
            told = meet((torch.stack(pending).tolist(), max(SIGNALS, default=0), late))
            new, signals, late = zip(*told)
            new, pending = np.mean(new, axis=0), []
            if not np.isfinite(new).all():
                at = done - len(new) + 1 + np.isfinite(new).all(1).argmin()
                stop(f"the loss is not finite at step {at}: lower --lr, or --amp off", agreed=True)
            if model.scaler.get_scale() < 1:  # 1 without fp16
                stop(f"no finite gradients by step {done}: try --amp bf16 or off", agreed=True)
            figures += new.tolist()
            rank = effective_rank(((z_s[:2] + z_t) / 2).flatten(0, 1)).item()
            seconds, (loss, comp, expa, patch) = time.perf_counter() - clock, new[-1]
            speed = (done - first) * n / seconds
            line = f"epoch {epoch + 1}/{args.epochs} step {done}/{steps} loss {loss:.3f} "
            line += f"patch {-patch:.3f} "
            line += f"comp {comp:.3f} expa {expa:.3f} rank {rank:.1f} {speed:.0f} img/s "
            line += f"ETA {timedelta(seconds=int((end - done) * n / speed))}"
            say(line, end="\n" if done == stop_at else "")
            if max(signals):
                break
            if late[0]:
                store()
                saved = time.monotonic()

        # The end of an epoch, or of what is done of it
        loss, comp, expa, patch = np.mean(figures, axis=0).tolist()
        span = slice(epoch * per_epoch, done)
        entry = {"epoch": epoch, "train_loss": loss, "train_comp_loss": comp}
        entry["train_ibot_loss"] = patch
        entry |= {"train_expa_loss": expa, "train_lr": float(np.mean(lr[span]))}
        entry |= {"train_wd": float(np.mean(wd[span])), "rank": rank, "knn": None}
        entry |= {"dist": (z_s[:2] - z_t).norm(dim=-1).mean().item(), "img_s": speed}
        entry |= {"data_wait": waited / seconds, "bad_images": sum(meet(unread))}
        if entry["bad_images"]:
            say(f"{entry['bad_images']} images could not be read")
        entry["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        log.append(entry)
        figures = figures if done % per_epoch else []
        store()
        saved = time.monotonic()
        if args.saveckp_freq and not (done % per_epoch or epoch % args.saveckp_freq):
            store(f"checkpoint{epoch:04}.pth")
        BUSY.clear()
        if number := max(meet(max(SIGNALS, default=0))):
            say(f"{signal.Signals(number).name}: saved {path} at step {done}, to be resumed")
            leave(128 + number)
        if rank < 2 and epoch > 0:
            say(f"warning: collapse: {advice(views[0])}")
        judge()
    leave()


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, answer)
    sys.excepthook = last_words
    for stream in sys.stdout, sys.stderr:  # a file's name may be no valid text
        stream.reconfigure(errors="backslashreplace")
    main()
