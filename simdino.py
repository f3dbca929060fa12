# SPDX-License-Identifier: MIT
"""SimDINO: self-supervised learning by DINO's self-distillation, kept from collapse by one explicit term.

    loss = 1/2 |z_s - z_t|^2 - gamma R_eps(Z),     R_eps(Z) = 1/2 logdet(I + d / (n eps^2) Z'Z)

"Simplifying DINO via Coding Rate Regularization", Wu et al., ICML 2025, arXiv 2502.10385.
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

# ----------------------------------------------------------------------------------------- the loss


def coding_rate(z, eps_sq):
    """Coding rate R = 1/2 logdet(I + d / (n eps^2) Z'Z) of n unit rows, in nats: paper, eq. (8).

    z: (..., n, d); eps_sq: squared quantisation error, > 0. Returns (...). Large when the rows
    spread over many directions, near its minimum when they are all alike.
    """
    n, d = z.shape[-2:]
    gram = z @ z.mT if n < d else z.mT @ z  # ZZ' and Z'Z share their non-zero spectrum
    eye = torch.eye(gram.shape[-1], dtype=z.dtype, device=z.device)
    factor, _ = torch.linalg.cholesky_ex(eye + d / (n * eps_sq) * gram)  # _ex: no wait for the GPU
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class SimDINOLoss(torch.nn.Module):
    """-coeff * comp - gamma * R: what pulls views together and what keeps images apart.

    comp is the mean cosine over all (teacher global view, student view) pairs but the same-view
    ones (1/2 |z_s - z_t|^2 = 1 - cosine), R the mean coding rate of the global views' features.

    eps_sq: eps^2 of the coding rate. group_size: rows whose rate is taken together, cut in rank
    order from the global batch; None: the whole batch. gamma: weight of R; None: the official
    (d + n) / (d n), n rows in the global batch. expa_type: R of the student's features (0), or of
    (student + teacher) / 2 (1).
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
        """student (V, B, d), its two global views first; teacher (2, B, d); unit rows.

        Returns the loss and detached scalars: comp, expa = gamma R, and, with_rank, the effective
        rank of the global batch, exp(entropy of the spectrum): 1 when all rows are alike.
        """
        with torch.autocast(student.device.type, enabled=False):  # a log-determinant needs float32
            dtype = torch.promote_types(student.dtype, torch.float32)
            student, teacher = student.to(dtype), teacher.detach().to(dtype)
            views, batch, d = student.shape

            s, t = (x / x.norm(dim=-1, keepdim=True) for x in (student, teacher))
            pairs = (t.sum(0) * s.sum(0)).sum() - (t * s[:2]).sum()  # all, less the same-view ones
            comp = pairs / (batch * (2 * views - 2))

            z = student[:2] if self.expa_type == 0 else (student[:2] + teacher) / 2
            z = self.gather(z)  # (2, n, d)
            n = z.shape[1]
            group = min(self.group_size or n, n)
            if n % group:
                raise ValueError(f"group_size {group} does not divide the global batch of {n}")
            gamma = (d + n) / (d * n) if self.gamma is None else self.gamma
            expa = gamma * coding_rate(z.view(2, n // group, group, d), self.eps_sq).mean()

            stats = {"comp": comp.detach(), "expa": expa.detach()}
            if with_rank:
                rows = z.detach().flatten(0, 1)
                p = torch.linalg.eigvalsh((rows.mT @ rows).nan_to_num()).clamp(min=1e-12)
                p = p / p.sum()
                stats["rank"] = (-(p * p.log()).sum()).exp()
        return -self.coeff * comp - expa, stats

    @staticmethod
    def gather(z):
        """All ranks' rows (..., B, d) -> (..., n, d), in rank order; this rank's carry gradient."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return z
        world, own = dist.get_world_size(), z.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own)
        # The value of z with world times its gradient: DDP averages what R needs summed.
        parts[dist.get_rank()] = own + world * (z - own)
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
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x, keep=None):
        """keep: (2, B, 1, 1) weight of each residual branch for each sample, None for 1."""
        for i, branch in enumerate((self.attn, self.mlp)):
            y = branch((self.norm1, self.norm2)[i](x))
            x = x + y if keep is None else torch.addcmul(x, keep[i], y)
        return x


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
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # Stochastic depth: deeper branches are dropped more often.
        self.drop_path = torch.linspace(0, drop_path_rate, depth).view(-1, 1, 1, 1, 1)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def position_embedding(self, h, w):
        """(1, 1 + h w, D) for a grid of h x w patches, bicubic from the grid trained on."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        # DINO's 0.1 moves the samples a little; official weights were trained with it.
        factor = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x):
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
        keep = [None] * len(self.blocks)
        if self.training and self.drop_path.any():
            p = 1 - self.drop_path.expand(-1, 2, len(x), 1, 1)
            keep = (torch.bernoulli(p) / p).to(x, non_blocking=True)
        for block, weights in zip(self.blocks, keep):
            x = block(x, weights)
        return self.norm(x)[:, 0]

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
    """Features (..., in_dim) -> unit rows (..., out_dim), in float32: three layers, no prototypes."""

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
        try:  # several times faster than Pillow
            data, rgb = torchvision.io.read_file(str(path)), torchvision.io.ImageReadMode.RGB
            return torchvision.io.decode_jpeg(data, rgb, apply_exif_orientation=True)
        except (RuntimeError, AttributeError):  # no JPEG inside, or a torchvision without decoders
            pass
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resize(image, h, w):  # antialiased bicubic, uint8 in and out
    return F.interpolate(image[None], (h, w), mode="bicubic", antialias=True)[0]


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
        self.sizes = [global_size] * 2 + [local_size] * local_crops
        self.scales = np.array([global_scale] * 2 + [local_scale] * local_crops)

    def __call__(self, image):
        height, width = image.shape[1:]
        draws = torch.rand(4, len(self.sizes), 10, dtype=torch.float64)  # 10 tries a view
        share, aspect, top, left = draws.numpy()
        low, high = self.scales.T[..., None]
        area = height * width * (low + (high - low) * share)
        ratio = (4 / 3) ** (2 * aspect - 1)  # uniform in its logarithm
        h, w = np.sqrt(area / ratio).round(), np.sqrt(area * ratio).round()
        tries = np.arange(len(h)), ((h <= height) & (w <= width)).argmax(1)  # the first that fits
        h = h[tries].clip(1, height).astype(int)
        w = w[tries].clip(1, width).astype(int)
        y = (top[tries] * (height - h + 1)).astype(int)
        x = (left[tries] * (width - w + 1)).astype(int)
        crops = zip(self.sizes, y, x, y + h, x + w)
        return [resize(image[:, a:c, b:d], size, size) for size, a, b, c, d in crops]


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size) for evaluation: Resize(256), CenterCrop(224) at size 224."""
    height, width = image.shape[1:]
    short = min(height, width)
    scale = max(size, min(short, size * 8 // 7)) / short
    image = resize(image, round(height * scale), round(width * scale))
    y, x = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, y : y + size, x : x + size]


def normalize(x):
    """uint8 (B, 3, H, W), or float in [0, 1] -> zero mean and unit variance over ImageNet."""
    x = x / 255 if x.dtype == torch.uint8 else x
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(x.device, non_blocking=True)
    return (x - mean) / std


def to_gray(x):
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b  # (B, 1, H, W)


def blend(x, other, factor):
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_hue(x, shift):
    """Rotate the hue of x, (B, 3, H, W) in [0, 1], by shift (B, 1, 1, 1) turns, through HSV."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = (x / chroma.clamp(min=1e-8)).split(1, dim=1)
    v = value / chroma.clamp(min=1e-8)
    hue = torch.where(v == r, g - b, torch.where(v == g, 2 + b - r, 4 + r - g)) + 6 * shift
    sector = (hue + 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) % 6
    return value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)


