# SPDX-License-Identifier: MIT
"""Judge the weights of a vision transformer: k-NN, linear probe, segmentation, features, pictures.

    torchrun --nproc_per_node=8 eval_linear.py --weights FILE --data_path /imagenet
    python eval_linear.py --weights FILE --data_path DATA --cached           # a faster probe
    python eval_linear.py --weights FILE --data_path DATA --epochs 0         # k-NN alone
    python eval_linear.py --weights FILE --data_path SCENES --segment 512 512
    python eval_linear.py --weights FILE --data_path PHOTOS --embed OUT.npz  # features
    python eval_linear.py --weights FILE --pictures OUT.png PHOTO...
    python eval_linear.py --weights FILE --export OUT.pth                    # for timm

FILE holds a plain ViT of simdino.py, simdinov2.py, official SimDINO(v2), DINO(v2) or timm. Its
architecture is read off the shapes of its weights, but for the number of heads, which is guessed by
the width: see --num_heads. See also --mean and --std, if it expects other pixels than ImageNet's.

DATA holds train/CLASS/*.jpg and val/CLASS/*.jpg. The first command computes k-NN accuracies of the
last block's CLS token, with DINO's weighted vote. Then it trains 52 linear classifiers at once on
random crops of the images: DINOv2's 4 kinds of features x 13 learning rates. The best one is chosen
by its accuracy on images of train/ that are not trained on. If train/ has fewer than 1,000 images,
the classifiers are then trained again, on all of them. Only the chosen one is tried on val/. With
--cached, the classifiers see the central crop of each image, so the backbone computes each image
only once.

What differs from DINO's and DINOv2's own evaluations: the choice is made on held-out images, not on
val/, so from 1,000 images on a tenth (at most 10,000) is not trained on; images smaller than 256
pixels are not enlarged to that (see center_crop); by default there are 100 epochs, and half
precision on GPUs.

--output_dir then has:

    results.jsonl           a line for each run, with its id, figures and options
    predictions-ID.csv      for each image judged: its class, that of k-NN (k = 20), of the probe
    classifier-ID.pth       the chosen classifier

With the same --batch_size, the figures are the same on any number of processes, up to rounding. If
a run is interrupted while it trains classifiers, the same command resumes from their last epoch,
after it has extracted the features again.

--segment resizes images and masks to one size and trains linear classifiers of patches. Its figures
are of the resized masks: papers judge masks of the original size.

Section 1 is what is computed: features, k-NN, probe, segmentation. Section 2 is the program: the
options, and what each command does. Section 3 holds the helpers of both.
k-NN: "Emerging Properties in Self-Supervised Vision Transformers", Caron et al., arXiv 2104.14294.
The grid of classifiers: "DINOv2", Oquab et al., arXiv 2304.07193.
"""

import argparse
import atexit
import csv
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image

# torchrun starts a process for each GPU. It sets the number of processes, and for each process its
# number and that of its GPU. A single process ignores the two: they may be left over from another
# run.
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PROCESS = 0
GPU = 0
if WORLD > 1:
    PROCESS = int(os.environ.get("RANK", "0"))
    GPU = int(os.environ.get("LOCAL_RANK", "0"))

# ============================================================================== 1. What is computed

# ---------------------------------------------------------------------------------------- the model

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)


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

    side: patches along a side of the images that it was trained on. registers: how many (positions
    are then resized as by SimDINOv2), or None (as by DINO). layerscale: whether the model has it.
    mean, std: of the pixels that the weights expect. prefix: of its names in the file.
    """

    def __init__(self, side, patch_size, embed_dim, depth, num_heads, registers, layerscale):
        super().__init__()
        self.side = side
        self.patch_size = patch_size
        self.width = embed_dim
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, embed_dim))
        self.register_tokens = None
        self.first_patch = 1  # the tokens are CLS, registers, patches
        if registers is not None:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
            self.first_patch = 1 + registers
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mean = MEAN
        self.std = STD
        self.prefix = ""
        self.autocast = nullcontext()  # main() sets torch.autocast for GPUs

    def normalize(self, x):
        """uint8 (B, 3, H, W) on any device -> float32 on the model's, as the weights expect it."""
        x = x.to(self.cls_token.device, non_blocking=True) / 255
        mean = torch.tensor(self.mean, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(3, 1, 1)
        return (x - mean) / std

    def position_embedding(self, h, w):
        """(1, 1 + h w, D) for h x w patches, interpolated from the grid of the training images."""
        if h == w == self.side:
            return self.pos_embed
        cls, grid = self.pos_embed.split([1, self.side**2], dim=1)
        grid = grid.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if self.register_tokens is None:  # as DINO; it adds 0.1 so that no size is rounded down
            factor = ((h + 0.1) / self.side, (w + 0.1) / self.side)
            grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        else:
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).mT], dim=1)

    def prepare_tokens(self, x):
        """(B, 3, H, W) -> (B, T, D): CLS token, registers, patch tokens. Registers have no position
        embedding."""
        h, w = x.shape[-2:]
        x = self.patch_embed(x).flatten(2).mT  # (B, N, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position_embedding(h // self.patch_size, w // self.patch_size)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def get_intermediate_layers(self, x, n=1):
        """A list: the normed tokens (B, T, D), CLS first, of each of the last n blocks."""
        x = self.prepare_tokens(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-n:]]

    def get_last_selfattention(self, x):
        """Attention weights (B, heads, T, T) of the last block; the first token is CLS."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, last.attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, T, D / heads)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


# ------------------------------------------------------------------------------------- the features


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


@torch.no_grad()
def encode(model, x):
    """uint8 (B, 3, H, W) -> (B, 5, D). Row 0 is the CLS token of the last block, row 1 its mean
    patch token, and rows 2 to 4 are the CLS tokens of the three blocks before it."""
    with model.autocast:
        layers = model.get_intermediate_layers(model.normalize(x), 4)
    cls = [tokens[:, 0] for tokens in layers]
    mean_patch = layers[-1][:, model.first_patch :].mean(1)
    return torch.stack([cls[-1], mean_patch, *cls[:-1]], dim=1).float()


@torch.no_grad()
def encode_patches(model, x):
    """uint8 (B, 3, H, W) -> (B, D, h, w): the patch tokens of the last block."""
    h, w = x.shape[-2:]
    with model.autocast:
        tokens = model.get_intermediate_layers(model.normalize(x))[0]
    patches = tokens[:, model.first_patch :].mT  # (B, D, h w)
    return patches.unflatten(2, (h // model.patch_size, w // model.patch_size)).float()


# --------------------------------------------------------------------------------------------- k-NN


@torch.no_grad()
def knn(bank, bank_labels, features, neighbours=(10, 20, 100, 200), temperature=0.07):
    """k-NN as in DINO: the k nearest rows of the bank vote with exp(cosine / temperature).

    bank (N, D), bank_labels (N,), features (n, D). Returns a dictionary from each k (or N if k is
    larger) to the predicted labels (n,); and, beside it, the cosine (n,) of each feature and its
    nearest row.
    """
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank.float(), dim=-1)
    neighbours = sorted({min(k, len(bank)) for k in neighbours})
    predictions = {k: [] for k in neighbours}
    nearest = []
    for z in F.normalize(features.float(), dim=-1).split(256):
        cosine, rows = (z @ bank.mT).topk(neighbours[-1])
        weight = (cosine / temperature).exp()
        for k in neighbours:
            votes = torch.zeros(len(z), classes, device=z.device)  # of each image, for each class
            votes.scatter_add_(1, bank_labels[rows[:, :k]], weight[:, :k])
            predictions[k].append(votes.argmax(1))
        nearest.append(cosine[:, 0])
    return {k: torch.cat(parts) for k, parts in predictions.items()}, torch.cat(nearest)


def accuracies(predicted, labels):
    """Top-1 accuracy, and the mean of the classes' accuracies, in %. predicted, labels: (n,)."""
    correct = (predicted == labels).double()
    class_sizes = labels.bincount()
    class_accuracies = labels.bincount(weights=correct) / class_sizes
    return {
        "top1": 100 * correct.mean().item(),
        "class_mean": 100 * class_accuracies[class_sizes > 0].mean().item(),
    }


