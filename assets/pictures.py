"""The pictures of README.md, but features.png: PYTHONPATH=. python assets/pictures.py NAME ...

views and patterns need nothing; gamma, worlds, dino and robust read the runs of measure.sh. Needs
matplotlib.
"""

import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import cbook
from PIL import Image

import simdino

BLUE, ORANGE, RED, GRAY = "#0072b2", "#e69f00", "#d55e00", "#777777"
SIDES = {"axes.spines.top": False, "axes.spines.right": False}
plt.rcParams.update({"font.size": 14, "lines.linewidth": 2, "legend.frameon": False, **SIDES})


def log_of(run):
    return [json.loads(line) for line in open(f"runs/{run}/log.txt")]


def last(runs, key="knn"):
    """The last value of runs/<name>, for each name."""
    return [log_of(run)[-1][key] for run in runs]


def views():
    """A photograph's views, and the pairs of them that comp is the mean of."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:  # US Navy, public domain
        photo = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    torch.manual_seed(3)
    crops = [crop[None] for crop in simdino.MultiCrop(local_crops=6)(photo)]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (simdino.MEAN, simdino.STD))
    shown = [(x[0] * std + mean).clamp(0, 1).permute(1, 2, 0) for x in simdino.augment(crops)]
    figure, axes = plt.subplots(3, 9, figsize=(9, 3.2), layout="constrained")
    for i, axis in enumerate(axes.flat):
        row, column = divmod(i, 9)
        axis.set_axis_off()
        if row == 0 and column > 0:
            axis.imshow(shown[column - 1])
            axis.set_title(f"global {column}" if column < 3 else f"local {column - 2}", size=12)
        elif column == 0 and row > 0:
            axis.imshow(shown[row - 1])
        elif row:
            same = row == column
            size, color = (14, GRAY) if same else (30, BLUE)
            text = "same\ncrop" if same else "•"
            axis.text(0.5, 0.5, text, size=size, color=color, ha="center", va="center")
    axes[0, 0].text(0.5, 0.5, "student →\nteacher ↓", size=13, ha="center", va="center")
    return figure


def patterns():
    """The built-in data: an image of each of the ten kinds."""
    names = "stripes, checks, discs, rings, squares, zigzags, bricks, weave, triangles, scallops"
    figure, axes = plt.subplots(2, 5, figsize=(8, 3.9), layout="constrained")
    for kind, (name, axis) in enumerate(zip(names.split(", "), axes.flat)):
        image = simdino.draw_pattern(kind, np.random.default_rng((False, kind, 0)))
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, size=15)
        axis.set_axis_off()
    return figure


def gamma():
    """The built-in run, with and without R."""
    titles = {"knn": "k-NN, %", "train_comp_loss": "comp: cosine of two views"}
    titles |= {"train_expa_loss": "expa: γ·R", "rank": "rank"}
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.5), layout="constrained")
    for run, color, label in ("default", BLUE, "default"), ("gamma0", RED, "--gamma 0"):
        for axis, (key, title) in zip(axes.flat, titles.items()):
            points = [(x["epoch"] + 1, x[key]) for x in log_of(run) if x[key] is not None]
            axis.plot(*zip(*points), "o-", color=color, label=label)
            axis.set_title(title, size=14)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    axes[0, 0].axhline(34.2, color=GRAY, linestyle=":", linewidth=1)
    axes[0, 0].text(8, 35.5, "raw pixels", size=11, color=GRAY, ha="right")
    axes[0, 1].legend()
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    return figure


def worlds():
    """The loss of the same steps on 1, 2 and 4 processes."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.9), sharey=True, layout="constrained")
    for name, title, axis in zip(("world", "official"), ("here", "official loss"), axes):
        for world, style, color in (1, "-", BLUE), (2, "--", ORANGE), (4, ":", RED):
            state = torch.load(f"runs/{name}-{world}/checkpoint.pth", weights_only=True)
            loss = np.array([row[0] for row in state["metrics"]])
            if world == 1:
                alone = loss
            print(name, world, "processes: differs by", abs(loss - alone).max())
            axis.plot(range(1, len(loss) + 1), loss, style, color=color, label=f"{world}")
        axis.set_title(title)
        axis.set_xlabel("step of 64 images")
    axes[0].legend(title="processes")
    axes[0].set_ylabel("loss")
    return figure


def dino():
    """k-NN after two budgets, three seeds each."""
    figure, axis = plt.subplots(figsize=(8, 3.9), layout="constrained")
    for run, label, color in (
        ("simdino", "SimDINO", BLUE),
        ("dino", "DINO, best of 7 settings", RED),
    ):
        knn = np.array([last(f"{run}-{epochs}-{seed}" for seed in range(3)) for epochs in (5, 15)])
        print(run, knn.tolist())
        axis.plot((390, 1170), knn.mean(1), color=color, label=label)
        axis.plot((390, 1170), knn, "o", color=color)
    for value, text in (39.2, "raw pixels"), (27.2, "random weights"):
        axis.axhline(value, color=GRAY, linestyle=":", linewidth=1)
        axis.text(1170, value + 0.2, text, size=11, color=GRAY, ha="right")
    axis.set_xlabel("steps of 128 images")
    axis.set_xticks((390, 1170))
    axis.set_ylabel("k-NN, %")
    axis.legend()
    return figure


ROWS = ["--eps_sq 0.04", "--eps_sq 0.126", "--eps_sq 1.26", "--eps_sq 4", "--gamma 0.00293"]
ROWS += ["--gamma 0.0469", "--group_size 16", "--group_size 0", "--eps 0.05 --group_size 0"]
ROWS += ["--lr 0.002", "--lr 0.008", "--batch_size_per_gpu 32", "--batch_size_per_gpu 64"]
ROWS += ["--batch_size_per_gpu 256"]


def robust():
    """k-NN with one thing changed at a time, two seeds each."""
    figure, axis = plt.subplots(figsize=(8, 6.5), layout="constrained")
    default = last(f"simdino-5-{seed}" for seed in range(3))
    axis.axvspan(min(default), max(default), color=BLUE, alpha=0.2, label="default, 3 seeds")
    for y, row in enumerate(ROWS):
        runs = [f"robust {row} {seed}" for seed in range(2)]
        axis.plot(last(runs), (y, y), "o-", color=BLUE)
        print(row, *(last(runs, key) for key in ("knn", "rank", "train_comp_loss")))
    axis.set_yticks(range(len(ROWS)), ROWS)
    axis.invert_yaxis()
    axis.axvline(27.2, color=GRAY, linestyle=":", linewidth=1)
    axis.set_xlabel("k-NN, %")
    axis.legend()
    return figure


for name in sys.argv[1:]:
    globals()[name]().savefig(f"assets/{name}.png", dpi=100)
    Image.open(f"assets/{name}.png").convert("RGB").quantize(128).save(f"assets/{name}.png")
