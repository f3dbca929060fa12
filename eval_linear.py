# SPDX-License-Identifier: MIT
"""What the features of a vision transformer are worth: k-NN, linear probes, features, pictures.

    torchrun --nproc_per_node=8 eval_linear.py --weights FILE --data_path /imagenet
    torchrun --nproc_per_node=8 eval_linear.py --weights FILE --data_path /imagenet --cached
    python eval_linear.py --weights FILE --data_path CIFAR --resize_size 32 --crop_size 32
    python eval_linear.py --weights FILE --data_path SCENES --segment        # patches
    python eval_linear.py --weights FILE --data_path PHOTOS --embed OUT.npz  # features
    python eval_linear.py --weights FILE --pictures OUT.png PHOTO...
    python eval_linear.py --weights FILE --export OUT.pth                    # for timm

FILE: weights of simdino.py, simdinov2.py, the official SimDINO(v2), DINO(v2) or timm: plain ViTs,
whose shape is read off them, but for the number of heads. The first command computes DINO's
weighted k-NN, then trains 52 linear classifiers together (DINOv2's: 4 kinds of features x 13
learning rates) for DINO's 100 epochs on random crops. The best one is chosen on images held out of
train/; only this one is tried on val/. --cached trains them on the features of one central crop an
image: one pass of the backbone instead of 101.

k-NN and probes are written to results-ID.json, and the chosen classifier to classifier-ID.pth.
Section 1 is what is computed: features, k-NN, probe, segmentation. Section 2 is the program: the
options, and what each of the commands does. Section 3 holds the helpers that both use.
k-NN and probe: "Emerging Properties", Caron et al., arXiv 2104.14294; the grid of classifiers:
"DINOv2", Oquab et al., arXiv 2304.07193.
"""

import argparse
import atexit
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms, utils
from torchvision.transforms import functional as TF

# torchrun sets these: the number of processes, this process's number, that of its GPU
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
PROCESS = int(os.environ.get("RANK") or 0) % WORLD  # RANK may be left over from another run
GPU = int(os.environ.get("LOCAL_RANK") or 0)
BICUBIC = transforms.InterpolationMode.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

# ============================================================================== 1. What is computed

# ---------------------------------------------------------------------------------------- the model


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
    """x times scale, times a learned factor for each channel. Small factors start a deep ViT close
    to the identity."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x, scale=1.0):
        return x * (scale * self.gamma).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, num_heads, layerscale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, 1.0) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(  # the names are timm's
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )
        self.ls2 = LayerScale(dim, 1.0) if layerscale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The ViT of SimDINO and of SimDINOv2, without what only training needs.

    registers: their number, or None for a model without them, whose position grid is resized as
    DINO does. mean and std: of the pixels that the weights expect, by default ImageNet's.
    """

    def __init__(self, side, patch_size, embed_dim, depth, num_heads, registers, layerscale):
        super().__init__()
        self.patch_size, self.side, self.width = patch_size, side, embed_dim
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, embed_dim))
        self.register_tokens = None
        if registers is not None:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        self.first_patch = 1 + (registers or 0)  # tokens: CLS, registers, patches
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for name, values in ("mean", MEAN), ("std", STD):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def position_embedding(self, h, w):
        """(1, 1 + h w, D) for a grid of h x w patches, bicubic from the grid trained on."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if self.register_tokens is None:  # the 0.1 is DINO's, against rounding
            factor = ((h + 0.1) / self.side, (w + 0.1) / self.side)
            grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        else:
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def normalize(self, x):
        """uint8 (B, 3, H, W) -> float32, on the model's device: (x / 255 - mean) / std."""
        x = x.to(self.mean.device, non_blocking=True) / 255
        return torch.addcmul(-self.mean / self.std, x, 1 / self.std)

    def prepare_tokens(self, x):
        """(B, 3, H, W) -> (B, 1 + R + N, D): CLS, registers and patches, with their positions."""
        h, w = x.shape[-2:]
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embedding(h // self.patch_size, w // self.patch_size)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def get_intermediate_layers(self, x, n=1):
        """Normed tokens (B, 1 + R + N, D), CLS first, of the last n blocks, as a list."""
        x, outputs = self.prepare_tokens(x), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-n:]]

    def get_last_selfattention(self, x):
        """Attention weights (B, heads, T, T) of the last block, T = 1 + R + N tokens, CLS first."""
        x = nn.Sequential(*self.blocks[:-1])(self.prepare_tokens(x))
        attn, x = self.blocks[-1].attn, self.blocks[-1].norm1(x)
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


# ---------------------------------------------------------------------------- the features and k-NN


@torch.no_grad()
def encode(model, x):
    """uint8 (B, 3, H, W) -> (B, 5, D): CLS tokens of the last 4 blocks, mean patch of the last."""
    layers = model.get_intermediate_layers(model.normalize(x), 4)
    patches = layers[-1][:, model.first_patch :].mean(1)
    return torch.stack([*(tokens[:, 0] for tokens in layers), patches], dim=1)


