# SPDX-License-Identifier: MIT
"""SimDINO: DINO without prototypes, centering, sharpening or temperatures, in one file.

An image gives V views: 2 global crops and several local ones. The student, a ViT with a 3-layer
head, maps all of them to unit vectors z_s; the teacher, a moving average (EMA) of the student,
maps the global ones to z_t. Views of one image are pulled together, and the rows Z of the global
views are kept apart, weighed by a constant gamma:

    loss = mean 1/2 |z_s - z_t|^2 - gamma R_eps(Z)     mean: (global, other view) pairs of an image
    R_eps(Z) = 1/2 logdet(I + d / (n eps^2) Z'Z)       coding rate of Z, n unit rows of d numbers

    torchrun simdino.py                                               # the built-in data
    torchrun --nproc_per_node=8 simdino.py --data_path /imagenet      # the paper's ImageNet recipe
    torchrun simdino.py --data_path FOLDER --arch vit_small           # any folder of images

The first trains a ViT on ten kinds of patterns that the script draws: k-NN 62.4 and 66.2 % (seeds 0
and 1) in 1.9 minutes on 2 CPU cores, where raw pixels give 34.2 %, random weights 17.2 and 15.0 %.

"Simplifying DINO via Coding Rate Regularization", Wu et al., ICML 2025, arXiv 2502.10385.
"Official" below is the authors' code, github.com/RobinWu218/SimDINO.
"""

import argparse
import copy
import json
import math
import os
import resource
import shutil
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import StochasticDepth
from torchvision.transforms import functional as TF

SCRIPT = Path(__file__)
RANK = int(os.environ.get("RANK", "0"))  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))

# ----------------------------------------------------------------------------------------- the loss


def coding_rate(z, eps_sq):
    """Coding rate R = 1/2 logdet(I + d / (n eps^2) Z'Z) of n unit rows, in nats: paper, eq. (8).

    z: (..., n, d); eps_sq: squared quantisation error, > 0. Returns (...): smallest when all rows
    are alike, largest when they are orthogonal.
    """
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z  # ZZ' and Z'Z share their non-zero spectrum
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    factor, _ = torch.linalg.cholesky_ex(eye + d / (n * eps_sq) * gram)  # _ex: no wait for the GPU
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # 1/2 logdet(LL') = sum log diag(L)