def gaussian_blur(x, sigma, radius=6):
    """Blur each image of x (B, 3, H, W) by its own sigma (B,), as two products with band matrices."""

    def band(size):  # (B, size, size), rows sum to 1, borders reflected
        offset = torch.arange(-min(radius, size - 1), min(radius, size - 1) + 1, device=x.device)
        weight = (-((offset / sigma[:, None]) ** 2) / 2).softmax(-1)  # (B, taps)
        at = (torch.arange(size, device=x.device) + offset[:, None]).abs()
        at = (size - 1) - ((size - 1) - at).abs()
        taps = (at[..., None] == torch.arange(size, device=x.device)).to(x.dtype)
        return torch.einsum("bk,kij->bij", weight, taps)[:, None]

    return band(x.shape[2]) @ x @ band(x.shape[3]).mT


def jitter(x, order, brightness, contrast, saturation, hue):
    """Colour jitter of x, (B, 3, H, W) in [0, 1]: factors and hue shift (B, 1, 1, 1), in order."""
    for i in order:
        if i == 0:
            x = blend(x, 0, brightness)
        elif i == 1:
            x = blend(x, to_gray(x).mean((1, 2, 3), keepdim=True), contrast)
        elif i == 2:
            x = blend(x, to_gray(x), saturation)
        else:
            x = adjust_hue(x, hue)
    return x


