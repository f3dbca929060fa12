"""The pictures of README.md, by matplotlib:

    PYTHONPATH=. python assets/pictures.py views patterns gamma worlds curves robust

views and patterns need nothing; the others read the runs of measure.sh.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import cbook
from PIL import Image

import simdino

# k-NN in %: of raw pixels as measure.sh prints it, of random weights as the runs do at their start
PIXELS = {"gamma": 34.25, "curves": 45.8, "robust": 39.9}
RANDOM = {"curves": 29.2, "robust": 27.8}
METHODS = {"simdino": "SimDINO", "dino": "DINO"}
BLUE, ORANGE, RED, GRAY = "#0072b2", "#e69f00", "#d55e00", "#777777"
STYLES = {"simdino": ("o", BLUE), "dino": ("s", ORANGE)}
SIDES = {"axes.spines.top": False, "axes.spines.right": False}
plt.rcParams.update({"font.size": 14, "axes.titlesize": 14, "legend.fontsize": 12, **SIDES})
plt.rcParams.update({"legend.frameon": False, "figure.constrained_layout.use": True})


def log_of(run):
    return [json.loads(line) for line in open(f"runs/{run}/log.txt")]


def views():
    """A photograph's views, and the pairs of them that comp is the mean of."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:  # US Navy, public domain
        photo = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    torch.manual_seed(3)
    crops = [crop[None] for crop in simdino.MultiCrop(local_crops=4)(photo)]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (simdino.MEAN, simdino.STD))
    shown = [(x[0] * std + mean).clamp(0, 1).permute(1, 2, 0) for x in simdino.augment(crops)]
    figure, axes = plt.subplots(3, 7, figsize=(7, 3.3))
    for i, axis in enumerate(axes.flat):
        row, column = divmod(i, 7)
        axis.set_axis_off()
        if row == 0 and column > 0:
            axis.imshow(shown[column - 1])
            axis.set_title(f"global {column}" if column < 3 else f"local {column - 2}")
        elif column == 0 and row > 0:
            axis.imshow(shown[row - 1])
        elif row:
            same = row == column
            size, color = (14, GRAY) if same else (30, BLUE)
            text = "same\ncrop" if same else "•"
            axis.text(0.5, 0.5, text, size=size, color=color, ha="center", va="center")
    axes[0, 0].text(0.5, 0.5, "student →\nteacher ↓", size=14, ha="center", va="center")
    return figure


def patterns():
    """The built-in data: an image of each of the ten kinds."""
    names = "stripes, checks, discs, rings, squares, zigzags, bricks, weave, triangles, scallops"
    figure, axes = plt.subplots(2, 5, figsize=(6, 2.9))
    for kind, (name, axis) in enumerate(zip(names.split(", "), axes.flat)):
        image = simdino.draw_pattern(kind, np.random.default_rng((False, kind, 0)))
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(name)
        axis.set_axis_off()
    return figure


def gamma():
    """The built-in run of seed 0, with and without R."""
    titles = {"knn": "k-NN, %", "train_comp_loss": "comp: cosine of pairs"}
    titles |= {"train_expa_loss": "expa: γ·R", "rank": "rank"}
    figure, axes = plt.subplots(2, 2, figsize=(6, 4.5))
    for run, color, label in ("built_in-0", BLUE, "with R"), ("gamma0", RED, "without (γ = 0)"):
        for axis, (key, title) in zip(axes.flat, titles.items()):
            points = [(x["epoch"] + 1, x[key]) for x in log_of(run) if x[key] is not None]
            axis.plot(*zip(*points), "o-", color=color, label=label, clip_on=False)
            axis.set_title(title)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    axes[0, 0].axhline(PIXELS["gamma"], color=GRAY, linestyle=":")
    axes[0, 0].text(8, PIXELS["gamma"] + 1.3, "raw pixels", size=12, ha="right")
    axes[0, 1].legend()
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    return figure


def metrics_of(run):
    """Loss and comp of each step, (steps, 2)."""
    state = torch.load(f"runs/{run}/checkpoint.pth", weights_only=True)
    return np.array(state["metrics"])[:, :2]