@torch.no_grad()
def encode_patches(model, x):
    """uint8 (B, 3, H, W) -> (B, h, w, D): patch tokens of the last block."""
    grid = [side // model.patch_size for side in x.shape[2:]]
    tokens = model.get_intermediate_layers(model.normalize(x))[0]
    return tokens[:, model.first_patch :].unflatten(1, grid)


def accuracies(hits, counts):
    """Of each candidate, [top-1, mean of the classes' accuracies] in %. hits: right answers
    (candidates, classes); counts: images (classes,)."""
    hits, present = hits.double(), counts > 0
    means = (hits[:, present] / counts[present]).mean(1)
    return (100 * torch.stack([hits.sum(1) / counts.sum(), means], dim=1)).tolist()


@torch.no_grad()
def knn_accuracies(train, val, neighbours=(10, 20, 100, 200), temperature=0.07):
    """{k: [top-1, mean of the classes' accuracies]} on val in %, for k neighbours, or all of train.

    They vote with exp(cosine / temperature). train, val: features (n, D), labels (n,), -1 for none,
    the same on all processes; each judges its share of val.
    """
    (bank, labels), keep = train, val[1] >= 0
    classes = 1 + int(torch.cat([labels, val[1]]).max())
    neighbours = sorted({min(k, int((labels >= 0).sum())) for k in neighbours})
    hits = torch.zeros(len(neighbours), classes, device=bank.device)
    for z, y in zip(*(column[keep][PROCESS::WORLD].split(256) for column in val)):
        z = F.normalize(z.float(), dim=-1)
        # In parts, so that there is never a float32 copy of the whole bank
        cosine = [z @ F.normalize(part.float(), dim=-1).mT for part in bank.split(2**16)]
        cosine = torch.cat(cosine, dim=1).masked_fill_(labels < 0, -math.inf)
        nearest, at = cosine.topk(neighbours[-1])
        weight = (nearest / temperature).exp()
        for i, number in enumerate(neighbours):
            votes = torch.zeros(len(z), classes, device=z.device)
            votes.scatter_add_(1, labels[at[:, :number]], weight[:, :number])
            hits[i] += torch.bincount(y[votes.argmax(1) == y], minlength=classes)
    if WORLD > 1:
        dist.all_reduce(hits)
    return dict(zip(neighbours, accuracies(hits, torch.bincount(val[1][keep], minlength=classes))))


# ---------------------------------------------------------------------------------------- the probe

KINDS = {  # rows of an image's features (5, D) that a classifier sees
    "1 block": slice(-2, -1),
    "1 block + patches": slice(-2, None),
    "4 blocks": slice(0, -1),
    "4 blocks + patches": slice(0, None),
}
# Learning rates of DINOv2, for steps of 256 images
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class Probe(nn.Module):
    """All candidates in one module: a linear classifier for each kind of features and rate."""

    def __init__(self, tokens, width, classes):
        super().__init__()
        self.heads = nn.ModuleList()
        for rows in KINDS.values():
            dim = len(range(tokens)[rows]) * width  # as many rows as the slice takes
            self.heads.append(nn.Linear(dim, len(RATES) * classes))
            nn.init.normal_(self.heads[-1].weight, std=0.01)
            nn.init.zeros_(self.heads[-1].bias)

    def forward(self, z):  # (B, 5, D) -> (B, candidates, classes)
        scores = [head(z[:, rows].flatten(1)) for head, rows in zip(self.heads, KINDS.values())]
        return torch.cat([s.unflatten(1, (len(RATES), -1)) for s in scores], dim=1)

    def losses(self, z, y):  # -> (candidates,)
        return cross_entropies(self(z), y).mean(0)


def cross_entropies(scores, y):  # (B, candidates, classes), (B,) -> (B, candidates)
    return F.cross_entropy(scores.mT, y[:, None].expand(scores.shape[:2]), reduction="none")


@torch.no_grad()
def judge(probe, features, labels):
    """A list with a dictionary for each candidate: top1, class_mean (the mean of the classes'
    accuracies) and top5 in %, and the mean loss, 1e9 where it is not finite.

    probe: a function of features (B, 5, D) -> (B, candidates, classes); labels (n,).
    """
    hits = sums = 0
    for z, y in zip(features.split(256), labels.split(256)):
        scores = probe(z.float())
        top = scores.topk(min(5, scores.shape[-1])).indices == y[:, None, None]
        hits = hits + top[..., 0].double().mT @ F.one_hot(y, scores.shape[-1]).double()
        sums = sums + torch.stack([100 * top.any(-1), cross_entropies(scores, y)]).sum(1)
    pairs = accuracies(hits, torch.bincount(labels, minlength=hits.shape[1]))
    others = (sums / len(labels)).nan_to_num(1e9, 1e9).T.tolist()
    names = "top1", "class_mean", "top5", "loss"
    return [dict(zip(names, (*a, *b))) for a, b in zip(pairs, others)]


def hold_out(classes, args):
    """Cut the images in two: a tenth, at most 10,000, to choose the best candidate by, and the rest
    to train on. classes[i]: those of image i, which is in neither part if it has none.

    The last image of a class is not held out. Returns two arrays of indices.
    """
    order = np.random.default_rng(args.seed).permutation(len(classes)).tolist()
    order = [i for i in order if classes[i]]
    remaining, held, part = Counter(chain.from_iterable(classes)), [], []
    for i in order:
        wanted = len(held) < max(1, min(len(order) // 10, 10000))
        if wanted and all(remaining[name] > 1 for name in classes[i]):
            remaining.subtract(classes[i])
            held.append(i)
        else:
            part.append(i)
    if not held or len(part) < args.batch_size:
        text = f"{len(held)} images can be held out, {len(part)} are left for steps of"
        sys.exit(f"no probe: {text} {args.batch_size}: see --batch_size_per_gpu, --epochs 0")
    return np.array(held), np.array(part)


@torch.no_grad()
def as_matrix(probe, scores, width):
    """A candidate for use elsewhere: scores(z) = z @ weight.T + bias, for features z (B, width)."""
    eye = torch.eye(width, device=next(probe.parameters()).device)
    bias, *weight = (scores(z).cpu() for z in (0 * eye[:1], *eye.split(256)))
    return {"weight": (torch.cat(weight) - bias).T.contiguous(), "bias": bias[0]}


# --------------------------------------------------------------------------------- the segmentation

PATCH_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates for steps of 256 images


class PatchProbe(nn.Module):
    """All candidates in one module: batch normalisation, and a linear classifier for each rate."""

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("moments", torch.stack([torch.zeros(width), torch.ones(width)]))
        self.head = nn.Linear(width, len(PATCH_RATES) * classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, z):  # (B, h, w, D) -> (B, classes, h, w) of each candidate
        mean, square = self.moments
        if self.training:  # those of the tokens of all processes
            moments = torch.stack([z.mean((0, 1, 2)), z.square().mean((0, 1, 2))]) / WORLD
            if WORLD > 1:
                dist.all_reduce(moments)
            self.moments.lerp_(moments, 0.1)  # as BatchNorm does
            mean, square = moments
        z = (z - mean) / ((square - mean**2).clamp(min=0) + 1e-5).sqrt()
        return self.head(z).movedim(-1, 1).chunk(len(PATCH_RATES), dim=1)

    @staticmethod
    def loss(scores, y):  # y (B, H, W); -1: void, counted in the mean, so that all steps are alike
        scores = upsample(scores, y.shape[1:])
        return F.cross_entropy(scores, y, reduction="none", ignore_index=-1).mean()

    def losses(self, z, y):  # checkpoint: scores of all pixels exist of one candidate at a time
        return torch.stack([checkpoint(self.loss, x, y, use_reentrant=False) for x in self(z)])


def upsample(scores, size):  # (B, classes, h, w) -> (B, classes, *size)
    return F.interpolate(scores.contiguous(), size, mode="bilinear")


@torch.no_grad()
def confusions(probe, features_of, scenes, args):
    """Of each candidate (n, n): how many pixels of each of n classes were given which. A process
    takes every WORLD-th scene."""
    own, batch, n = range(PROCESS, len(scenes), WORLD), args.batch_size_per_gpu, len(scenes.classes)
    counts = torch.zeros(len(PATCH_RATES), n, n, dtype=torch.double, device=probe.moments.device)
    batches = features_of(scenes, sampler=own, batch_size=batch)
    for z, y, problems in progress(batches, math.ceil(len(own) / batch), "judging: batch"):
        if any(problems):
            sys.exit(f"it could be read before: {max(problems)}")
        for count, scores in zip(counts, probe(z.float())):
            given = upsample(scores, y.shape[1:]).argmax(1)
            count += torch.bincount((n * y + given)[y >= 0], minlength=n * n).view(n, n)
    if WORLD > 1:
        dist.all_reduce(counts)
    if not counts.any():
        sys.exit("no pixel to judge by has a class: give a larger --segment H W, or another --seed")
    return counts


def segmentation_scores(counts):
    """Of one confusion matrix, %: mIoU over the classes that occur, accuracy of pixels and its mean
    over classes, IoU of each class."""
    hits, true = counts.diagonal(), counts.sum(1)
    iou = 100 * hits / (counts.sum(0) + true - hits)  # NaN: neither there nor given
    known = [None if math.isnan(value) else value for value in iou.tolist()]
    figures = {"miou": iou.nanmean(), "pixel_accuracy": 100 * hits.sum() / true.sum()}
    figures["class_mean"] = 100 * (hits / true).nanmean()
    return {name: value.item() for name, value in figures.items()} | {"iou": known}


# =================================================================================== 2. The program

# Options that do not make another run; weights are known by their hash
FREE = {"weights", "output_dir", "num_workers", "batch_size_per_gpu"}


def within(kind, low, high=1e9):
    """A type for argparse: a number of this kind from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {low:g} to {high:g}")
        return kind(text)

    return number


def parse_args(argv=None):
    """The options of argv, or of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(__doc__.split("\n")[:9])
    parser.error, parser.usage = sys.exit, "python %(prog)s --weights FILE [options]"

    def add(flag, text, default=None, to=parser, **more):
        text += "" if default is None else f" [{str(default).strip('[]()')}]"
        to.add_argument(flag, default=default, help=text, **more)

    count, size = ({"type": within(int, low), "metavar": "N"} for low in (0, 1))
    colour = {"type": within(float, 0, 1), "metavar": "X", "nargs": 3}
    names = "--weights", "--pretrained_weights"
    parser.add_argument(*names, required=True, metavar="FILE", help="what to judge")
    add("--checkpoint_key", "which weights, where FILE has several [teacher]", metavar="NAME")
    add("--num_heads", "heads of the model [those of a standard ViT of its width]", **size)
    add("--mean", "mean of the pixels that the weights expect", MEAN, **colour)
    add("--std", "standard deviation of these pixels", STD, **colour)
    text = "folder of train/ and val/ or test/, of class folders; --embed: any folder of images"
    add("--data_path", text, metavar="DIR")
    add("--output_dir", "folder for results and probes", "output_eval_linear", metavar="DIR")
    add("--resize_size", "shorter side of an image before the crop, pixels", 256, **size)
    add("--crop_size", "side of what the model sees, pixels", 224, **size)

    add("--epochs", "passes of the probe over the training images; 0: k-NN alone", 100, **count)
    text = "train the probe on the features of one central crop an image"
    add("--cached", text, action="store_true")
    add("--batch_size_per_gpu", "images of a step on each GPU [128; --segment: 8]", **size)
    add("--ignore_index", "what masks hold where there is no class", [255], nargs="+", **count)
    text = "auto: bf16 or else fp16 on GPUs, off: float32"
    add("--amp", text, "auto", choices=("auto", "bf16", "fp16", "off"))
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    add("--num_workers", "data-loading workers per GPU", min(10, cores), **count)
    add("--seed", "seed of all that is random", 0, **count)

    modes = parser.add_mutually_exclusive_group()
    text = "probe of patch tokens; images and masks are resized to H W [size of the first]. A mask "
    text += "has its image's name, .png, and a class a pixel, in train_masks/ or val_masks/"
    add("--segment", text, nargs="*", type=size["type"], metavar=("H", "W"), to=modes)
    text = "write features (CLS token of the last block), names and labels of all images below DIR"
    add("--embed", text, metavar="OUT.npz", to=modes)
    text = "draw attention and features of images [the first 8 below DIR]"
    add("--pictures", text, nargs="+", metavar=("OUT.png", "IMAGE"), to=modes)
    text = "write the backbone as timm loads it, with strict=True"
    add("--export", text, metavar="OUT.pth", to=modes)

    args = parser.parse_args(argv)
    if args.resize_size < args.crop_size and args.segment is None:
        sys.exit(f"--resize_size {args.resize_size} is smaller than --crop_size {args.crop_size}")
    if not (args.data_path or args.export or len(args.pictures or []) > 1):
        sys.exit("--data_path is needed: train/ and val/ or test/; for --embed, any folder")
    if args.segment is not None and (len(args.segment) not in (0, 2) or not args.epochs):
        sys.exit("--segment takes no number or two, H and W, and at least one of --epochs")
    args.batch_size_per_gpu = args.batch_size_per_gpu or (128 if args.segment is None else 8)
    args.batch_size = args.batch_size_per_gpu * WORLD
    return args


def seed_from(*numbers):
    """One 32-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def main():
    """Read the weights, then do what the options ask for."""
    args, device, begun = parse_args(), start_process(), time.monotonic()
    cuda, segmenting = device.type == "cuda", args.segment is not None
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    model, left_out = load_backbone(args.weights, args.checkpoint_key, args.num_heads)
    model.mean, model.std = (torch.tensor(x).view(3, 1, 1) for x in (args.mean, args.std))
    model.to(device)
    text = f"{model.width} wide, {len(model.blocks)} blocks, {model.blocks[0].attn.num_heads} heads"
    text += f"{'' if args.num_heads else ', by its width'}, patch {model.patch_size}, "
    text += f"{model.side} x {model.side} positions, {model.first_patch - 1} registers"
    say(f"{args.weights}: {model.prefix}*, {text}; left out: {', '.join(left_out) or 'nothing'}")
    if args.crop_size % model.patch_size and not (segmenting or args.export):
        sys.exit(f"--crop_size {args.crop_size} is not a multiple of the patch, {model.patch_size}")

    workers = {"num_workers": args.num_workers, "pin_memory": cuda, "worker_init_fn": catch_signals}
    workers["timeout"] = 900 * bool(args.num_workers)  # seconds: a worker that hangs ends the run
    half = dtype != torch.float32

    def features_of(images, **how):
        """Yield features, labels and problems of batches of images; how: options of DataLoader."""
        for x, y, problems in DataLoader(images, **workers, **how):
            with torch.autocast(device.type, dtype, enabled=half):
                z = (encode_patches if segmenting else encode)(model, x)
            yield z.half() if half else z, y.to(device, non_blocking=True), problems

    if args.export or args.pictures:
        if PROCESS == 0:
            (export if args.export else draw)(args, model)
    elif args.embed:
        write_features(args, features_of)
    else:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):  # known at the start
            sys.exit(f"cannot write to {output}")
        results = segment(args, features_of, model) if segmenting else classify(args, features_of)
        results |= {"weights": args.weights, "seconds": time.monotonic() - begun}
        classifier, run_id = results.pop("classifier", None), results["id"]
        text = json.dumps(results, indent=2) + "\n"
        if PROCESS == 0:
            if classifier:
                write(output / f"classifier-{run_id}.pth", partial(torch.save, classifier))
            write(output / f"results-{run_id}.json", lambda file: file.write(text.encode()))
            for probe in output.glob(f"probe-{run_id}-*.pth"):
                probe.unlink()
            also = f", classifier-{run_id}.pth" if classifier else ""
            say(f"written to {output}: results-{run_id}.json{also}")
    if WORLD > 1:
        time.sleep(0.2)  # gloo's threads must finish, or PyTorch 2.6 would wait for ever
        dist.destroy_process_group()
    atexit.unregister(os._exit)


def identify_run(args, classes, *splits):
    """The first entries of results: what the figures depend on, and an id made of it. Ends where
    the processes find different weights or images."""
    for images in splits:
        images[0]  # raises if no image can be read
    contents = [Path(args.weights).read_bytes(), *(b"\0".join(images.names) for images in splits)]
    run = {name: value for name, value in vars(args).items() if name not in FREE}
    run |= {"data_path": os.path.realpath(args.data_path), "classes": classes}
    run["sha256"] = [hashlib.sha256(content).hexdigest()[:16] for content in contents]
    run_id = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:8]
    if len({*all_gather(run_id)}) > 1:
        sys.exit("the processes find different weights or images: they have to share a disk")
    return {"id": run_id, "run": run}


def micro_batches(n, args, done):
    """Yield, for each step from done on, the keys of this process's images: epoch * n + image.

    An epoch's images, in random order, are cut into whole steps of batch_size (the rest is left
    out), and these into equal parts, one a process: a step depends on batch_size alone.
    """
    for step in range(done, args.epochs * (n // args.batch_size)):
        epoch, i = divmod(step, n // args.batch_size)
        if i == 0 or step == done:
            order = epoch * n + np.random.default_rng((args.seed, epoch)).permutation(n)
        first = i * args.batch_size + PROCESS * args.batch_size_per_gpu
        yield order[first : first + args.batch_size_per_gpu].tolist()


def fit(probe, rates, batches, n, args, run_id):
    """Train all candidates of the probe by SGD, for args.epochs passes over n images.

    batches(batch_sampler=...) yields features, labels, ...; probe.losses(features, labels) is one
    loss a candidate. Saved every 15 minutes, at a signal and at the end to probe-ID-n.pth; if this
    file exists, training goes on from it.
    """
    path, done = Path(args.output_dir, f"probe-{run_id}-{n}.pth"), 0
    total = args.epochs * (n // args.batch_size)
    rates = torch.tensor(rates, device=next(probe.parameters()).device)
    cosine = (1 + np.cos(np.pi * np.arange(total) / total)) / 2
    factors = (args.batch_size / 256 * cosine).tolist()
    optimizer = torch.optim.SGD(probe.parameters(), lr=1.0, momentum=0.9, fused=True)
    if any(all_gather(path.exists())):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            probe.load_state_dict(state["probe"])
            optimizer.load_state_dict(state["optimizer"])
            done = state["step"]
        except Exception as error:  # there is no end to what a damaged file may make it raise
            raise SystemExit(f"cannot resume {path}: move it away") from error
        say(f"resumed {path} at step {done}")
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    caught, saved = catch_signals(), time.monotonic()
    data = batches(batch_sampler=micro_batches(n, args, done))
    for z, y, *_ in progress(data, total - done, "training the probe: step"):
        losses = probe.losses(z.float(), y)
        optimizer.zero_grad()
        # SGD on a loss times its rate is SGD at that rate: one optimizer for all candidates.
        ((losses * rates).sum() / WORLD).backward()
        for p in probe.parameters() if WORLD > 1 else []:
            dist.all_reduce(p.grad)
        optimizer.param_groups[0]["lr"] = factors[done]
        optimizer.step()
        done += 1
        if done % 10 and done < total and not (caught and WORLD == 1):
            continue  # the host does not wait for the device, nor a process for another
        lost = not losses.isfinite().any().item()  # one that is not finite stays so
        told = max(caught, default=0), time.monotonic() - saved > 900, lost
        number, late, lost = map(max, zip(*all_gather(told)))
        if lost:
            sys.exit("no candidate has a finite loss: try --amp off, or other --weights")
        if number or late or done == total:
            state = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            if PROCESS == 0:
                write(path, partial(torch.save, state))
            all_gather("saved: from here on, a process may end")
            saved = time.monotonic()
        if number:
            say(f"{signal.Signals(number).name}: saved {path} at step {done}; rerun to resume")
            os._exit(128 + number)
    for number, handler in before.items():  # all is saved: a signal may end the run as before
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def classify(args, features_of):
    """k-NN and the linear probe. -> what results-ID.json says of them."""
    splits, images = find_data(Path(args.data_path)), []
    if len(splits) < 2:
        sys.exit(f"nothing to judge in {args.data_path}")
    for root, names, labels in splits:
        labelled = [(name, label) for name, label in zip(names, labels) if label >= 0]
        images.append(Images(root, *zip(*labelled), partial(resize_and_crop, args=args)))
    classes = sorted({os.fsdecode(name).split(os.sep)[0] for name in images[0].names})
    results, folder = identify_run(args, classes, *images), images[1].root
    say(f"{len(images[0])} training images, {len(images[1])} to judge by, {len(classes)} classes")
    if args.epochs:  # ends here if there are too few images
        hold_out(images[0].labels[:, None].tolist(), args)
    features, labels, bad = extract(features_of, images[0], args)
    val, val_labels, val_bad = extract(features_of, images[1], args)
    cls = -2 if args.epochs else 0  # where the CLS token of the last block is
    knn = knn_accuracies((features[:, cls], labels), (val[:, cls], val_labels))
    text = ", ".join(f"k = {k}: {top1:.2f} ({mean:.2f})" for k, (top1, mean) in knn.items())
    say(f"k-NN on {folder}, top-1 in % (mean of the classes): {text}")
    results |= {"judged": folder, "bad_images": bad + val_bad}
    results["knn"] = {k: dict(zip(("top1", "class_mean"), pair)) for k, pair in knn.items()}
    if not args.epochs:
        return results

    # The probe
    held, part = hold_out([[label] * (label >= 0) for label in labels.tolist()], args)
    held_features, held_labels = features[held], labels[held]
    if args.cached:

        def batches(batch_sampler):
            for keys in batch_sampler:
                rows = torch.from_numpy(part[np.array(keys) % len(part)]).to(labels.device)
                yield features[rows], labels[rows]
    else:
        del features
        crop = transforms.RandomResizedCrop(args.crop_size, interpolation=BICUBIC)
        crop = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
        part_names, part_labels = images[0].names[part], images[0].labels[part]
        views = Images(images[0].root, part_names, part_labels, crop, args.seed)
        batches = partial(features_of, views)
    torch.manual_seed(seed_from(args.seed))
    probe = Probe(*val.shape[1:], len(classes)).to(labels.device)
    fit(probe, RATES * len(KINDS), batches, len(part), args, results["id"])
    held_out = judge(probe, held_features, held_labels)
    # Few images give many candidates the same accuracy: of these, the one of the lowest loss
    best = max(range(len(held_out)), key=lambda i: (held_out[i]["top1"], -held_out[i]["loss"]))
    readable = val_labels >= 0
    (figures,) = judge(lambda z: probe(z)[:, [best]], val[readable], val_labels[readable])
    candidates = [f"{kind}, lr {rate:g}" for kind, rate in product(KINDS, RATES)]
    say(f"the best of {len(candidates)} probes on {len(held)} held-out images: {candidates[best]}")
    text = "top-1 {top1:.2f}, top-5 {top5:.2f}, mean of the classes {class_mean:.2f} %"
    say(f"on these {text.format(**held_out[best])}; on {folder} {text.format(**figures)}")
    held_out = dict(zip(candidates, held_out))
    results["probe"] = {"held_out": held_out, "best": candidates[best], **figures}
    chosen = as_matrix(probe, lambda z: probe(z.view(-1, *val.shape[1:]))[:, best], val[0].numel())
    chosen |= {"classes": classes, "features": "encode(model, uint8 images).flatten(1)"}
    return results | {"classifier": chosen}


def segment(args, features_of, model):
    """--segment: the linear probe of patch tokens. -> what results-ID.json says of it."""
    root, patch, void = Path(args.data_path), model.patch_size, {*args.ignore_index}
    if any(side % patch for side in args.segment):
        sys.exit(f"--segment {args.segment}: give multiples of the patch, {patch}")
    folders = root / "train", root / ("val" if (root / "val").is_dir() else "test")
    scenes = (find_scenes(folder, void) for folder in folders)
    (paths, masks, classes_in, bad), (*val, val_classes_in, val_bad) = scenes
    classes, val_classes = ({*chain(*some)} for some in (classes_in, val_classes_in))
    if len(classes) < 2 or not val_classes or val_classes - classes:
        text = f"train {sorted(classes)[:9]}, {folders[1].name} {sorted(val_classes)[:9]}"
        sys.exit(f"{root} has classes in {text}; {sorted(void)} are none: see --ignore_index")
    if {*map(os.path.realpath, paths)} & {*map(os.path.realpath, val[0])}:
        sys.exit(f"{folders[0]} and {folders[1]} share images")
    classes = sorted(classes)
    size = args.segment or [max(1, side // patch) * patch for side in load_mask(masks[0]).shape]
    held, part = hold_out(classes_in, args)
    scenes = partial(Scenes, size=size, classes=classes, seed=args.seed)
    train = scenes(paths[part], masks[part], flip=True)
    tests = scenes(paths[held], masks[held]), scenes(*val)
    results = identify_run(args, classes, *(x.images for x in (train, *tests)))
    text = f"{len(paths)} training images, {len(tests[1])} to judge by, {len(classes)} classes"
    say(f"{text}; images and masks are resized to {size[0]} x {size[1]}")

    torch.manual_seed(seed_from(args.seed))
    probe = PatchProbe(model.width, len(classes)).to(model.mean.device)
    fit(probe, PATCH_RATES, partial(features_of, train), len(part), args, results["id"])
    probe.eval()
    counts, val_counts = (confusions(probe, features_of, x, args) for x in tests)
    held_out = [segmentation_scores(count)["miou"] for count in counts]
    best = held_out.index(max(held_out))
    figures = segmentation_scores(val_counts[best])
    figures["iou"] = dict(zip(classes, figures["iou"]))
    iou = ", ".join(f"{k}: {'-' if x is None else f'{x:.1f}'}" for k, x in figures["iou"].items())
    held_out = {f"lr {rate:g}": miou for rate, miou in zip(PATCH_RATES, held_out)}
    text = ", ".join(f"{name}: {miou:.2f}" for name, miou in held_out.items())
    say(f"probes, mIoU in % on {len(held)} held-out images: {text}")
    text = "mIoU {miou:.2f}, pixels {pixel_accuracy:.2f}, mean of the classes {class_mean:.2f} %"
    say(f"the best on {folders[1]}: {text.format(**figures)}; IoU of each class: {iou}")
    results |= {"judged": str(folders[1]), "bad_images": bad + val_bad}
    results["segmentation"] = {"held_out_miou": held_out, "best": [*held_out][best], **figures}
    chosen = as_matrix(probe, lambda z: probe(z[:, None, None])[best].flatten(1), model.width)
    chosen |= {"classes": classes, "features": "encode_patches(model, uint8 images)"}
    return results | {"classifier": chosen}


def write_features(args, features_of):
    """--embed: write the features, names and labels of all images below --data_path."""
    out, root = new_file(args.embed, ".npz"), Path(args.data_path)
    names, *_ = find_images(root)
    if not names:
        sys.exit(f"no images in {root}")
    images = Images(root, names, [0] * len(names), partial(resize_and_crop, args=args))
    identify_run(args, [], images)
    features, read, _ = extract(features_of, images, args)
    features, read = features[read >= 0, 0].float().cpu().numpy(), (read >= 0).cpu().numpy()
    names = [os.fsdecode(name) for name in images.names[read]]
    labels = [name.rpartition(os.sep)[0].split(os.sep)[0] for name in names]
    if PROCESS == 0:
        write(out, partial(np.savez, features=features, names=names, labels=labels))
    say(f"{out}: features {features.shape}, CLS of the last block; names; labels: first folders")


@torch.no_grad()
def draw(args, model, tile=168):
    """--pictures: a row for each image: the image; the last block's attention of CLS to the
    patches, head by head; and, as red, green and blue, the first three principal components of the
    patch features of all images."""
    out, *paths = args.pictures
    out, shown, attention, patches = new_file(out, ".png"), [], [], []
    if not paths:
        root = Path(args.data_path)
        paths = [root / os.fsdecode(name) for name in find_images(root)[0][:8]]
    if not paths:
        sys.exit(f"no images in {args.data_path}")
    for path in paths:
        shown.append(resize_and_crop(load_image(path), args))
        x = model.normalize(shown[-1][None])
        attention.append(model.get_last_selfattention(x)[0, :, 0, model.first_patch :].cpu())
        patches.append(model.get_intermediate_layers(x)[0][0, model.first_patch :].cpu())
    attention, patches = torch.stack(attention), torch.stack(patches)  # (n, heads, N), (n, N, D)
    if not patches.isfinite().all():
        sys.exit("the features are not finite: see --std, --weights")
    centred = (patches - patches.mean((0, 1))).flatten(0, 1).double()
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].mT
    low, high = components.quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1).view(*patches.shape[:2], 3).mT
    light = (attention / attention.quantile(0.98, dim=-1, keepdim=True)).clamp(0, 1)
    maps = [*light[:, :, None].expand(-1, -1, 3, -1).unbind(1), colours.float()]  # each (n, 3, N)
    side = args.crop_size // model.patch_size
    maps = [F.interpolate(x.unflatten(2, (side, side)), (tile, tile)) for x in maps]
    shown = TF.resize(torch.stack(shown), tile, BICUBIC, antialias=True) / 255
    tiles = torch.stack([shown, *maps], dim=1).flatten(0, 1)
    grid = utils.make_grid(tiles, nrow=1 + len(maps), padding=4, pad_value=1)
    write(out, partial(utils.save_image, grid, format="png"))
    say(f"{out}: image, attention of heads 1 to {len(maps) - 1}, patch features as colours")


def export(args, model):
    """--export: write the weights as timm names them; print the code that loads them there."""
    path, state = new_file(args.export, ".pth"), model.state_dict()
    shape = {"img_size": model.side * model.patch_size, "patch_size": model.patch_size}
    shape |= {"embed_dim": model.width, "depth": len(model.blocks)}
    shape |= {"num_heads": model.blocks[0].attn.num_heads, "num_classes": 0}
    if "blocks.0.ls1.gamma" in state:
        shape["init_values"] = 1
    if "register_tokens" in state:  # timm gives no position to CLS: ours is added to it
        if (registers := state.pop("register_tokens")).numel():
            state["reg_token"] = registers
        first, state["pos_embed"] = state["pos_embed"].tensor_split([1], dim=1)
        state["cls_token"] = state["cls_token"] + first
        shape |= {"reg_tokens": model.first_patch - 1, "no_embed_class": True}
    write(path, partial(torch.save, {name: x.cpu().clone() for name, x in state.items()}))
    options = ", ".join(f"{name}={value}" for name, value in shape.items())
    load = f'model.load_state_dict(torch.load("{path}", weights_only=True), strict=True)'
    say(f"model = timm.models.VisionTransformer({options}); {load}")


# ================================================================== 3. What the program stands on

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


def progress(items, total, text):
    """Yield the items; say how many of total are done, once a minute where there is no terminal."""
    begun = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > (0.1 if on_terminal() else 60):
            said, left = now, timedelta(seconds=int((now - begun) / done * (total - done)))
            say(f"{text} {done}/{total} ETA {left}", stays=False)


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


def resize_and_crop(image, args):
    """uint8 (3, H, W) -> (3, crop_size, crop_size): Resize(resize_size), CenterCrop(crop_size)."""
    longest = 2 * min(image.shape[1:])  # what a strip has beyond it would be cut off later
    image = TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    image = TF.resize(image, args.resize_size, BICUBIC, antialias=True)
    return TF.center_crop(image, args.crop_size)


def extract(features_of, images, args):
    """Of all images, on all processes: features (n, 5, D), or (n, 1, D), the CLS token of the last
    block, where there is no probe; labels (n,), -1 where an image is unreadable; how many are."""
    n, share, batch = len(images), math.ceil(len(images) / WORLD), args.batch_size_per_gpu
    features, unread, done = None, {}, PROCESS * share
    chosen = [i % n for i in range(done, done + share)]  # the surplus is cut below
    batches = features_of(images, batch_size=batch, sampler=chosen)
    for z, _, problems in progress(batches, math.ceil(share / batch), f"{images.root}: batch"):
        z = z[:, -2:-1] if args.embed or not args.epochs else z
        if features is None:
            features = z.new_empty(WORLD * share, *z.shape[1:])
        features[done : done + len(z)] = z
        unread |= {(done + i) % n: problem for i, problem in enumerate(problems) if problem}
        done += len(z)
    for process, rows in enumerate(features.split(share) if WORLD > 1 else []):
        dist.broadcast(rows, process)
    features, labels = features[:n], torch.tensor(images.labels, device=features.device)
    if not torch.stack(features.aminmax()).isfinite().all():  # makes no copy; NaN shows as well
        sys.exit("the features are not finite: see --amp, --std, --weights")
    unread = dict(chain(*(some.items() for some in all_gather(unread))))
    labels[[*unread]] = -1
    return features, labels, report_unread([*unread.values()], n, images.root)


def report_unread(problems, n, root):
    """Say which of n images could not be read, the first three by name; -> how many."""
    for problem in sorted(problems)[:3]:
        say(f"unreadable, left out: {problem}")
    if problems:
        say(f"{len(problems)} of {n} images in {root} cannot be read")
    return len(problems)


# -------------------------------------------------------------------------------------- the masks


def load_mask(path):
    """A grayscale or palette image, a class a pixel -> int64 (H, W), upright by its EXIF data.
    OSError for another one."""
    try:
        with Image.open(os.fsdecode(path)) as image:
            raw = str(image.tile)  # Pillow stretches gray of 2 and 4 bits to 255
            scale = 85 if "'L;2'" in raw else 17 if "'L;4'" in raw else 1
            mask = np.array(ImageOps.exif_transpose(image)).astype(np.int64) // scale
        if mask.ndim != 2:
            raise ValueError("it has colours, not a class a pixel")
        return mask
    except Exception as error:  # there is no end to what a decoder may raise
        raise OSError(f"{os.fsdecode(path)!a} ({' '.join(str(error).split())})") from error


class Scenes(Dataset):
    """scenes[key] -> image (3, H, W), mask (H, W), and why the image could not be read, or "".

    The mask holds indices in classes, sorted numbers, and -1 for all else. flip: mirror half of the
    images, as in training.
    """

    def __init__(self, paths, masks, size, classes, seed, flip=False):
        resize = partial(TF.resize, size=size, interpolation=BICUBIC, antialias=True)
        self.images = Images("", paths, masks, resize, seed)
        self.classes, self.flip = np.array(classes), flip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        image, path, problem = self.images[key]
        mask = load_mask(path)
        index = self.classes.searchsorted(mask).clip(max=len(self.classes) - 1)
        index[self.classes[index] != mask] = -1
        mask = torch.from_numpy(index)[None, None].float()
        mask = F.interpolate(mask, image.shape[1:], mode="nearest-exact")[0, 0].long()
        if self.flip and torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask, problem


def find_scenes(folder, void):
    """Of the images in folder that can be read: paths, paths of masks, and the set of classes in
    each mask but for those in void; how many cannot be read. Masks are named as the images, and lie
    in <folder>_masks/."""
    names, found = [os.fsdecode(name) for name in find_images(folder)[0]], []
    own = range(PROCESS, len(names), WORLD)
    for i in progress(own, len(own), f"masks of {folder}:"):
        path, problem = os.path.join(folder, names[i]), ""
        mask = os.path.join(f"{folder}_masks", os.path.splitext(names[i])[0] + ".png")
        pixels = load_mask(mask)
        try:
            shape = tuple(load_image(path).shape[1:])
            if shape != pixels.shape:
                sys.exit(f"{path!a} is {shape} pixels, its mask {pixels.shape}: height, width")
        except OSError as error:
            problem = str(error)
        classes = {*np.unique(pixels).tolist()} - void
        found.append((i, problem, os.fsencode(path), os.fsencode(mask), classes))
    found = sorted(chain(*all_gather(found)))  # by i
    bad = report_unread([problem for _, problem, *_ in found if problem], len(names), folder)
    if bad == len(found):
        sys.exit(f"no image in {folder} can be read")
    paths, masks, classes = zip(*(scene for _, problem, *scene in found if not problem))
    return np.array(paths), np.array(masks), classes, bad


# ------------------------------------------------------------------------------ weights from a file

# Beside tensors, official checkpoints hold their arguments and NumPy's learning rates.
SCALAR = np.float64(0).__reduce__()[0]  # rebuilds it; NumPy 1 and 2 pickle it by different names
SAFE = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [argparse.Namespace, np.dtype, type(np.dtype("float64"))]
HEADS_OF = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16}  # width: heads, of the standard ViTs
PATCHES = "patch_embed.proj.weight"  # the name by which a vision transformer is found


def tensors_in(tree, name=""):
    """Yield (name, tensor) of nested dictionaries, the name with a dot for each level."""
    if torch.is_tensor(tree):
        yield name, tree
    for key, part in tree.items() if isinstance(tree, dict) else []:
        yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def read_tensors(path):
    """All tensors in a .pth or .safetensors file by name; no code in it is run."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(SAFE):
            return dict(tensors_in(torch.load(path, map_location="cpu", weights_only=True)))
    except (OSError, ModuleNotFoundError) as error:  # no such file; no package safetensors
        raise SystemExit(f"cannot read {path}: {error}") from error
    except Exception as error:  # there is no end to what a damaged file may make its reader raise
        begins = Path(path).read_bytes()[:40]  # tells a pointer of Git LFS, or a page of the web
        code = re.search("GLOBAL ([^ ]+)", str(error))
        text = f"code inside, {code[1]}" if code else "no weights, or damaged"
        raise SystemExit(f"{path}: {text}; it begins with {begins}"[:500]) from error


def load_backbone(path, key=None, num_heads=None):
    """The VisionTransformer in path, in eval mode, and the names of what was left out.

    path: plain ViTs of simdino.py, simdinov2.py, official SimDINO(v2), DINO(v2) or timm; .pth or
    .safetensors. key: where there are several, a part of the names of those to take, by default
    "teacher". num_heads cannot be read off the tensors: by default that of the standard ViT of this
    width. SystemExit, with one line, for other files.
    """
    found, word = read_tensors(path), key or "teacher"
    prefixes = [name.removesuffix(PATCHES) for name in found if f".{name}".endswith(f".{PATCHES}")]
    chosen = [prefix for prefix in prefixes if word in prefix] or ([] if key else prefixes)
    if len(chosen) != 1:
        text = f"{len(chosen)} vision transformers" + f" under --checkpoint_key {key}" * bool(key)
        has = f"{PATCHES} under {prefixes}" if prefixes else f"no {PATCHES}, but {[*found][:5]}"
        sys.exit(f"{path}: {text}; it has {has}"[:500])

    tensors, left_out = {}, []
    for name, x in found.items():
        if name.startswith(chosen[0]):
            name = name.removeprefix(chosen[0]).replace("_orig_mod.", "")  # of torch.compile
            name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunks of FSDP
            if name.startswith(("head.", "mask_token")):
                left_out.append(name)
            else:
                tensors["register_tokens" if name == "reg_token" else name] = x
    positions = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    layerscale = "blocks.0.ls1.gamma" in tensors
    if positions and layerscale and math.isqrt(positions) ** 2 == positions:  # none for CLS, timm
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    width, *_, patch_size = tensors[PATCHES].shape
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads, side = num_heads or HEADS_OF.get(width, 0), math.isqrt(positions)
    size = side, patch_size, width, depth, heads or 1
    model = VisionTransformer(*size, registers, layerscale)
    states = model.state_dict(), tensors
    own, its = ({f"{name} {(*x.shape,)}" for name, x in state.items()} for state in states)
    if own != its:
        text = f"it lacks {sorted(own - its)[:3]} and has {sorted(its - own)[:3]}"
        sys.exit(f"{path}: not a vision transformer as here: {text}"[:500])
    if not heads or width % heads:
        sys.exit(f"{path}: give --num_heads, a divisor of its width, {width}")
    model.load_state_dict(tensors)
    model.prefix = chosen[0]
    return model.eval().requires_grad_(False), left_out


# --------------------------------------------------------------------------- files that are written


def new_file(path, end):
    if Path(path).suffix != end or os.path.exists(path) or not Path(path).parent.is_dir():
        sys.exit(f"{path}: give the name of a new {end} file, in a folder that exists")
    return Path(path)


def write(path, dump):
    """dump(file) to a temporary file, then rename it: path is never half written."""
    partial_path = path.with_suffix(f".partial{os.getpid()}")
    try:
        with partial_path.open("wb") as file:
            dump(file)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except Exception as error:  # the disk's error is the first of those that follow from it
        partial_path.unlink(missing_ok=True)
        while error.__context__:
            error = error.__context__
        raise SystemExit(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no valid text
    try:
        main()
    except OSError as error:  # its text names a file or folder, and what is wrong with it
        sys.exit(str(error))