# --------------------------------------------------------------------------------- the linear probe

KINDS = {  # which rows of encode a classifier sees
    "1 block": [0],
    "1 block + patches": [0, 1],
    "4 blocks": [0, 2, 3, 4],
    "4 blocks + patches": [0, 1, 2, 3, 4],
}
# Learning rates of DINOv2, for steps of 256 images
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
CANDIDATES = list(product(KINDS, RATES))


class Probe(nn.Module):
    """A linear classifier of the model's features for each of the CANDIDATES."""

    def __init__(self, model, classes):
        super().__init__()
        self.heads = nn.ModuleList()
        for kind, _ in CANDIDATES:
            self.heads.append(nn.Linear(len(KINDS[kind]) * model.width, classes))

    def scores(self, number, features):
        """The scores of candidate `number`: (B, 5, D) -> (B, classes)."""
        kind, _ = CANDIDATES[number]
        return self.heads[number](features[:, KINDS[kind]].flatten(1).float())

    def loss(self, number, features, labels):
        """The cross-entropy of candidate `number`, summed over the images with a label >= 0."""
        scores = self.scores(number, features)
        return F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")


def hold_out(labels, fewest, seed):
    """Split images into held-out ones, to choose the best candidate by, and training ones.

    Held out is a tenth, but at least `fewest` and at most 10,000, and never more than half. It may
    be fewer, as each class keeps an image to train on. labels: array (n,). Returns two arrays of
    indices. SystemExit if so few can be held out that the choice would be chance.
    """
    n = len(labels)
    wanted = min(max(n // 10, fewest), n // 2, 10000)
    order = np.random.default_rng(seed).permutation(n)
    # The first image of each class, in this order, is for training. Of the others, hold out some.
    _, firsts = np.unique(labels[order], return_index=True)
    held = np.delete(order, firsts)[:wanted]
    if len(held) < fewest / 5:
        sys.exit(f"of {n} images, only {len(held)} can be held out: too few to choose a classifier")
    return held, np.setdiff1d(order, held)


def choose(top1):
    """The number of the best candidate, by the accuracies of all on held-out images.

    With few images, one accuracy is noisy. So a candidate counts by the median of three: its own,
    and those at the next lower and the next higher rate, of the same kind. The lowest and the
    highest rate take the median of their neighbour. Among equals, its own accuracy decides.
    """
    top1 = np.reshape(top1, (len(KINDS), len(RATES)))
    lower = top1[:, :-2]
    own = top1[:, 1:-1]
    higher = top1[:, 2:]
    medians = np.median([lower, own, higher], axis=0)
    medians = np.pad(medians, ((0, 0), (1, 1)), mode="edge")  # those of the neighbours at both ends
    return max(range(top1.size), key=lambda number: (medians.flat[number], top1.flat[number]))


def items_of_steps(count, args, first_epoch):
    """Yields, for each step, a list of the items (epoch, image) that this process takes.

    An epoch's images, in random order, are cut into steps of --batch_size; the rest is left out.
    """
    size = min(args.batch_size, count)
    for epoch in range(first_epoch, args.epochs):
        order = np.random.default_rng((args.seed, epoch)).permutation(count)
        for start in range(0, count - size + 1, size):
            step = order[start : start + size]
            yield [(epoch, image) for image in step[PROCESS::WORLD].tolist()]


def fit(probe, rates, make_batches, count, args, run):
    """Train the classifiers probe.heads, each by SGD at its own rate, which falls along a cosine.

    make_batches(items_of_steps) yields features and labels of each step. count: how many images
    there are to train on. After each epoch, the state is saved in a file, from which the same run
    resumes.
    """
    torch.manual_seed(args.seed)
    for head in probe.heads:  # as in DINO
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    path = Path(args.output_dir, f"probe-{run['id']}-{count}.pth")
    size = min(args.batch_size, count)
    if size < WORLD:
        sys.exit(f"{count} images to train on are fewer than the {WORLD} processes")
    steps_per_epoch = count // size
    total = args.epochs * steps_per_epoch
    if total < 100:
        say(f"few steps for the classifiers, {total}: more --epochs may give better ones")
    groups = [{"params": head.parameters(), "lr": 0.0} for head in probe.heads]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    epoch = resume(path, probe, optimizer)
    step = epoch * steps_per_epoch
    batches = make_batches(items_of_steps(count, args, epoch))
    for features, labels in progress(batches, total - step, "training the probe: step"):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * size / 256 * (1 + math.cos(math.pi * step / total)) / 2
        optimizer.zero_grad()
        # One by one, as the scores of all may need much memory
        for number in range(len(probe.heads)):
            loss = probe.loss(number, features, labels) / size
            loss.backward()
        sum_over_processes([p.grad for p in probe.parameters()])
        optimizer.step()
        step += 1
        if step % steps_per_epoch == 0 and PROCESS == 0:
            state = {
                "epoch": step // steps_per_epoch,
                "probe": probe.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            write(path, partial(torch.save, state))


def sum_over_processes(gradients):
    """In place. As one tensor, because a call for each would take longer."""
    if WORLD > 1:
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)


def resume(path, probe, optimizer):
    """Load what fit saved, if anything. Returns how many epochs are done."""
    epoch = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        epoch = state["epoch"]
        say(f"resumed {path}: {epoch} epochs are done")
    if len(set(gather_values(epoch))) > 1:
        sys.exit(f"the processes find different files {path}: they have to share a disk")
    return epoch


# --------------------------------------------------------------------------- the segmentation probe

PATCH_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates for steps of 256 images


class PatchProbe(nn.Module):
    """For each of the PATCH_RATES, a linear classifier of patches, whose scores are interpolated.

    sample: patch tokens (B, D, h, w). Each channel is normalised by its mean and variance in this
    sample, which stay the same, so that no figure depends on how processes share the images.
    """

    def __init__(self, sample, classes):
        super().__init__()
        width = sample.shape[1]
        self.norm = nn.BatchNorm2d(width, affine=False, momentum=1.0)
        self.heads = nn.ModuleList()
        for _ in PATCH_RATES:
            self.heads.append(nn.Conv2d(width, classes, 1))
        self.to(sample.device)
        self.norm(sample)  # with momentum 1, it takes the statistics of this batch
        self.eval()  # and keeps them

    def scores(self, number, tokens, size):
        """The scores of candidate `number`: (B, D, h, w) -> (B, classes, *size)."""
        return F.interpolate(self.heads[number](self.norm(tokens)), size, mode="bilinear")

    def loss(self, number, tokens, masks):
        """The cross-entropy of candidate `number`, summed over all pixels with a class, divided by
        the pixels H W of an image. masks: (B, H, W), -1 for no class."""
        scores = self.scores(number, tokens, masks.shape[1:])
        loss = F.cross_entropy(scores, masks, ignore_index=-1, reduction="sum")
        return loss / masks[0].numel()


@torch.no_grad()
def confusion_matrices(probe, numbers, scenes, args, model):
    """Returns, for each of these candidates, a matrix (classes, classes): in row i and column j,
    how many pixels of class i were predicted to be j; and how many scenes had a pixel with a class.
    Each process takes its share of the scenes."""
    items = in_batches([(0, i) for i in range(PROCESS, len(scenes), WORLD)], args)
    batches = encoded_batches(encode_patches, model, scenes, args, items)
    n = len(scenes.classes)
    device = probe.norm.running_mean.device
    counts = torch.zeros(len(numbers), n, n, dtype=torch.double, device=device)
    judged = torch.zeros((), dtype=torch.long, device=device)
    for tokens, masks in progress(batches, len(items), f"{scenes.folder}: batch"):
        known = masks >= 0
        judged += known.flatten(1).any(1).sum()
        for number, count in zip(numbers, counts):
            predicted = probe.scores(number, tokens, masks.shape[1:]).argmax(1)
            pairs = n * masks[known] + predicted[known]  # a row and a column as one number
            count += pairs.bincount(minlength=n**2).view(n, n)
    if WORLD > 1:
        dist.all_reduce(counts)
        dist.all_reduce(judged)
    if not judged:
        sys.exit(f"no pixel in {scenes.folder} has a class, or no image can be read")
    if judged < len(scenes):
        say(f"{len(scenes) - judged} of {len(scenes)} images in {scenes.folder} are left out")
    return counts, judged.item()


def segmentation_scores(counts):
    """Of a confusion matrix, in %: mIoU over the classes that occur in masks or predictions, the
    accuracy of the pixels and its mean over the classes of the masks, and the IoU of each class,
    None if it does not occur."""
    hits = counts.diagonal()
    pixels = counts.sum(1)  # of each class
    iou = 100 * hits / (pixels + counts.sum(0) - hits)  # NaN: in no mask, nor predicted
    return {
        "miou": iou.nanmean().item(),
        "pixel_accuracy": 100 * (hits.sum() / pixels.sum()).item(),
        "class_mean": 100 * (hits / pixels).nanmean().item(),
        "iou": [None if math.isnan(value) else value for value in iou.tolist()],
    }


# =================================================================================== 2. The program

# -------------------------------------------------------------------------------------- the options


def parse_args(argv=None):
    """The options on the command line, or in argv."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s --weights FILE --data_path DIR [options]",
        description="Judge the weights of a vision transformer.\n\n"
        "    python %(prog)s --weights FILE --data_path /imagenet   # k-NN and linear probe\n"
        "    python %(prog)s --weights FILE --pictures OUT.png PHOTO",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def option(flag, default, text, **settings):
        if default is not None:
            settings.setdefault("type", type(default))
            text = f"{text} [{str(default).strip('[]')}]"  # a list has brackets already
        parser.add_argument(flag, default=default, help=text, **settings)

    home = os.path.expanduser  # a shell leaves the ~ of --weights=~/w.pth as it is
    weights = {"type": home, "required": True, "help": "the file to judge"}
    parser.add_argument("--weights", "--pretrained_weights", **weights)
    option("--checkpoint_key", "teacher", "which weights, if the file has several")
    option("--num_heads", None, "attention heads [those of a standard ViT of its width]", type=int)
    option("--mean", MEAN, "mean of the pixels that the weights expect", type=float, nargs=3)
    option("--std", STD, "standard deviation of these pixels", type=float, nargs=3)
    option("--data_path", None, "folder of train/ and val/; for --embed, of any images", type=home)
    option("--split", None, "folder in it to judge on [val, valid, validation or test]")
    option("--output_dir", "output_eval_linear", "folder for results and classifiers", type=home)
    option(
        "--crop_size", None, "side of the central crop [that of training, at most 224]", type=int
    )
    option("--epochs", 100, "passes of the probe over the training images; 0: k-NN alone")
    cached = "train the probe on the central crop of each image, not on random crops"
    parser.add_argument("--cached", action="store_true", help=cached)
    option("--batch_size", None, "images at a time, on all GPUs [256; to segment 16]", type=int)
    option(
        "--ignore_index",
        [255],
        "values in masks that are no class; of ADE20K 0",
        type=int,
        nargs="+",
    )
    option(
        "--amp",
        "auto",
        "for GPUs. auto: bf16, or fp16 if the GPU has no bf16; off: float32, as auto on a CPU",
        choices=("auto", "bf16", "fp16", "off"),
    )
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    option("--num_workers", min(10, cores), "data-loading workers per GPU")
    option("--seed", 0, "seed of all that is random")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--segment",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="segmentation by patch tokens, on images and masks resized to H W pixels; the mask of "
        "train/a/1.jpg is train_masks/a/1.png, with the number of a class in each pixel",
    )
    modes.add_argument(
        "--embed",
        type=home,
        metavar="OUT.npz",
        help="write features (CLS token of the last block), names and labels of all images",
    )
    modes.add_argument(
        "--pictures",
        type=home,
        nargs="+",
        metavar=("OUT.png", "IMAGE"),
        help="draw attention and patch features of images [the first 8 in --data_path]",
    )
    modes.add_argument("--export", type=home, metavar="OUT.pth", help="write weights for timm")

    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 16 if args.segment else 256
    names_images = args.pictures and len(args.pictures) > 1
    if not (args.data_path or args.export or names_images):
        parser.error("--data_path is needed")
    if args.batch_size < WORLD:
        parser.error(f"--batch_size must be at least {WORLD}, the number of processes")
    if args.epochs < 0 or (args.segment and args.epochs == 0):
        parser.error("--epochs: 0 (k-NN alone) or more; with --segment, 1 or more")
    return args


def main():
    """Read the weights, then do what the options ask for."""
    args = parse_args()
    device = start_process()
    model, left_out = load_backbone(args.weights, args.checkpoint_key, args.num_heads)
    model.to(device)
    model.mean = args.mean
    model.std = args.std
    patch = model.patch_size
    heads = "as given"
    if args.num_heads is None:
        heads = "usual for the width, or see --num_heads"
        args.num_heads = model.blocks[0].attn.num_heads  # for the results
    say(f"{args.weights}: takes the tensors {model.prefix}* but {', '.join(left_out) or 'none'}")
    say(
        f"{model.width} wide, {len(model.blocks)} blocks, {args.num_heads} heads ({heads}), "
        f"{model.side} x {model.side} patches of {patch} pixels, "
        f"{model.first_patch - 1} registers, pixels of mean {args.mean} and std {args.std}"
    )
    if args.crop_size is None:
        args.crop_size = min(224 // patch, model.side) * patch
    check_sides(args, patch)
    if args.amp == "auto":
        args.amp = "off"
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.amp = "bf16" if has_bf16 else "fp16"
    if args.amp != "off":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        model.autocast = torch.autocast(device.type, dtype)

    if args.export:
        export(args, model)
    elif args.pictures:
        draw(args, model)
    elif args.embed:
        write_features(args, model)
    elif args.segment:
        segment(args, model)
    else:
        classify(args, model)
    end_process()


def check_sides(args, patch):
    """SystemExit if the images that the model is to see do not fit it."""
    name = "--crop_size"
    sides = [args.crop_size]
    if args.segment:
        name = "--segment"
        sides = args.segment
    if min(sides) < patch or any(side % patch for side in sides):
        sys.exit(f"{name}: {sides} are not multiples of the patch, {patch}")
    if min(sides) > 1024:  # of the smaller side: see load_image
        sys.exit(f"{name}: at most 1024, as larger JPEG files are read at that size")


# ------------------------------------------------------------------------ k-NN and the linear probe


def classify(args, model):
    """k-NN and the linear probe, on images in class folders."""
    train_images, val_images, classes = open_splits(args)
    folders = [(images.root, images.names) for images in (train_images, val_images)]
    run = identify_run(args, model, folders)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train = extract(train_images, model, args)
    val = extract(val_images, model, args)
    knn_labels, nearest = knn(train.features[:, 0], train.labels, val.features[:, 0])
    results = {
        "judged": val.root,
        "classes": len(classes),
        "images": {"train": len(train.names), "val": len(val.names)},
        "features_of_train": int((nearest > 1 - 1e-5).sum()),
        "knn": {k: accuracies(predicted, val.labels) for k, predicted in knn_labels.items()},
    }
    for k, figures in results["knn"].items():
        say(f"k-NN with k = {k} on {val.root}: {in_words(figures)}")
    if results["features_of_train"]:
        say(
            f"{results['features_of_train']} of {len(val.names)} images to judge on have the "
            "features of a training image: if they are copies of it, all accuracies are too high"
        )
    k = min(20, max(knn_labels))  # DINO's k; all, if there are fewer
    predictions = {"knn": knn_labels[k]}
    if args.epochs:
        results["probe"], predictions["probe"] = linear_probe(train, val, classes, args, model, run)
    write_predictions(args, run, val, classes, predictions)
    write_results(args, run, results)


def linear_probe(train, val, classes, args, model, run):
    """Train all candidates, choose one. Returns its figures, and the labels it predicts on val."""
    n = len(train.names)
    held, rest = hold_out(train.labels.cpu().numpy(), 100, args.seed)
    held_features = train.features[held]
    held_labels = train.labels[held]
    if not args.cached:
        train.features = None  # they are large, and not needed again
    probe = train_probe(train, rest, classes, args, model, run)
    held_out = {}
    for number, (kind, rate) in enumerate(CANDIDATES):
        predicted = probe.scores(number, held_features).argmax(1)
        held_out[f"{kind}, lr {rate:g}"] = accuracies(predicted, held_labels)
    best = choose([figures["top1"] for figures in held_out.values()])
    name = list(held_out)[best]
    say(f"the best of {len(held_out)} classifiers on {len(held)} held-out images: {name}")
    if CANDIDATES[best][1] == RATES[-1]:
        say("its learning rate is the highest: more --epochs may give a better one")
    if n < 1000:  # up to half was held out: train once more, also on these
        probe = train_probe(train, np.arange(n), classes, args, model, run)

    scores = probe.scores(best, val.features).detach()
    predicted = scores.argmax(1)
    figures = accuracies(predicted, val.labels)
    if len(classes) > 5:
        is_label = scores.topk(5).indices == val.labels[:, None]
        figures["top5"] = 100 * is_label.any(1).double().mean().item()
    say(f"linear probe on {val.root}: {in_words(figures)}")
    head = probe.heads[best]
    features = f"encode(model, images)[:, {KINDS[CANDIDATES[best][0]]}].flatten(1)"
    write_classifier(args, run, head.weight, head.bias, classes, features)
    return figures | {"best": name, "held_out": held_out}, predicted


def train_probe(train, chosen, classes, args, model, run):
    """A Probe, trained on the images whose numbers are chosen."""
    probe = Probe(model, len(classes)).to(model.cls_token.device)
    if args.cached:
        make_batches = partial(cached_batches, train, chosen)
    else:
        crop = v2.RandomResizedCrop(args.crop_size, interpolation=InterpolationMode.BICUBIC)
        crop = v2.Compose([crop, v2.RandomHorizontalFlip()])
        labels = train.labels[chosen].tolist()
        images = Images(train.root, train.names[chosen], labels, crop, args.seed)
        make_batches = partial(encoded_batches, encode, model, images, args)
    fit(probe, [rate for _, rate in CANDIDATES], make_batches, len(chosen), args, run)
    return probe


def write_predictions(args, run, val, classes, predictions):
    """The file of predictions: for each image its name, its class, and what k-NN and probe gave."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "class", *predictions])
    labels = torch.stack([val.labels, *predictions.values()], dim=1).tolist()
    for name, numbers in zip(val.names, labels):
        writer.writerow([name, *(classes[number] for number in numbers)])
    if PROCESS == 0:
        content = text.getvalue().encode(errors="surrogateescape")
        write(
            Path(args.output_dir, f"predictions-{run['id']}.csv"), lambda file: file.write(content)
        )


def in_words(figures):
    """The text for the terminal of a dictionary of figures in %."""
    return ", ".join(f"{name} {value:.2f} %" for name, value in figures.items())


# ------------------------------------------------------------------------------------- segmentation


def segment(args, model):
    """--segment: the linear probe of patch tokens, on images with masks."""
    train, choosing, val = open_scenes(args)
    run = identify_run(args, model, train.folders() + choosing.folders() + val.folders())
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    # Up to sixteen images from all over the folder, as neighbours may be alike
    some = [(0, i) for i in np.linspace(0, len(train) - 1, min(16, len(train)), dtype=int)]
    sample, masks = next(encoded_batches(encode_patches, model, train, args, [some]))
    sample = sample[(masks >= 0).flatten(1).any(1)]  # without those that are left out
    if not len(sample):
        sys.exit(f"of {len(some)} images in {train.folder}, none can be used")
    if not sample.isfinite().all():
        sys.exit("the features are not finite: see --amp, --std, --weights")
    probe = PatchProbe(sample, len(train.classes))
    make_batches = partial(encoded_batches, encode_patches, model, train, args)
    fit(probe, PATCH_RATES, make_batches, len(train), args, run)

    numbers = range(len(PATCH_RATES))
    held_out = {}
    matrices, _ = confusion_matrices(probe, numbers, choosing, args, model)
    for rate, counts in zip(PATCH_RATES, matrices):
        held_out[f"lr {rate:g}"] = segmentation_scores(counts)["miou"]
    say(f"mIoU on {len(choosing)} held-out images: {in_words(held_out)}")
    best = int(np.argmax(list(held_out.values())))
    name = list(held_out)[best]
    matrices, judged = confusion_matrices(probe, [best], val, args, model)
    figures = segmentation_scores(matrices[0])
    iou = dict(zip(val.classes.tolist(), figures.pop("iou")))
    say(f"{name} on {val.folder}: {in_words(figures)}")
    # The classifier of normalised tokens, W (x - mean) / std + b, as one of the tokens x
    norm = probe.norm
    weight = probe.heads[best].weight / (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
    bias = probe.heads[best].bias - weight.flatten(1) @ norm.running_mean
    features = "encode_patches(model, images); weight and bias are those of F.conv2d"
    write_classifier(args, run, weight, bias, list(iou), features)
    results = {
        "judged": str(val.folder),
        "classes": len(iou),
        "images": {"train": len(train) + len(choosing), "val": judged},
        "segmentation": figures | {"iou": iou, "best": name, "held_out_miou": held_out},
    }
    write_results(args, run, results)


# -------------------------------------------------------------------- features, pictures and export


def write_features(args, model):
    """--embed: write the features, names and labels of all images below --data_path."""
    check_new(args.embed)
    root = Path(args.data_path)
    names, _ = find_images(root)
    if not names:
        sys.exit(f"no images in {root}")
    identify_run(args, model, [(root, names)])  # an error here if the processes find different ones
    any_labels = [0] * len(names)  # extract leaves out images without a label
    images = Images(root, names, any_labels, partial(center_crop, size=args.crop_size))
    found = extract(images, model, args)
    features = found.features[:, 0].float().cpu().numpy()
    if PROCESS == 0:
        columns = {"names": found.names, "labels": labels_of(found.names)}
        write(args.embed, partial(np.savez, features=features, **columns))
    say(f"{args.embed}: features {features.shape}, CLS tokens of the last block; names; labels")


def labels_of(names):
    """The first folder of each name or, if all of these are splits, the second; "" for none."""
    folders = [Path(name).parts[:-1] for name in names]
    first_folders = {parts[0] for parts in folders if parts}
    if first_folders <= {"train", *SPLITS}:
        folders = [parts[1:] for parts in folders]
    return [parts[0] if parts else "" for parts in folders]


@torch.no_grad()
def draw(args, model):
    """--pictures: a row for each image: the image; the attention of CLS to the patches in the last
    block, head by head; and, as red, green and blue, the first three principal components of the
    patch features of all images."""
    out, *paths = args.pictures
    check_new(out)
    if not paths:
        root = Path(args.data_path)
        paths = [root / name for name in find_images(root)[0][:8]]
        if not paths:
            sys.exit(f"no images in {root}")
    images = []
    attention = []
    patches = []
    for path in paths:
        image = center_crop(load_image(path), args.crop_size)[None]
        weights = model.get_last_selfattention(model.normalize(image))  # (1, heads, T, T)
        images.append(image[0])
        attention.append(weights[0, :, 0, model.first_patch :].cpu())  # (heads, N), from CLS
        patches.append(encode_patches(model, image)[0].flatten(1).mT.cpu())  # (N, D)
    if not torch.cat(patches).isfinite().all():
        sys.exit("the features are not finite: see --amp, --std, --weights")
    colors = principal_components(torch.cat(patches)).split(len(patches[0]))
    tiles = []
    for image, heads, color in zip(images, attention, colors):
        light = (heads / heads.quantile(0.98, dim=1, keepdim=True)).clamp(0, 1)
        tiles.append(as_tile(image / 255, InterpolationMode.BICUBIC))
        for values in light:  # (N,), as gray
            tiles.append(as_tile(values.expand(3, -1)))
        tiles.append(as_tile(color.mT))
    grid = make_grid(tiles, nrow=len(tiles) // len(images), padding=4, pad_value=1)
    if PROCESS == 0:
        write(out, partial(save_image, grid, format="png"))
    say(f"{out}: image, attention of {len(attention[0])} heads, patch features as colours")


def principal_components(patches):
    """(N, D) -> (N, 3): the first three principal components, each squeezed into 0 to 1."""
    centered = patches.double() - patches.double().mean(0)
    _, directions = torch.linalg.eigh(centered.mT @ centered)  # in ascending order
    components = centered @ directions[:, -3:].flip(1)
    return (components / components.std(0, correction=0)).nan_to_num().sigmoid().float()


def as_tile(image, interpolation=InterpolationMode.NEAREST):
    """(3, H, W), or the (3, N) of a square of N patches -> (3, 168, 168)."""
    if image.ndim == 2:
        side = math.isqrt(image.shape[1])
        image = image.unflatten(1, (side, side))
    return TF.resize(image, [168, 168], interpolation, antialias=True)


def export(args, model):
    """--export: write the weights as timm names them; print the code that loads them there."""
    check_new(args.export)
    state = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    options = {
        "img_size": model.side * model.patch_size,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "num_classes": 0,
    }
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1
    if "register_tokens" in state:
        registers = state.pop("register_tokens")
        if registers.numel():
            state["reg_token"] = registers
        # timm then gives no position to CLS, so it is added to CLS here.
        first, state["pos_embed"] = state["pos_embed"].tensor_split([1], dim=1)
        state["cls_token"] = state["cls_token"] + first
        options["reg_tokens"] = registers.shape[1]
        options["no_embed_class"] = True
    if PROCESS == 0:
        write(args.export, partial(torch.save, state))
    arguments = ", ".join(f"{name}={value}" for name, value in options.items())
    load = f'model.load_state_dict(torch.load("{args.export}", weights_only=True), strict=True)'
    say(f"{args.export}: weights for timm, which loads them by")
    say(f"import timm, torch; model = timm.models.VisionTransformer({arguments}); {load}")


# ========================================================================== 3. The helpers of both

# ------------------------------------------------------------------------------------ the processes


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


def progress(items, total, text):
    """Yields the items; says how many are done: on a terminal often, elsewhere once a minute."""
    started = time.monotonic()
    last_line = started
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last_line > (0.1 if os.isatty(1) else 60):
            left = timedelta(seconds=int((now - started) / done * (total - done)))
            say(f"{text} {done}/{total} ETA {left}", passing=True)
            last_line = now


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


def find_splits(args):
    """The folder to train on, and the one to judge on."""
    root = Path(args.data_path)
    train = root / "train"
    choices = [args.split] if args.split else SPLITS
    found = [root / name for name in choices if (root / name).is_dir()]
    if not (train.is_dir() and found):
        sys.exit(f"{root} must have the folders train and {' or '.join(choices)}")
    if found[0].samefile(train):
        sys.exit(f"{found[0]} is the folder to train on")
    return train, found[0]


def open_splits(args):
    """The images to train on, those to judge on, and the classes: the class folders of train/."""
    train, val = find_splits(args)
    names, folders = find_images(train)
    val_names, val_folders = find_images(val)
    classes = sorted(set(folders) - {""})
    if len(classes) < 2:
        sys.exit(f"{train} has fewer than two class folders with images")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of.get(name, -1) for name in folders]
    val_labels = [label_of.get(name, -1) for name in val_folders]
    if max(val_labels, default=-1) < 0:
        sys.exit(f"no image in {val} has a class of {train}")
    if args.epochs:
        known = np.array([label for label in labels if label >= 0])
        hold_out(known, 100, args.seed)  # ends here if they are too few
    crop = partial(center_crop, size=args.crop_size)
    return Images(train, names, labels, crop), Images(val, val_names, val_labels, crop), classes


def in_batches(items, args):
    """The items of this process, a list, cut into batches."""
    size = math.ceil(args.batch_size / WORLD)
    return [items[start : start + size] for start in range(0, len(items), size)]


def encoded_batches(encoder, model, images, args, item_lists):
    """Yields features and labels of each of these lists of items of images. encoder: encode, or
    encode_patches, which gives labels of pixels."""
    options = choose_loader_options(args, model.cls_token.device)
    for x, y in DataLoader(images, batch_sampler=item_lists, **options):
        features = encoder(model, x)
        yield features, y.to(features.device, non_blocking=True)


def cached_batches(train, chosen, item_lists):
    """As encoded_batches, but of features that are there. In an item (epoch, i), i is for the image
    chosen[i] of train."""
    for items in item_lists:
        places = [place for _, place in items]
        rows = torch.from_numpy(chosen[places]).to(train.features.device)
        yield train.features[rows], train.labels[rows]


@torch.no_grad()
def extract(images, model, args):
    """Of the images that can be read and have a label, on all processes: names, labels (n,), and
    features of encode (n, 5, D), or (n, 1, D) if there is no probe."""
    if len(model.blocks) < 4:
        sys.exit("a model of fewer than 4 blocks cannot be judged")
    n = len(images)
    # A process takes a share of the rows of features. The others leave 0 there, so the sum over
    # processes is the whole. The last rows are the first images again, and are cut off at the end.
    share = math.ceil(n / WORLD)
    first = PROCESS * share
    items = in_batches([(0, i % n) for i in range(first, first + share)], args)
    batches = encoded_batches(encode, model, images, args, items)
    kept_rows = 5 if args.epochs and not args.embed else 1
    dtype = torch.float32 if args.amp == "off" else torch.float16
    device = model.cls_token.device
    # Room for all from the start, as they may not fit in memory twice
    features = torch.zeros(WORLD * share, kept_rows, model.width, dtype=dtype, device=device)
    labels = torch.zeros(WORLD * share, dtype=torch.long, device=device)
    row = first  # where the next features go
    for z, y in progress(batches, len(items), f"{images.root}: batch"):
        z = z[:, :kept_rows].to(dtype)
        if not z.isfinite().all():
            sys.exit("the features are not finite: see --amp, --std, --weights")
        features[row : row + len(z)] = z
        labels[row : row + len(z)] = y
        row += len(z)
    if WORLD > 1:
        dist.all_reduce(features)
        dist.all_reduce(labels)
    features = features[:n]
    labels = labels[:n]
    names = images.names
    kept = labels >= 0
    if not kept.all():
        left_out = n - int(kept.sum())
        reason = "cannot be read" if args.embed else "cannot be read, or have no class of train/"
        say(f"{left_out} of {n} images in {images.root} are left out, as they {reason}")
        features = features[kept]
        labels = labels[kept]
        names = names[kept.cpu().numpy()]
    if not len(names):
        sys.exit(f"no image in {images.root} is left")
    return SimpleNamespace(root=images.root, names=names, labels=labels, features=features)


# ----------------------------------------------------------------------------- images with masks


def mask_path(folder, name):
    """The mask of train/a/1.jpg is train_masks/a/1.png."""
    return Path(f"{folder}_masks", mask_name(name))


def mask_name(name):
    return str(Path(name).with_suffix(".png"))


def load_mask(path):
    """A grayscale or palette image, whose pixels are numbers of classes -> array (H, W)."""
    with Image.open(path) as image:
        if image.mode == "L" and ";" in str(image.tile):  # as "L;4" for 4 bits
            raise ValueError(f"{path} has not 8 bits, and Pillow would scale its numbers")
        mask = np.array(image).astype(int)
    if mask.ndim != 2:
        raise ValueError(f"{path} has colours, not the number of a class in each pixel")
    return mask


def find_classes(folder, names, ignored):
    """A dictionary: each value of the masks that is not ignored, and a mask that has it."""
    if len({mask_name(name) for name in names}) < len(names):
        sys.exit(f"two images in {folder} have the same mask")
    found = {}
    own = names[PROCESS::WORLD]
    for name in progress(own, len(own), f"masks of {folder}:"):
        path = mask_path(folder, name)
        for value in np.unique(load_mask(path)).tolist():
            found.setdefault(value, str(path))
    merged = {}
    for part in gather_values(found):
        merged |= part
    return {value: path for value, path in merged.items() if value not in ignored}


class Scenes(Dataset):
    """Item (epoch, i) is scene i: image (3, H, W), and mask (H, W) of indices in classes.

    classes: sorted values of masks. The index is -1 where the mask has another value, and
    everywhere if the image is left out (see load). flip: mirror half of the scenes, drawn from
    (seed, epoch, i).
    """

    def __init__(self, folder, names, size, classes, seed=0, flip=False):
        self.folder = str(folder)
        self.names = names
        self.size = size
        self.classes = np.array(classes)
        self.seed = seed
        self.flip = flip

    def __len__(self):
        return len(self.names)

    def folders(self):
        """Of images and of masks: the folder, and the names of all files in it."""
        masks = [mask_name(name) for name in self.names]
        return [(self.folder, self.names), (f"{self.folder}_masks", masks)]

    def __getitem__(self, item):
        epoch, index = item
        try:
            image, mask = self.load(self.names[index])
        except OSError as error:
            warnings.warn(f"left out: {error}", stacklevel=1)
            return torch.zeros(3, *self.size, dtype=torch.uint8), torch.full(self.size, -1)
        # The place of each value in classes, or -1 where it is not there
        indices = np.searchsorted(self.classes, mask).clip(max=len(self.classes) - 1)
        indices[self.classes[indices] != mask] = -1
        mask = torch.from_numpy(indices)[None]
        image = TF.resize(image, self.size, InterpolationMode.BICUBIC, antialias=True)
        mask = TF.resize(mask, self.size, InterpolationMode.NEAREST_EXACT)[0]
        torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
            mask = mask.flip(-1)
        return image, mask

    def load(self, name):
        """An image, and its mask. OSError if the image cannot be read, or may show something else
        than the mask: if it is turned by its EXIF data, or has another aspect."""
        mask = load_mask(mask_path(self.folder, name))
        path = os.path.join(self.folder, name)
        image = load_image(path)
        with Image.open(path) as file:
            if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                raise OSError(f"{path} is turned by its EXIF data, and its mask may not be")
        height, width = image.shape[1:]
        mask_height, mask_width = mask.shape
        if not 0.95 < (height / width) / (mask_height / mask_width) < 1.05:
            raise OSError(
                f"{name} in {self.folder} has {height} x {width} pixels, "
                f"its mask {mask_height} x {mask_width}"
            )
        return image, mask


def open_scenes(args):
    """The Scenes to train on, those to choose the best candidate by, and those to judge on."""
    train, val = find_splits(args)
    names = np.array(find_images(train)[0])
    val_names = np.array(find_images(val)[0])
    classes = sorted(find_classes(train, names, args.ignore_index))
    masks_with = find_classes(val, val_names, args.ignore_index)
    for value, path in masks_with.items():
        if value not in classes:
            sys.exit(f"{path} has the value {value}, no class of train/: see --ignore_index")
    if len(classes) < 2 or not masks_with:
        sys.exit(f"classes in train: {classes}, in {val.name}: {list(masks_with)}: too few")
    size = args.segment
    held, rest = hold_out(np.zeros(len(names)), 10, args.seed)  # 10 are enough, of many pixels each
    say(
        f"{len(rest)} images to train on, {len(held)} to choose by, {len(val_names)} to judge on; "
        f"{len(classes)} classes: {classes}, no class: {args.ignore_index}; images and masks are "
        f"resized to {size[0]} x {size[1]}"
    )
    return (
        Scenes(train, names[rest], size, classes, args.seed, flip=True),
        Scenes(train, names[held], size, classes),
        Scenes(val, val_names, size, classes),
    )


# ------------------------------------------------------------------------------ weights from a file

# Official checkpoints also hold options (a Namespace) and NumPy's numbers. torch.load may rebuild
# these types, and no others.
SCALAR = np.float64(0).__reduce__()[0]  # rebuilds it; NumPy 1 and 2 pickle it by different names
SAFE = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE += [argparse.Namespace, np.dtype]
SAFE += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
HEADS_OF = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16}  # width: heads, of our and DINO's ViTs
PATCHES = "patch_embed.proj.weight"  # the name by which a vision transformer is found


def tensors_in(tree, name=""):
    """Yields (name, tensor) of nested dictionaries, the name with a dot for each level."""
    if torch.is_tensor(tree):
        yield name, tree
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def read_tensors(path):
    """All tensors in a .pth or .safetensors file by name; no code in it is run."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    # torch.load does not compare the checksums.
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        sys.exit(f"{path} is damaged")
    try:
        with torch.serialization.safe_globals(SAFE):
            return dict(tensors_in(torch.load(path, map_location="cpu", weights_only=True)))
    except pickle.UnpicklingError as error:
        code = re.search("GLOBAL ([^ ]+)", str(error))
        if not code:
            sys.exit(f"{path} is damaged, or no file of weights")
        sys.exit(
            f"{path} needs code, {code[1]}, which is not run. If you trust it, open it by "
            f"torch.load('{path}', weights_only=False), and save its tensors alone"
        )


def find_prefix(path, names, key):
    """What the names of the chosen model begin with: for the key teacher, for example, "teacher.",
    "teacher.backbone." or "teacher_backbone."; "" if the file has nothing but one model."""
    prefixes = [name.removesuffix(PATCHES) for name in names if f".{name}".endswith(f".{PATCHES}")]
    chosen = [prefix for prefix in prefixes if key in prefix.split(".")]  # teacher.backbone.
    if not chosen:
        chosen = [prefix for prefix in prefixes if key in prefix]  # teacher_backbone.
    if not chosen and key == "teacher":  # the default: any name, if there is one model
        chosen = prefixes
    if len(chosen) != 1:
        has = f"{PATCHES} under {prefixes}" if prefixes else f"no {PATCHES}, but {[*names][:5]}"
        sys.exit(f"{path}: --checkpoint_key {key} finds {len(chosen)} models; it has {has}")
    return chosen[0]


def rename(found, prefix):
    """The tensors whose names begin with prefix, by the names of VisionTransformer; and the names
    of those that it does not have."""
    tensors = {}
    left_out = []
    for name, tensor in found.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix).replace("_orig_mod.", "")  # of torch.compile
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # blocks.0.3. in chunks
        if name == "reg_token":  # of timm
            name = "register_tokens"
        if name.startswith(("head.", "mask_token")):
            left_out.append(name)
        else:
            tensors[name] = tensor
    return tensors, left_out


def load_backbone(path, key="teacher", num_heads=None):
    """The VisionTransformer in path, in eval mode, and the names of what was left out.

    path: a plain ViT of simdino.py, simdinov2.py, official SimDINO(v2), DINO(v2) or timm; .pth or
    .safetensors. key: if the file has several, (a part of) the name of those to take. num_heads
    cannot be read off the tensors: by default that of the standard ViT of this width. SystemExit
    if there is not one such ViT, RuntimeError with the names of tensors for another architecture.
    """
    found = read_tensors(path)
    prefix = find_prefix(path, found, key)
    tensors, left_out = rename(found, prefix)
    layerscale = "blocks.0.ls1.gamma" in tensors
    side = 0
    if "pos_embed" in tensors:
        positions = tensors["pos_embed"].shape[1]
        side = math.isqrt(positions)
        if positions == side**2:  # in timm's models with registers, CLS has no position
            tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    registers = None
    if "register_tokens" in tensors:
        registers = tensors["register_tokens"].shape[1]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            sys.exit(f"{path}: {name} is of {tensor.dtype}: quantised weights cannot be read")
    width, _, _, patch_size = tensors[PATCHES].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if num_heads is None:
        num_heads = HEADS_OF.get(width, 0)
    if num_heads < 1 or width % num_heads:
        sys.exit(f"{path}: give --num_heads, a divisor of the width, {width}")
    model = VisionTransformer(side, patch_size, width, depth, num_heads, registers, layerscale)
    model.load_state_dict(tensors)
    model.prefix = prefix
    return model.eval().requires_grad_(False), left_out


# --------------------------------------------------------------------------- files that are written


def identify_run(args, model, folders):
    """What the figures depend on: the options, and hashes of the weights and of the files. The id
    is a hash of all this. folders: pairs of a folder and the names of files in it."""
    weights = hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    no_effect = ("weights", "data_path", "output_dir", "num_workers")
    run = {
        "options": {name: value for name, value in vars(args).items() if name not in no_effect},
        "weights_hash": weights.hexdigest()[:16],
        "data_hash": "-".join(hash_files(folder, names) for folder, names in folders),
    }
    run["id"] = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:8]
    if len(set(gather_values(run["id"]))) > 1:
        sys.exit("the processes find different weights or images: they have to share a disk")
    return run


def write_classifier(args, run, weight, bias, classes, features):
    """The file of the classifier: weight (classes, width), bias. features: text, what it sees."""
    if not weight.isfinite().all():
        sys.exit("the classifier is not finite: see --amp, --std, --weights")
    if PROCESS == 0:
        content = {"weight": weight.detach().cpu(), "bias": bias.detach().cpu()}
        content |= {"classes": classes, "features": features}
        path = Path(args.output_dir, f"classifier-{run['id']}.pth")
        write(path, partial(torch.save, content))


def write_results(args, run, results):
    """Append a line to results.jsonl, and delete the states of the probe: it is finished."""
    entry = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "weights": args.weights, **results, **run}
    if PROCESS == 0:
        path = Path(args.output_dir, "results.jsonl")
        line = json.dumps(entry) + "\n"
        if path.exists() and path.read_text()[-1:] not in ("", "\n"):  # half a line: a full disk
            line = "\n" + line
        with path.open("a") as file:
            file.write(line)
        for state in Path(args.output_dir).glob(f"probe-{run['id']}-*.pth"):
            state.unlink()
    say(f"results are in {args.output_dir}, with the id {run['id']}")


def check_new(path):
    """SystemExit if path exists already, or its folder does not."""
    if PROCESS == 0 and os.path.lexists(path):
        sys.exit(f"{path} exists already: delete it, or give another name")
    if not Path(path).absolute().parent.is_dir():
        sys.exit(f"there is no folder for {path}")


def write(path, save):
    """save(file), to a temporary file that is then renamed: path is never half written."""
    partial_path = Path(f"{path}.partial{os.getpid()}")
    content = io.BytesIO()
    save(content)
    try:
        with partial_path.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