class SimDINOLoss(torch.nn.Module):
    """loss = -coeff * comp - gamma * R: mean 1/2 |z_s - z_t|^2 - gamma R, less the constant 1.

    comp ("compression", the official name): mean cosine over the pairs of a teacher's global view
    and another view of the student's; 1/2 |z_s - z_t|^2 = 1 - cosine for unit rows.
    R: mean coding rate over the 2 global views and over groups of group_size rows, cut in rank
    order from the global batch (None: the global batch is one group); expa ("expansion") = gamma R.
    expa_type: R of the student's rows (0), or of (student + teacher) / 2 (1, the official default):
    rows that are shorter than 1 where the two disagree.
    gamma: None for the official (d + n) / (d n), with n the global batch, not the group.
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

    def forward(self, student, teacher, with_rank=True):
        """student (V, B, d), its 2 global views first, teacher (2, B, d): unit rows.

        Returns the loss and detached scalars: comp, expa and, if with_rank, rank, the effective
        rank of the global batch's rows, exp(entropy of their spectrum): 1 when all are alike. It
        makes the host wait for the device. B is the same on all ranks; ValueError if the group does
        not divide the global batch.
        """
        with torch.autocast(student.device.type, enabled=False):  # a log-determinant needs float32
            dtype = torch.promote_types(student.dtype, torch.float32)
            student, teacher = student.to(dtype), teacher.detach().to(dtype)
            views, _, d = student.shape

            cosine = torch.cosine_similarity(teacher[:, None], student, dim=-1).mean(-1)  # (2, V)
            comp = (cosine.sum() - cosine.diagonal().sum()) / (2 * views - 2)  # not the same view

            z = student[:2] if self.expa_type == 0 else (student[:2] + teacher) / 2
            z = self.gather(z)  # (2, n, d)
            n = z.shape[1]
            group = min(self.group_size or n, n)
            if n % group:
                raise ValueError(f"group_size {group} does not divide the global batch of {n}")
            gamma = (d + n) / (d * n) if self.gamma is None else self.gamma
            expa = gamma * coding_rate(z.unflatten(1, (-1, group)), self.eps_sq).mean()

            stats = {"comp": comp.detach(), "expa": expa.detach()}
            if with_rank:
                rows = z.detach().flatten(0, 1)
                gram = (rows.mT @ rows).nan_to_num()  # eigvalsh raises on NaN
                p = torch.linalg.eigvalsh(gram).clamp(min=1e-12)
                stats["rank"] = torch.special.entr(p / p.sum()).sum().exp()
        return -self.coeff * comp - expa, stats

    @staticmethod
    def gather(z):
        """All ranks' rows (..., B, d) -> (..., n, d), in rank order; this rank's carry gradient."""
        dist = torch.distributed  # by its full name, so that the class can be copied alone
        if not (dist.is_available() and dist.is_initialized()):
            return z
        own = z.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        # The value of z, world times its gradient: DDP averages over ranks, R needs the sum.
        parts[dist.get_rank()] = own + len(parts) * (z - own)
        return torch.cat(parts, dim=-2)


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

    def heads(self, x):  # (B, T, D) -> q, k, v, each (B, heads, T, D / heads)
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x):
        q, k, _ = self.heads(x)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # (B, heads, T, T)


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(  # the names are timm's
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT whose parameters are named as in DINO and timm, so that weights travel both ways.

    forward: images (B, 3, H, W), H and W multiples of patch_size -> CLS features (B, D); a list of
    such batches, of several sizes -> their CLS features concatenated in that order.
    """

    def __init__(
        self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, drop_path_rate=0.0
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.patch_size, self.side = patch_size, img_size // patch_size
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
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
        # The 0.1 is DINO's, against rounding; it shifts the grid a little, as its weights expect.
        factor = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x):
        """(B, 3, H, W) -> (B, 1 + N, D): CLS and patch tokens with their position embedding."""
        h, w = x.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"{h} x {w} pixels: not multiples of patch size {self.patch_size}")
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.position_embedding(h // self.patch_size, w // self.patch_size)

    def forward(self, x):
        if isinstance(x, (list, tuple)):  # one pass for each run of equally sized batches
            runs = groupby(x, key=lambda batch: batch.shape[-2:])
            return torch.cat([self(torch.cat(list(run))) for _, run in runs])
        x = self.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    # The next two are not used in training: for evaluation and pictures.

    def get_intermediate_layers(self, x, n=1):
        """Normed tokens (B, 1 + N, D), CLS first, of the last n blocks, as a list."""
        x, outputs = self.prepare_tokens(x), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-n:]]

    def get_last_selfattention(self, x):
        """Attention weights (B, heads, T, T) of the last block, T = 1 + N tokens, CLS first."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))


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


# ----------------------------------------------------------------------------------------- the data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def load_image(path):
    """Any image that Pillow reads -> uint8 (3, H, W), RGB, upright by its EXIF orientation."""
    if str(path).lower().endswith((".jpg", ".jpeg")):
        with suppress(RuntimeError, AttributeError):  # no JPEG inside, or no decoder in torchvision
            data = torchvision.io.read_file(str(path))  # 1.2 to 1.4 times as fast as Pillow
            return torchvision.io.decode_jpeg(data, "RGB", apply_exif_orientation=True)
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size): Resize(256), CenterCrop(224); small ones are not cut."""
    short = max(size, min(*image.shape[1:], size * 8 // 7))
    image = TF.resize(image, short, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, size)


def normalize(x):
    """(B, 3, H, W) in [0, 1] -> mean 0 and variance 1 over ImageNet."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(x.device, non_blocking=True)
    return (x - mean) / std


def blend(x, other, factor):
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_hue(x, shift):
    """Rotate the hue of x, (B, 3, H, W) in [0, 1], by shift (B, 1, 1, 1) turns, through HSV."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    hue = torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(value == r, g - b, hue) / chroma.clamp(min=1e-8) + 6 * shift
    # HSV to RGB: V - C clamp(min(k, 4 - k), 0, 1), k = (hue + 5, 3, 1 for R, G, B) mod 6
    k = (hue + 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius=6):  # radius: 3 times the largest sigma, 2
    """Blur each image of x (B, 3, H, W) by its own sigma (B,): two products with band matrices."""

    def band(size):  # (B, size, size), rows sum to 1, borders reflected
        offset = torch.arange(-min(radius, size - 1), min(radius, size - 1) + 1, device=x.device)
        weight = (-((offset / sigma[:, None]) ** 2) / 2).softmax(-1)  # (B, taps)
        at = (torch.arange(size, device=x.device) + offset[:, None]).abs()
        at = (size - 1) - ((size - 1) - at).abs()
        taps = torch.eye(size, dtype=x.dtype, device=x.device)[at]  # (taps, size, size)
        return torch.einsum("bk,kij->bij", weight, taps)[:, None]

    return band(x.shape[2]) @ x @ band(x.shape[3]).mT


def jitter(x, order, brightness, contrast, saturation, hue):
    """Colour jitter of x, (B, 3, H, W) in [0, 1]: factors and hue shift (B, 1, 1, 1), in order."""
    for i in order:
        if i == 0:
            x = blend(x, 0, brightness)
        elif i == 1:
            x = blend(x, TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), contrast)
        elif i == 2:
            x = blend(x, TF.rgb_to_grayscale(x), saturation)
        else:
            x = adjust_hue(x, hue)
    return x


def augment(views, generator=None):
    """On the device: uint8 batches (B, 3, h, w), two global views first -> normalised float32.

    DINO's photometric augmentation with random parameters for each view of each image: flip, colour
    jitter (its order is drawn for a batch), grayscale, blur, solarise; all equal torchvision's.
    """
    batch, out = len(views[0]), []
    chances = [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * (len(views) - 2)  # of blur, of solarise
    source = "cpu" if generator is None else generator.device  # drawn there, sent in one copy
    pairs = zip(views, chances)
    for _, run in groupby(pairs, key=lambda pair: pair[0].shape[-2:]):  # one pass a resolution
        same, p = zip(*run)
        x = torch.cat(same) / 255
        p = torch.tensor(p, device=source).repeat_interleave(batch, dim=0)
        u = torch.rand(10, len(x), device=source, generator=generator)
        order = torch.randperm(4, device=source, generator=generator).tolist()
        shift = (2 * u[:4] - 1) * (u[4] < 0.8)  # 0: no jitter
        sigma = torch.where(u[5] < p[:, 0], 0.1 + 1.9 * u[6], 1e-3)  # 1e-3: no blur
        drawn = torch.stack([*shift, sigma, u[7] < 0.5, u[8] < 0.2, u[9] < p[:, 1]])
        drawn = drawn[..., None, None, None].to(x.device, non_blocking=True)
        brightness, contrast, saturation, hue, sigma, flip, gray, solarize = drawn
        x = torch.where(flip > 0, x.flip(-1), x)
        factors = 1 + 0.4 * brightness, 1 + 0.4 * contrast, 1 + 0.2 * saturation, 0.1 * hue
        x = jitter(x, order, *factors)
        x = gaussian_blur(torch.where(gray > 0, TF.rgb_to_grayscale(x), x), sigma.flatten())
        x = torch.where((solarize > 0) & (x >= 128 / 255), 1 - x, x)
        out += normalize(x).split(batch)
    return out


class Images(Dataset):
    """images[epoch * len + i] -> transform(image i), its label, -1.

    If it cannot be read: the next image that can, that one's label, i.
    What transform draws at random depends on (seed, epoch, i) alone, not on the worker.
    """

    def __init__(self, paths, labels, transform, seed=0):
        self.paths, self.labels = np.array(paths), np.array(labels)  # arrays: workers share them
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = divmod(key, len(self))
        torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))  # of the CPU alone
        for skipped in range(len(self)):
            used = (index + skipped) % len(self)
            with suppress(Exception):  # there is no end to what a decoder may raise
                image = load_image(self.paths[used])
                break
        else:
            stop(f"none of {len(self)} images can be read: {self.paths[index]}, ...")
        return self.transform(image), self.labels[used], index if skipped else -1