def worlds():
    """The mean cosine of the same steps on 1, 2 and 4 processes."""
    for name in "world", "world2", "official":
        for world in 2, 4:
            apart = abs(metrics_of(f"{name}-{world}") - metrics_of(f"{name}-1")).max(0)
            print(f"{name}, {world} processes: loss and comp differ by {apart}")
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 3.6), sharey=True)
    for name, title, axis in zip(("world", "official"), ("here", "official loss"), axes):
        for world, style, color in (1, "-", BLUE), (2, "--", ORANGE), (4, ":", RED):
            comp = metrics_of(f"{name}-{world}")[:, 1]
            axis.plot(range(1, 100), comp, style, linewidth=2, color=color)
            if name == "official":
                above = -0.1 if world == 1 else 0.06
                axis.text(99, comp[-1] + above, f"{world}: ε² {0.05 * world:g}", ha="right")
        axis.set_title(title)
        axis.set_xlabel("step of 64 images")
    axes[0].text(99, 0.5, "1, 2, 4: ε² 0.4", ha="right")
    axes[0].set_ylabel("comp: cosine of pairs")
    axes[0].set_ylim(0, 1)
    return figure


def curves():
    """k-NN of SimDINO and DINO over the epochs of CIFAR-10."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for method, (marker, color) in STYLES.items():
        log = log_of(f"curve-{method}")
        points = [(0, RANDOM["curves"])]
        points += [(x["epoch"] + 1, x["knn"]) for x in log if x["knn"] is not None]
        print(method, points)
        axis.plot(*zip(*points), marker + "-", color=color, label=METHODS[method])
    end = len(log)
    for name, value in ("raw pixels", PIXELS["curves"]), ("random weights", RANDOM["curves"]):
        axis.axhline(value, color=GRAY, linestyle=":")
        axis.text(end, value + 0.3, name, size=12, ha="right", va="bottom")
    axis.set_xticks(range(0, end + 1, 4))
    axis.set_ylim(bottom=25)
    axis.set_xlabel("epoch of CIFAR-10")
    axis.set_ylabel("k-NN, %")
    axis.legend(loc="upper left")
    return figure


def robust():
    """k-NN with one option changed at a time, three seeds."""
    found = {}  # by method and change: k-NN of each seed
    for path in sorted(Path("runs").glob("*dino-[012] *")):
        method, _, change = path.name.partition(" ")
        key = (method[:-2], change)
        found.setdefault(key, []).append(log_of(path.name)[-1]["knn"])
    rows = sorted({change for _, change in found}, key=lambda x: (x != "default", x))
    figure, axis = plt.subplots(figsize=(6.5, 0.36 * len(rows) + 1.2))
    for method, (marker, color) in STYLES.items():
        axis.axvline(np.mean(found[method, "default"]), color=color, alpha=0.4)
        shift = -0.12 if method == "simdino" else 0.12
        for change in rows:
            knn = found.get((method, change), [])
            if knn:
                print(method, change, [f"{x:.1f}" for x in knn], f"mean {np.mean(knn):.1f}")
                y = [rows.index(change) + shift] * len(knn)
                axis.plot(knn, y, marker + "-", color=color, markersize=6)
        axis.plot([], [], marker, color=color, label=METHODS[method])
    for name, value in ("random", RANDOM["robust"]), ("raw pixels", PIXELS["robust"]):
        axis.axvline(value, color=GRAY, linestyle=":")
        axis.text(value - 0.15, len(rows) - 0.5, name, size=11, ha="right", va="bottom")
    axis.set_xticks([25, 30, 35, 40])
    axis.set_yticks(range(len(rows)), rows, size=12)
    axis.set_ylim(len(rows) - 0.4, -1.6)
    axis.set_xlabel("k-NN, %")
    axis.legend(loc="upper center", ncols=2)
    return figure


for name in sys.argv[1:]:
    globals()[name]().savefig(f"assets/{name}.png", dpi=150)
    Image.open(f"assets/{name}.png").convert("RGB").quantize(128).save(f"assets/{name}.png")