def augment(views, generator=None):
    """On the device: uint8 batches (B, 3, h, w), two global views first -> normalised float32.

    DINO's photometric augmentation, one set of random parameters an image: flip, colour jitter in
    an order drawn once a batch, grayscale, blur, solarise. Each operation equals torchvision's.
    """
    source = "cpu" if generator is None else generator.device  # draw there, send in one copy
    batch, first, out = len(views[0]), 0, []
    for _, run in groupby(views, key=lambda view: view.shape[-2:]):  # one pass a resolution
        x = torch.cat(list(run)) / 255
        view = (first + torch.arange(len(x)) // batch).clamp(max=2)  # 2: any local view
        first += len(x) // batch
        p_blur, p_solarize = torch.tensor([[1.0, 0.1, 0.5], [0.0, 0.2, 0.0]])[:, view].to(source)
        u = torch.rand(10, len(x), device=source, generator=generator)
        order = torch.randperm(4, device=source, generator=generator).tolist()
        shift = torch.where(u[0] < 0.8, 2 * u[1:5] - 1, 0)  # 0: no jitter
        sigma = torch.where(u[5] < p_blur, 0.1 + 1.9 * u[6], 1e-3)  # 1e-3: no blur
        drawn = torch.stack([*shift, u[7] < 0.5, u[8] < 0.2, u[9] < p_solarize, sigma])
        *shift, flip, gray, solarize, sigma = drawn[..., None, None, None].to(
            x.device, non_blocking=True
        )
        x = torch.where(flip > 0, x.flip(-1), x)
        factors = (1 + a * b for a, b in zip((0.4, 0.4, 0.2), shift))
        x = jitter(x, order, *factors, 0.1 * shift[3])
        x = gaussian_blur(torch.where(gray > 0, to_gray(x), x), sigma.flatten())
        x = torch.where((solarize > 0) & (x >= 128 / 255), 1 - x, x)
        out += normalize(x).split(batch)
    return out


class Images(torch.utils.data.Dataset):
    """images[epoch * len + i] -> transform(image i), its label, i, unreadable files passed over.

    What transform draws at random depends on (seed, epoch, i) alone, not on the worker.
    """

    def __init__(self, paths, labels, transform, seed=0):
        self.paths, self.labels = np.array(paths), np.array(labels)  # arrays: workers share them
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = divmod(key, len(self))
        torch.manual_seed(fold(self.seed, epoch, index))
        for skipped in range(len(self)):
            used = (index + skipped) % len(self)
            with suppress(Exception):  # there is no end to what a decoder may raise
                image = load_image(self.paths[used])
                break
        else:
            raise RuntimeError(f"none of {len(self)} images can be read: {self.paths[index]}, ...")
        return self.transform(image), self.labels[used], index, skipped


def fold(*key):
    """One 32-bit seed of several numbers, none below 0."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def find_images(root):
    """Paths of the images below root, sorted, and of each the name of its folder in root or ""."""
    Image.init()
    paths = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if Image.EXTENSION.get(os.path.splitext(name)[1].lower()) in Image.OPEN
    )
    parts = [os.path.relpath(path, root).split(os.sep) for path in paths]
    return paths, [part[0] if len(part) > 1 else "" for part in parts]


def draw_pattern(kind, rng, size=32, oversample=2):
    """One of ten patterns at random angle, scale, phase, polarity, contrast: a grayscale image.

    Half of its pixels are light and half dark, so that brightness tells nothing of the kind.
    """
    n = size * oversample
    angle, cells = rng.uniform(0, 2 * np.pi), rng.uniform(2.2, 4.2)
    y, x = (np.mgrid[:n, :n] / n - 0.5) * cells
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
    light = light.reshape(size, oversample, size, oversample).mean((1, 3))
    noise = rng.normal(0, rng.uniform(3, 15), (size, size))
    light = 128 + rng.uniform(-15, 15) + rng.uniform(50, 110) * light + noise
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def render_patterns(root):
    """The built-in data: PNG files root/{train,val}/<kind>/<number>.png, always the same ones."""
    partial_root = Path(f"{root}.partial")
    for split, count in ("train", 320), ("val", 80):
        for kind in range(10):
            folder = partial_root / split / str(kind)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng((split == "val", kind, number))
                draw_pattern(kind, rng).save(folder / f"{number:03}.png")
    partial_root.rename(root)


# ------------------------------------------------------------------------------------ the evaluation


@torch.no_grad()
def embed(encode, images, args, device):
    """Unit features (n, D) and labels (n,) of all images on every rank, the ranks sharing the work."""
    n = len(images)
    share = [i % n for i in range(RANK, math.ceil(n / WORLD) * WORLD, WORLD)]  # equally long
    loader = torch.utils.data.DataLoader(images, 256, sampler=share, num_workers=args.num_workers)
    rows = []
    for x, label, *_ in loader:
        z = encode(normalize(x.to(device)))
        rows.append((F.normalize(z.float(), dim=-1), label.to(device)))
    columns = [torch.cat(column) for column in zip(*rows)]
    if WORLD > 1:
        for i, own in enumerate(columns):
            parts = [torch.empty_like(own) for _ in range(WORLD)]
            dist.all_gather(parts, own)
            columns[i] = torch.stack(parts, dim=1).flatten(0, 1)[:n]
    return columns


def knn_accuracy(train, val, k=20, temperature=0.07):
    """Per cent of val that a weighted vote of train gets right; each (unit features, labels)."""
    (bank, labels), hits = train, 0
    for z, y in zip(*(column.split(1024) for column in val)):
        cosine, nearest = (z @ bank.mT).topk(min(k, len(bank)))
        votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == y).sum().item()
    return 100 * hits / len(val[1])


# -------------------------------------------------------------------------------------- the training

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's

OPTIONS = {  # name: (default on the built-in data, the paper's on ImageNet, help)
    "arch": ("vit_nano", "vit_base", "backbone, one of " + ", ".join(ARCHS)),
    "patch_size": (8, 16, "side of a patch, pixels"),
    "hidden_dim": (512, 2048, "width of the projection head"),
    "drop_path_rate": (0.0, 0.1, "stochastic depth of the student, rate at the last block"),
    "global_crops_size": (32, 224, "side of the 2 global views, pixels"),
    "local_crops_size": (16, 96, "side of the local views, pixels"),
    "global_crops_scale": ((0.4, 1.0), (0.4, 1.0), "share of the image's area in a global view"),
    "local_crops_scale": ((0.15, 0.4), (0.05, 0.4), "share of the image's area in a local view"),
    "local_crops_number": (6, 10, "local views of an image"),
    "coeff": (1.0, 1.0, "weight of comp, the mean cosine"),
    "eps_sq": (0.4, 0.4, "eps^2 of the coding rate R"),
    "group_size": (64, 64, "rows whose R is taken together; 0: the global batch"),
    "eps": (None, None, "the official flag: eps^2 = EPS * global batch / group size"),
    "gamma": (None, None, "weight of R; by default (d + n) / (d n), n = global batch"),
    "expa_type": (1, 1, "R of the student's features (0) or of (student + teacher) / 2 (1)"),
    "epochs": (7, 100, "passes over the data"),
    "batch_size_per_gpu": (64, 64, "images a step in each process"),
    "lr": (0.005, 0.0005, "peak learning rate for a global batch of 256, scaled in proportion"),
    "min_lr": (1e-6, 1e-6, "learning rate at the end"),
    "warmup_epochs": (1.0, 10.0, "epochs over which the learning rate rises from 0"),
    "weight_decay": (0.04, 0.04, "weight decay at the start"),
    "weight_decay_end": (0.04, 0.4, "weight decay at the end"),
    "clip_grad": (3.0, 3.0, "largest gradient norm of each parameter tensor; 0: any"),
    "momentum_teacher": (0.8, 0.996, "momentum of the EMA teacher at the start; 1 at the end"),
    "amp": (
        "auto",
        "auto",
        "bf16, fp16, off; auto: bf16 on GPUs that have it or fp16, off on CPUs",
    ),
    "num_workers": (1, 10, "data loading processes of each training process"),
    "saveckp_freq": (0, 10, "keep a copy of the checkpoint every so many epochs; 0: never"),
    "eval_freq": (4, 10, "k-NN accuracy every so many epochs, if there are labels; 0: never"),
    "max_steps": (0, 0, "stop after so many steps of the schedule set by --epochs; 0: do not"),
    "seed": (0, 0, "of weights, order, views, augmentation, stochastic depth"),
}


def stop(message):
    """To be raised: the end of the run with one line on the terminal and status 1."""
    return SystemExit(f"simdino.py: {message}" if RANK == 0 else 1)


def parse_args(argv=None):
    def error(message):
        raise stop(message)

    parser = argparse.ArgumentParser(description="SimDINO. Defaults: [built-in data | --data_path]")
    parser.error = error  # one line, no usage
    parser.add_argument("--data_path", help="train/ and val/, class folders, or a folder of images")
    parser.add_argument("--output_dir", default="output_simdino", help="of checkpoint.pth, log.txt")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    choices = {"arch": ARCHS, "amp": ("auto", "bf16", "fp16", "off"), "expa_type": (0, 1)}
    for name, (built_in, imagenet, text) in OPTIONS.items():
        many = 2 if isinstance(built_in, tuple) else None
        kind = float if many or built_in is None else type(built_in)
        text += f" [{built_in} | {imagenet}]"
        parser.add_argument(
            f"--{name}", type=kind, nargs=many, choices=choices.get(name), help=text
        )
    args = parser.parse_args(argv)
    for name, (built_in, imagenet, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, imagenet if args.data_path else built_in)

    args.global_batch = args.batch_size_per_gpu * WORLD
    group = min(args.group_size or args.global_batch, args.global_batch)
    if args.eps is not None:
        args.eps_sq = args.eps * args.global_batch / group
    positive = (
        "patch_size hidden_dim global_crops_size local_crops_size eps_sq epochs lr global_batch"
    )
    for name, value in vars(args).items():
        least = 1e-12 if name in positive.split() else 0
        if isinstance(value, (int, float)) and not value >= least:
            raise stop(f"--{name} {value} is too small")
        if name.endswith("crops_size") and value % args.patch_size:
            raise stop(f"--{name} {value} is not a multiple of --patch_size {args.patch_size}")
        if name.endswith("crops_scale") and not 0 < value[0] <= value[1] <= 1:
            raise stop(f"--{name} takes two numbers, 0 < LOW <= HIGH <= 1")
    if args.warmup_epochs >= args.epochs:
        raise stop(f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    if args.global_batch % group:
        raise stop(f"--group_size {group} does not divide the global batch of {args.global_batch}")
    return args


def find_data(root, batch):
    """-> (train, val), each (paths, labels); val is None without labelled images to judge by."""
    if not root.is_dir():
        raise stop(f"{root} is not a folder: --data_path needs one of images")
    folder = root / "train" if (root / "train").is_dir() else root
    paths, names = find_images(folder)
    if len(paths) < batch:
        raise stop(f"{folder} has {len(paths)} images, fewer than one batch of {batch}")
    kinds = sorted(set(names))
    train = paths, [kinds.index(name) for name in names]
    for judge in (root / "val", root / "test"):
        paths, names = find_images(judge) if folder != root else ([], [])
        if len(kinds) > 1 and paths and set(names) <= set(kinds):
            return train, (paths, [kinds.index(name) for name in names])
    return train, None


def cosine_schedule(base, final, total_steps, warmup_steps=0):
    """(total_steps,) values: linear from 0 to base over the warm-up, then a half cosine to final."""
    progress = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * progress)) / 2
    return np.concatenate([np.linspace(0, base, warmup_steps), cosine])


def batches(n, args, start, end, rank=RANK):
    """For each step, the keys of this rank's block of the global batch: the same for any world."""
    for step in range(start, end):
        epoch, i = divmod(step, n // args.global_batch)
        if i == 0 or step == start:
            order = epoch * n + np.random.default_rng((args.seed, epoch)).permutation(n)
        first = i * args.global_batch + rank * args.batch_size_per_gpu
        yield order[first : first + args.batch_size_per_gpu].tolist()


def step_flops(args):
    """Operations of the backbones for one image in a step; a backward pass is two forward ones."""

    def forward(size):
        width, depth = ARCHS[args.arch]["embed_dim"], ARCHS[args.arch]["depth"]
        tokens = (size // args.patch_size) ** 2 + 1
        blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
        return blocks + 6 * tokens * args.patch_size**2 * width

    local_views = 3 * args.local_crops_number * forward(args.local_crops_size)
    return local_views + (3 + 1) * 2 * forward(args.global_crops_size)  # student and teacher


def matmul_rate(device, dtype, n=8192, repeats=20):
    """Operations a second of n x n matrix products, measured: what the MFU is a share of."""
    x = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(2):  # once to warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            x @ x
        torch.cuda.synchronize()
    return repeats * 2 * n**3 / (time.perf_counter() - start)


def save(path, state):
    """Write a checkpoint so that path holds a whole one at every instant."""
    partial_path = path.with_suffix(".partial")
    with open(partial_path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)


def restore(path, args, parts):
    """Load parts (student, teacher, optimizer, scaler) from path; returns the steps they have done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("arch", "patch_size", "global_crops_size", "global_batch"):
            if state["args"][name] != getattr(args, name):
                raise ValueError(f"its {name} is {state['args'][name]}, not {getattr(args, name)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]
    except Exception as error:  # truncated, of something else, or with code inside
        reason = " ".join(str(error).split())[:120]
        message = f"cannot resume {path} ({reason}): move it away, or choose another --output_dir"
        raise stop(message) from error


def main():
    args = parse_args()
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    say = print if RANK == 0 else lambda *_, **__: None
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # The data
    root = Path(args.data_path or output / "patterns")
    if not args.data_path and RANK == 0 and not root.exists():
        render_patterns(root)
    if WORLD > 1:
        dist.barrier()
    train, val = find_data(root, args.global_batch)
    n, per_epoch = len(train[0]), len(train[0]) // args.global_batch
    total = args.epochs * per_epoch
    end = min(total, args.max_steps or total)
    say(
        f"{n} images to train on, {len(val[0]) if val else 0} to judge by; {total} steps on {device}"
    )
    sizes, scales = (
        (args.global_crops_size, args.local_crops_size),
        (args.global_crops_scale, args.local_crops_scale),
    )
    images = Images(*train, MultiCrop(*sizes, *scales, args.local_crops_number), args.seed)
    try:
        images[0]
    except RuntimeError as error:  # no image can be read
        raise stop(error)

    # Student and teacher
    torch.manual_seed(fold(args.seed))
    shape = {"img_size": args.global_crops_size, "patch_size": args.patch_size, **ARCHS[args.arch]}
    backbone = VisionTransformer(**shape, drop_path_rate=args.drop_path_rate)
    head = ProjectionHead(backbone.norm.weight.numel(), args.hidden_dim)
    student = nn.Sequential(OrderedDict(backbone=backbone, head=head)).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    weights, teacher_weights = list(student.parameters()), list(teacher.parameters())
    loss_fn = SimDINOLoss(args.eps_sq, args.group_size, args.coeff, args.gamma, args.expa_type)
    groups = [  # no weight decay on biases and norms
        {"params": [p for p in weights if p.ndim > 1]},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = partial(torch.autocast, device.type, dtype, enabled=args.amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # How good the features are: before training, where pixels are few enough to compare with
    def knn(encode):
        crop = partial(center_crop, size=args.global_crops_size)
        with autocast():
            return knn_accuracy(
                *(embed(encode, Images(*s, crop), args, device) for s in (train, val))
            )

    judged, baseline = val and args.eval_freq, ""
    if judged and args.global_crops_size <= 64:
        pixels, untrained = knn(partial(torch.flatten, start_dim=1)), knn(teacher.backbone)
        baseline = f"raw pixels {pixels:.1f} %, random weights {untrained:.1f} %, "
        say(f"k-NN accuracy: {baseline}chance {100 / (max(train[1]) + 1):.1f} %")

    # Resume
    start, path, log = 0, output / "checkpoint.pth", output / "log.txt"
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    if path.exists():
        start = restore(path, args, parts)
        say(f"resumed {path} at step {start}")
    if RANK == 0 and log.exists():  # keep the lines of the epochs that are not run again
        log.write_text("".join(log.read_text().splitlines(True)[: start // per_epoch]))
    for block in [*backbone.blocks, *teacher.backbone.blocks] if args.compile else []:
        block.compile()
    model = student
    if WORLD > 1:
        ids = [device.index] if cuda else None
        model = nn.parallel.DistributedDataParallel(student, ids, gradient_as_bucket_view=True)

    # Schedules, one value a step
    peak_lr, warmup = args.lr * args.global_batch / 256, int(args.warmup_epochs * per_epoch)
    lr = cosine_schedule(peak_lr, args.min_lr, total, warmup)
    wd = cosine_schedule(args.weight_decay, args.weight_decay_end, total)
    momentum = cosine_schedule(args.momentum_teacher, 1.0, total)

    loader = torch.utils.data.DataLoader(
        images,
        batch_sampler=batches(n, args, start, end),
        num_workers=args.num_workers,
        pin_memory=cuda,
    )
    peak = matmul_rate(device, dtype) if cuda else None
    bad, recent, rows, accuracy = set(), [], [], None
    data, waited, clock = iter(loader), 0.0, time.perf_counter()

    for step in range(start, end):
        epoch, i = divmod(step, per_epoch)
        epoch_ends = i + 1 == per_epoch or step + 1 == end
        look = epoch_ends or (i + 1) % 10 == 0  # only these steps wait for the device

        waited -= time.perf_counter()
        views, _, index, skipped = next(data)
        waited += time.perf_counter()
        unread = {(a + k) % n for a, b in zip(index.tolist(), skipped.tolist()) for k in range(b)}
        for j in unread - bad:
            print(f"\nunreadable, another takes its place: {train[0][j]}")
        bad |= unread

        torch.manual_seed(fold(args.seed, step, RANK))  # of augmentation and stochastic depth
        views = augment([view.to(device, non_blocking=True) for view in views])
        with autocast():
            z_t = teacher(views[:2]).unflatten(0, (2, -1))  # (2, B, d)
            z_s = model(views).unflatten(0, (len(views), -1))  # (V, B, d)
        loss, stats = loss_fn(z_s, z_t, with_rank=look)

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.clip_grad:  # each tensor by itself, as DINO does
            grads = [p.grad for p in weights]
            norms = torch.stack(torch._foreach_norm(grads))
            torch._foreach_mul_(grads, (args.clip_grad / (norms + 1e-6)).clamp(max=1).unbind())
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(wd[step])
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(teacher_weights, weights, 1 - momentum[step])  # the EMA

        distance = (z_s.detach()[:2] - z_t).norm(dim=-1).mean()
        recent.append(torch.stack([loss.detach(), stats["comp"], stats["expa"], distance]))
        if not look:
            continue
        recent = torch.stack(recent)  # (steps since the last look, 4)
        if WORLD > 1:
            dist.all_reduce(recent)
        rows += (recent / WORLD).tolist()
        recent, rank = [], stats["rank"].item()
        for k, row in enumerate(rows, step + 1 - len(rows)):
            if not all(map(math.isfinite, row)):
                raise stop(
                    f"the loss is {row[0]} at step {k}; try a lower --lr or --amp off (the last "
                    "checkpoint stays)"
                )
        seconds = time.perf_counter() - clock
        speed, eta = len(rows) * args.global_batch / seconds, (end - step - 1) * seconds / len(rows)
        line = f"epoch {epoch + 1}/{args.epochs} step {step + 1}/{total} loss {rows[-1][0]:.3f} "
        line += f"comp {rows[-1][1]:.3f} expa {rows[-1][2]:.3f} rank {rank:.1f} {speed:.0f} img/s "
        line += f"ETA {eta // 3600:.0f}:{eta // 60 % 60:02.0f}:{eta % 60:02.0f}"
        if sys.stdout.isatty():
            say(f"\r\033[K{line}", end="", flush=True)
        if not epoch_ends:
            continue

        tensors = [x for state in optimizer.state.values() for x in state.values()]
        if not all(x.isfinite().all() for x in weights + teacher_weights + tensors):
            raise stop(
                f"weights are not finite after step {step}; try a lower --lr or --amp off (the last "
                "checkpoint stays)"
            )
        if judged and ((epoch + 1) % args.eval_freq == 0 or step + 1 == end):
            accuracy = knn(teacher.backbone)
            line += f" k-NN {accuracy:.1f} %"
        loss_mean, comp, expa, distance = np.mean(rows, axis=0).tolist()
        steps = slice(step + 1 - len(rows), step + 1)
        used = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(0).ru_maxrss
        entry = {
            "epoch": epoch,
            "train_loss": loss_mean,
            "train_comp_loss": comp,
            "train_expa_loss": expa,
            "train_lr": lr[steps].mean(),
            "train_wd": wd[steps].mean(),
            "rank": rank,
            "dist": distance,
            "knn": accuracy,
            "img_s": speed,
            "data_wait": waited / seconds,
            "mfu": peak and speed / WORLD * step_flops(args) / peak,
            "mem_gb": used / 2**30,
            "bad_images": len(bad),
        }
        if RANK == 0:
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "epoch": (step + 1) // per_epoch, "args": vars(args)}
            save(path, state)
            if args.saveckp_freq and epoch % args.saveckp_freq == 0:
                shutil.copyfile(path, output / f"checkpoint{epoch:04}.pth")
        say(f"\r\033[K{line}" if sys.stdout.isatty() else line)
        if rank < 2 and step >= warmup:
            say(
                f"warning: effective rank {rank:.2f} (1 is collapse): try a smaller --eps_sq, a "
                "larger --gamma or batch"
            )
        rows, accuracy, waited, clock = [], None, 0.0, time.perf_counter()

    if judged:
        say(f"k-NN accuracy: {baseline}trained teacher {knn(teacher.backbone):.1f} %")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