def seed_from(*numbers):
    """One 32-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def find_images(root):
    """Sorted paths of the images below root, and the first part of each below root: its class."""
    paths = []
    for folder, _, names in os.walk(root, followlinks=True):
        paths += [os.path.join(folder, n) for n in names if n.lower().endswith(IMG_EXTENSIONS)]
    paths.sort()
    return paths, [os.path.relpath(path, root).split(os.sep)[0] for path in paths]


def find_data(root, batch):
    """-> (train, val), each (paths, labels); val is None if there are no labels."""
    if not root.is_dir():
        stop(f"{root} is not a folder: --data_path needs one of images")
    folder = root / "train" if (root / "train").is_dir() else root
    paths, names = find_images(folder)
    if len(paths) < batch:
        stop(f"{folder} has {len(paths)} images, fewer than one batch of {batch}")
    classes = {name: label for label, name in enumerate(sorted(set(names)))}
    train, val = (paths, [classes[name] for name in names]), None
    for held_out in (root / "test", root / "val"):  # val, where there are both
        paths, names = find_images(held_out) if folder != root else ([], [])
        if paths and set(names) <= set(classes):
            val = paths, [classes[name] for name in names]
    return train, val


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


@torch.no_grad()
def embed(encode, split, args, device):
    """Unit features (n, D) and labels (n,) of split = (paths, labels), gathered on every rank."""
    images = Images(*split, partial(center_crop, size=args.global_crops_size))
    images[0]  # stops here if no image can be read
    n, share = len(images), math.ceil(len(images) / WORLD)
    indices = [i % n for i in range(RANK * share, (RANK + 1) * share)]  # the surplus is cut below
    loader = DataLoader(images, 256, sampler=indices, num_workers=args.num_workers)
    rows = []
    for x, label, _ in loader:
        z = encode(normalize(x.to(device) / 255))
        rows.append((F.normalize(z.float(), dim=-1), label.to(device)[:, None]))
    z, labels = (SimDINOLoss.gather(torch.cat(column))[:n] for column in zip(*rows))
    return z, labels.flatten()


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


# ------------------------------------------------------------------------------------- the training

OPTIONS = {  # flag: (default on the built-in data, the paper's on ImageNet, help)
    "--arch": ("vit_nano", "vit_base", "backbone, one of " + ", ".join(ARCHS)),
    "--patch_size": (8, 16, "side of a patch, pixels"),
    "--hidden_dim": (512, 2048, "width of the projection head"),
    "--drop_path_rate": (0.0, 0.1, "stochastic depth of the student, rate at the last block"),
    "--global_crops_size": (32, 224, "side of the 2 global views, pixels"),
    "--local_crops_size": (16, 96, "side of the local views, pixels"),
    "--global_crops_scale": ((0.4, 1.0), (0.4, 1.0), "share of the image's area in a global view"),
    "--local_crops_scale": ((0.15, 0.4), (0.05, 0.4), "share of the image's area in a local view"),
    "--local_crops_number": (6, 10, "local views of an image"),
    "--coeff": (1.0, 1.0, "weight of comp, the mean cosine"),
    "--eps_sq": (0.4, 0.4, "eps^2 of the coding rate R"),
    "--group_size": (64, 64, "rows whose R is taken together; 0: the global batch"),
    "--eps": (None, None, "the official flag: eps^2 = EPS * global batch / group size"),
    "--gamma": (None, None, "weight of R; by default (d + n) / (d n), n = global batch"),
    "--expa_type": (1, 1, "R of the student's features (0) or of (student + teacher) / 2 (1)"),
    "--epochs": (7, 100, "passes over the data"),
    "--batch_size_per_gpu": (64, 64, "images a step in each process"),
    "--lr": (0.005, 0.0005, "peak learning rate for a global batch of 256, scaled in proportion"),
    "--min_lr": (1e-6, 1e-6, "learning rate at the end"),
    "--warmup_epochs": (1.0, 10.0, "epochs over which the learning rate rises from 0"),
    "--weight_decay": (0.04, 0.04, "weight decay at the start"),
    "--weight_decay_end": (0.04, 0.4, "weight decay at the end"),
    "--clip_grad": (3.0, 3.0, "largest gradient norm of each parameter tensor; 0: any"),
    "--momentum_teacher": (0.8, 0.996, "momentum of the EMA teacher at the start; 1 at the end"),
    "--amp": ("auto", "auto", "bf16, fp16 or off; auto: bf16 or else fp16 on GPUs, off on CPUs"),
    "--num_workers": (1, min(10, os.cpu_count()), "data loading processes of a training process"),
    "--saveckp_freq": (0, 10, "keep a copy of the checkpoint every so many epochs; 0: never"),
    "--eval_freq": (4, 10, "k-NN accuracy every so many epochs, if there are labels; 0: never"),
    "--max_steps": (0, 0, "stop after so many steps of the schedule set by --epochs; 0: do not"),
    "--seed": (0, 0, "of weights, order, views, augmentation, stochastic depth"),
}
# Of these 0, too, is refused:
POSITIVE = "patch_size hidden_dim global_crops_size local_crops_size eps eps_sq epochs lr "
POSITIVE += "batch_size_per_gpu"


def stop(message):
    """End the run with one line on the terminal and status 1."""
    raise SystemExit(f"{SCRIPT.name}: {message}" if LOCAL_RANK == 0 else 1)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="defaults: [on built-in data | on --data_path]")
    parser.error = stop
    parser.add_argument("--data_path", help="train/ and val/, class folders, or a folder of images")
    parser.add_argument("--output_dir", default=f"output_{SCRIPT.stem}", help="of all it writes")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    choices = {"--arch": ARCHS, "--amp": ("auto", "bf16", "fp16", "off"), "--expa_type": (0, 1)}
    for flag, (built_in, imagenet, text) in OPTIONS.items():
        many = 2 if isinstance(built_in, tuple) else None
        kind = float if many or built_in is None else type(built_in)
        text += f" [{built_in} | {imagenet}]"
        parser.add_argument(flag, type=kind, nargs=many, choices=choices.get(flag), help=text)
    args = parser.parse_args(argv)
    for flag, (built_in, imagenet, _) in OPTIONS.items():
        if getattr(args, flag[2:]) is None:
            setattr(args, flag[2:], imagenet if args.data_path else built_in)

    for name, value in vars(args).items():
        least = 1e-12 if name in POSITIVE.split() else 0
        if isinstance(value, (int, float)) and not value >= least:
            stop(f"--{name} {value} is too small")
        if name.endswith("crops_size") and value % args.patch_size:
            stop(f"--{name} {value} is not a multiple of --patch_size {args.patch_size}")
        if isinstance(value, (list, tuple)) and not 0 < value[0] <= value[1] <= 1:
            stop(f"--{name} takes two numbers, 0 < LOW <= HIGH <= 1")
        if name in ("drop_path_rate", "momentum_teacher", "mask_sample_probability") and value > 1:
            stop(f"--{name} {value} must not be above 1")
    if args.warmup_epochs >= args.epochs:
        stop(f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    args.global_batch = n = args.batch_size_per_gpu * WORLD
    args.group_size = min(args.group_size or n, n)
    if n % args.group_size:
        stop(f"--group_size {args.group_size} does not divide the global batch, {n}")
    if args.eps is not None:
        args.eps_sq = args.eps * n / args.group_size
    return args


def cosine_schedule(base, final, total_steps, warmup_steps=0):
    """(total_steps,) values: linear from 0 to base over the warm-up, then half a cosine."""
    progress = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * progress)) / 2
    return np.concatenate([np.linspace(0, base, warmup_steps), cosine])


def batches(n, args, start, end, rank=RANK):
    """Yield for each step the keys, epoch * n + image, of rank's block of the global batch."""
    for step in range(start, end):
        epoch, i = divmod(step, n // args.global_batch)
        if i == 0 or step == start:
            order = epoch * n + np.random.default_rng((args.seed, epoch)).permutation(n)
        first = i * args.global_batch + rank * args.batch_size_per_gpu
        yield order[first : first + args.batch_size_per_gpu].tolist()


def step_flops(backbone, args, batch=10):
    """Operations of both backbones for one image, counted on a copy without numbers ("meta")."""
    backbone = copy.deepcopy(backbone).to("meta")
    sizes = [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number
    views = [torch.empty(batch, 3, size, size, device="meta") for size in sizes]
    with FlopCounterMode(display=False) as counter:
        backbone(views).sum().backward()
        with torch.no_grad():
            backbone(views[:2])
    return counter.get_total_flops() / batch


def matmul_rate(device, dtype, n=8192, times=20):
    """Measured operations a second of n x n matrix products: the 100 % of the logged MFU."""
    x = torch.randn(n, n, device=device, dtype=dtype)
    for repeats in 1, times:  # the first is the warm-up
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(repeats):
            x @ x
    torch.cuda.synchronize()
    return 2 * n**3 * times / (time.perf_counter() - clock)


def save(path, state):
    """Write to a temporary file, then rename: path is never half written."""
    with open(path.with_suffix(".partial"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".partial").replace(path)


def restore(path, args, parts):
    """Load parts (student, teacher, optimizer, scaler) from path; returns the steps done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("arch", "patch_size", "global_crops_size", "global_batch", "images"):
            if state["args"][name] != getattr(args, name):
                raise ValueError(f"its {name} is {state['args'][name]}, not {getattr(args, name)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    except Exception as error:  # truncated, of something else, or with code inside
        reason = " ".join(str(error).split())[:120]
        message = f"cannot resume {path} ({reason}): move {path.parent} away, or choose another"
        raise SystemExit(f"{SCRIPT.name}: {message}") from error


def main():
    args = parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise SystemExit(f"no GPU for process {LOCAL_RANK}: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    say = print if RANK == 0 else lambda *_, **__: None
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write to --output_dir {output}: {error.strerror}")

    # The data
    root = Path(args.data_path or output / "patterns")
    if not args.data_path and RANK == 0 and not root.exists():
        render_patterns(root)
    if WORLD > 1:
        dist.barrier()
    train, val = find_data(root, args.global_batch)
    n, per_epoch = len(train[0]), len(train[0]) // args.global_batch
    args.images, total = n, args.epochs * per_epoch
    end = min(total, args.max_steps or total)
    say(f"{n} training images, {train[0][0]} the first; {len(val[0]) if val else 0} for k-NN")
    sizes = args.global_crops_size, args.local_crops_size
    scales = args.global_crops_scale, args.local_crops_scale
    images = Images(*train, MultiCrop(*sizes, *scales, args.local_crops_number), args.seed)
    images[0]  # stops here if no image can be read

    # Student and teacher
    torch.manual_seed(seed_from(args.seed))
    shape = {"img_size": args.global_crops_size, "patch_size": args.patch_size, **ARCHS[args.arch]}
    backbone = VisionTransformer(**shape, drop_path_rate=args.drop_path_rate)
    head = ProjectionHead(shape["embed_dim"], args.hidden_dim)
    student = nn.Sequential(OrderedDict(backbone=backbone, head=head)).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    params, teacher_params = list(student.parameters()), list(teacher.parameters())
    loss_fn = SimDINOLoss(args.eps_sq, args.group_size, args.coeff, args.gamma, args.expa_type)
    groups = [  # no weight decay on biases and norms
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = partial(torch.autocast, device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ideal = step_flops(backbone, args) / matmul_rate(device, dtype) if cuda else None  # s an image

    def knn(encode):
        with autocast():
            features = [embed(encode, split, args, device) for split in (train, val)]
        return knn_accuracy(*features)  # in float32: rounded cosines tie

    monitored, baseline = val and args.eval_freq, ""
    if monitored and args.global_crops_size <= 64:  # raw pixels of larger images fill the memory
        pixels, untrained = knn(partial(torch.flatten, start_dim=1)), knn(teacher.backbone)
        baseline = f"raw pixels {pixels:.1f} %, random weights {untrained:.1f} %, "
        say(f"k-NN accuracy: {baseline}chance {100 / (max(train[1]) + 1):.1f} %")

    # Resume
    path, log = output / "checkpoint.pth", output / "log.txt"
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    found = [path.exists()]
    if WORLD > 1:
        dist.broadcast_object_list(found)  # on several machines: all resume, or none
    start = restore(path, args, parts) if found[0] else 0
    if found[0]:
        say(f"resumed {path} at step {start}")
    if RANK == 0 and log.exists() and start < end:  # drop the lines of epochs that run again
        kept = log.read_text().splitlines(keepends=True)[: start // per_epoch]
        log.with_suffix(".partial").write_text("".join(kept))
        log.with_suffix(".partial").replace(log)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # block by block: there is nothing to split
        for block in (*backbone.blocks, *teacher.backbone.blocks):
            block.compile(dynamic=False)
    model = student
    if WORLD > 1:
        ids = [device.index] if cuda else None
        model = nn.parallel.DistributedDataParallel(student, ids, gradient_as_bucket_view=True)

    # Schedules, one value a step
    peak_lr = args.lr * args.global_batch / 256
    warmup = int(args.warmup_epochs * per_epoch)
    lr = cosine_schedule(peak_lr, args.min_lr, total, warmup)
    wd = cosine_schedule(args.weight_decay, args.weight_decay_end, total)
    momentum = cosine_schedule(args.momentum_teacher, 1.0, total)

    keys = batches(n, args, start, end)
    loader = DataLoader(images, batch_sampler=keys, num_workers=args.num_workers, pin_memory=cuda)
    clear = "\r\033[K" if sys.stdout.isatty() else ""  # rewrites the line
    record, first = torch.zeros(per_epoch, 5, device=device), start % per_epoch
    idle = torch.cuda.Event() if cuda else None
    named, data, waited, clock = set(), iter(loader), 0.0, time.perf_counter()

    for step in range(start, end):
        epoch, i = divmod(step, per_epoch)
        epoch_ends = i + 1 == per_epoch or step + 1 == end
        sync = epoch_ends or (i + 1) % 10 == 0  # only these steps wait for the device

        asked = time.perf_counter()
        views, _, replaced = next(data)
        if not cuda or idle.query():  # the device, too, had nothing to do
            waited += time.perf_counter() - asked
        for j in set(replaced.tolist()) - {-1} - named:
            print(f"{clear}unreadable, another takes its place: {train[0][j]}")
            named.add(j)

        torch.manual_seed(seed_from(args.seed, step, RANK))  # of augmentation and stochastic depth
        views = augment([view.to(device, non_blocking=True) for view in views])
        with autocast():
            with torch.no_grad():
                z_t = teacher(views[:2]).unflatten(0, (2, -1))  # (2, B, d)
            z_s = model(views).unflatten(0, (len(views), -1))  # (V, B, d)
        loss, stats = loss_fn(z_s, z_t, with_rank=sync)

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.clip_grad:  # each tensor by itself, as DINO does
            grads = [p.grad for p in params]
            norms = torch.stack(torch._foreach_norm(grads))
            torch._foreach_mul_(grads, (args.clip_grad / (norms + 1e-6)).clamp(max=1).unbind())
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(wd[step])
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():  # the teacher: exponential moving average of the student
            torch._foreach_lerp_(teacher_params, params, 1 - momentum[step])

        distance = (z_s.detach()[:2] - z_t).norm(dim=-1).mean()
        bad = (replaced >= 0).sum().to(device, non_blocking=True)
        record[i] = torch.stack([loss.detach(), stats["comp"], stats["expa"], distance, bad])
        if cuda:
            idle.record()
        if not sync:
            continue

        # Every 10 steps: read the figures of this epoch's steps so far
        figures = record[first : i + 1] / WORLD
        if WORLD > 1:
            dist.all_reduce(figures)
        figures = figures.cpu().double().numpy()
        finite = np.isfinite(figures).all(1)
        if not finite.all():
            broken = step + 2 - len(finite) + finite.argmin()
            stop(f"the loss is not finite at step {broken}: try a lower --lr or --amp off")
        steps, seconds = len(figures), time.perf_counter() - clock
        speed, eta = steps * args.global_batch / seconds, (end - step - 1) * seconds / steps
        loss, comp, expa, *_ = figures[-1]
        rank = stats["rank"].item()
        line = f"epoch {epoch + 1}/{args.epochs} step {step + 1}/{total} loss {loss:.3f} "
        line += f"comp {comp:.3f} expa {expa:.3f} rank {rank:.1f} {speed:.0f} img/s "
        line += f"ETA {timedelta(seconds=int(eta))}"
        if clear:
            say(clear + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        if not epoch_ends:
            continue

        # Every epoch: check, evaluate, log, save
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        if not all(x.isfinite().all() for x in params + teacher_params + tensors):
            stop(f"weights not finite after step {step + 1}: try a lower --lr or --amp off")
        used = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(0).ru_maxrss
        accuracy = None
        if monitored and ((epoch + 1) % args.eval_freq == 0 or step + 1 == end):
            accuracy = knn(teacher.backbone)
            line += f" k-NN {accuracy:.1f} %"
        means, done = figures.mean(0), slice(step + 1 - steps, step + 1)
        entry = {
            "epoch": epoch,
            "train_loss": means[0],
            "train_comp_loss": means[1],
            "train_expa_loss": means[2],
            "train_lr": lr[done].mean(),
            "train_wd": wd[done].mean(),
            "rank": rank,
            "dist": means[3],
            "knn": accuracy,
            "img_s": speed,
            "data_wait": waited / seconds,
            "mfu": ideal and ideal * speed / WORLD,
            "mem_gb": used / 2**30,
            "bad_images": round(means[4] * WORLD * steps),
        }
        if RANK == 0:
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "epoch": (step + 1) // per_epoch, "args": vars(args)}
            if args.saveckp_freq and epoch % args.saveckp_freq == 0:
                save(output / f"checkpoint{epoch:04}.pth", state)
            save(path, state)
        say(clear + line)
        if rank < 2 and epoch > 0:
            say("warning: collapse. Try a smaller --eps_sq, a larger --gamma or a larger batch")
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # the peak of training, not of k-NN
        first, waited, clock = 0, 0.0, time.perf_counter()

    if monitored:
        accuracy = knn(teacher.backbone) if start >= end else accuracy
        say(f"k-NN accuracy: {baseline}trained teacher {accuracy:.1f} %")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
