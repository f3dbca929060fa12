# SPDX-License-Identifier: MIT
"""What the features of a vision transformer are worth: k-NN, linear probes, pictures.

    torchrun --nproc_per_node=8 eval_linear.py --weights FILE --data_path /imagenet
    torchrun --nproc_per_node=8 eval_linear.py --weights FILE --data_path /imagenet --cached
    python eval_linear.py --weights FILE --data_path CIFAR --resize_size 32 --crop_size 32
    python eval_linear.py --weights FILE --data_path SCENES --segment    # patches, not pictures
    python eval_linear.py --weights FILE --pictures OUT.png PHOTO...
    python eval_linear.py --weights FILE --export OUT.pth                # the backbone, for timm

FILE: a checkpoint of simdino.py, simdinov2.py, the official SimDINO(v2), DINO(v2) or timm; the
architecture is read off its tensors; give --num_heads where the width is unusual. The first command
runs DINO's weighted k-NN, then DINO's 100 epochs on random crops for 52 linear classifiers side by
side (DINOv2's: 4 kinds of features x 13 learning rates), the best chosen on images held out of
train/ and only then tried on val/. --cached trains them on the features of one central crop an
image: one pass of the backbone instead of 101. On 5,000 images of CIFAR-10 (vit_nano, 30 epochs,
2,000 test images) it gave 38.2 % instead of 38.1 %, in 10 seconds instead of 9 minutes.

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
import traceback
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

# ---------------------------------------------------------------------------------------- the model


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

    registers None: its position grid is resized as DINO does.
    """

    def __init__(self, side, patch_size, embed_dim, depth, num_heads, registers, layerscale):
        super().__init__()
        self.patch_size, self.side = patch_size, side
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
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        attn, x = self.blocks[-1].attn, self.blocks[-1].norm1(x)
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
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


def normalize(x):
    """(B, 3, H, W) in [0, 1] -> mean 0 and variance 1 over ImageNet."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(x.device, non_blocking=True)
    return torch.addcmul(-mean / std, x, 1 / std)  # (x - mean) / std


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


HEADS_OF = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16}  # width: heads, of the standard ViTs


def load_backbone(path, key="teacher", num_heads=None):
    """The VisionTransformer whose weights are in path, or under key there; what was left out.

    num_heads cannot be read off the tensors: by default that of the standard ViT of this width.
    """
    tensors, mlp, left_out = read_weights(path, key)
    left_out |= {"head.mlp"} if mlp else set()
    if tensors.pop("mask_token", None) is not None:
        left_out.add("mask_token")
    width, _, _, patch_size = tensors["patch_embed.proj.weight"].shape
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else None
    side = math.isqrt(tensors["pos_embed"].shape[1])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    num_heads = num_heads or HEADS_OF.get(width)
    if not num_heads:
        stop(f"{path} is {width} wide, and does not say of how many heads: give --num_heads")
    if width % num_heads:
        stop(f"--num_heads {num_heads} does not divide the width of {path}, {width}")
    layerscale = "blocks.0.ls1.gamma" in tensors
    model = VisionTransformer(side, patch_size, width, depth, num_heads, registers, layerscale)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # lists the keys that miss, are left over or of another shape
        stop(f"{path} is not such a vision transformer: {' '.join(str(error).split())}")
    return model.eval().requires_grad_(False), sorted(left_out)


def export(model, path):
    """Write the weights as timm names them; print the code that loads them there."""
    if path.suffix != ".pth" or path.exists():
        stop(f"--export {path}: give the name of a new .pth file")
    state, width = model.state_dict(), model.norm.weight.numel()
    depth, num_heads = len(model.blocks), model.blocks[0].attn.num_heads
    shape = f"img_size={model.side * model.patch_size}, patch_size={model.patch_size}, "
    shape += f"embed_dim={width}, depth={depth}, num_heads={num_heads}, num_classes=0"
    if "blocks.0.ls1.gamma" in state:
        shape += ", init_values=1"
    if "register_tokens" in state:  # timm gives no position to CLS: ours is added to it
        if (registers := state.pop("register_tokens")).numel():
            state["reg_token"] = registers
        first, state["pos_embed"] = state["pos_embed"].tensor_split([1], dim=1)
        state["cls_token"] = state["cls_token"] + first
        shape += f", reg_tokens={model.first_patch - 1}, no_embed_class=True"
    state = {name: tensor.cpu().clone() for name, tensor in state.items()}
    write(path, partial(torch.save, state))
    load = f'model.load_state_dict(torch.load("{path}", weights_only=True), strict=True)'
    say(f"model = timm.models.VisionTransformer({shape}); {load}")


# ---------------------------------------------------------------------------- features, k-NN, probe

BLOCKS = 4
KINDS = {  # rows of the features (5, D) of an image: CLS of the last 4 blocks, mean patch
    "1 block": slice(-2, -1),
    "1 block + patches": slice(-2, None),
    "4 blocks": slice(0, -1),
    "4 blocks + patches": slice(0, None),
}
# DINOv2's, for 256 images.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def eta(clock, done, total):
    seconds = (time.perf_counter() - clock) / done * (total - done)
    return f"{done}/{total} ETA {timedelta(seconds=int(seconds))}"


@torch.no_grad()
def encode(model, x):
    """uint8 (B, 3, H, W) -> (B, 5 D): CLS tokens of the last 4 blocks, mean patch of the last."""
    x = normalize(x.to(model.pos_embed.device, non_blocking=True) / 255)
    layers = model.get_intermediate_layers(x, BLOCKS)
    patches = layers[-1][:, model.first_patch :].mean(1)
    return torch.cat([*(tokens[:, 0] for tokens in layers), patches], dim=-1).float()


def embedded(embed, args, device, images, **how):
    """Features, labels and problems of each batch of images; how: DataLoader draws them."""
    workers = {"num_workers": args.num_workers, "worker_init_fn": ignore_signals}
    for x, y, problems in DataLoader(images, pin_memory=device.type == "cuda", **workers, **how):
        yield embed(x), y.to(device, non_blocking=True), problems


def extract(images, load, columns, dtype, device):
    """Columns of the features, (n, D), and labels (n,) of all images on every process; label -1:
    cannot be read."""
    n, share = len(images), math.ceil(len(images) / WORLD)
    first = done = RANK * share
    indices = [i % n for i in range(first, first + share)]  # the surplus is cut below
    features = torch.empty(WORLD * share, len(columns), dtype=dtype, device=device)
    labels = torch.empty(WORLD * share, dtype=torch.long, device=device)
    clock, unread = time.perf_counter(), []
    with together(), or_stop(f"cannot load images {MEMORY}"):
        for z, label, problems in load(images, batch_size=128, sampler=indices):
            bad = torch.tensor([problem > "" for problem in problems], device=device)
            unread += filter(None, problems)
            rows = slice(done, done + len(z))
            features[rows] = z[:, columns.start : columns.stop]
            labels[rows] = label.masked_fill(bad, -1)
            done += len(z)
            say("features of image " + eta(clock, done - first, share), end="")
    if WORLD > 1:
        for column in features, labels:
            for rank, rows in enumerate(column.split(share)):
                dist.broadcast(rows, rank)
    if not torch.stack(features[:n].aminmax()).isfinite().all():  # needs no memory, finds NaN too
        stop("the features are not finite: try --amp off, or other --weights", agreed=True)
    unread = sorted({problem for some in meet(unread) for problem in some})
    for problem in unread[:5]:
        say(f"unreadable, left out: {problem}")
    if unread:
        say(f"{len(unread)} of {n} images in {images.root} cannot be read")
    return features[:n], labels[:n]


@torch.no_grad()
def knn_accuracies(train, val, neighbours=(10, 20, 100, 200), temperature=0.07):
    """Top-1 accuracy on val in per cent, for each number of neighbours in train.

    They vote with exp(cosine / temperature). train, val: features (n, D), labels (n,), -1 for none,
    the same on every rank; a rank judges its share of val.
    """
    (bank, labels), keep = train, val[1] >= 0
    k, classes = min(max(neighbours), int((labels >= 0).sum())), int(labels.max()) + 1
    hits = torch.zeros(len(neighbours), device=bank.device)
    for z, y in zip(*(column[keep][RANK::WORLD].split(256) for column in val)):
        z = F.normalize(z.float(), dim=-1)
        # In parts: features in half precision are never all copied to float32
        cosine = [z @ F.normalize(part.float(), dim=-1).mT for part in bank.split(2**16)]
        nearest, at = torch.cat(cosine, dim=1).masked_fill_(labels < 0, -math.inf).topk(k)
        weight = (nearest / temperature).exp()
        for i, few in enumerate(neighbours):
            votes = torch.zeros(len(z), classes, device=z.device)
            votes.scatter_add_(1, labels[at[:, :few]], weight[:, :few])
            hits[i] += (votes.argmax(1) == y).sum()
    if WORLD > 1:
        dist.all_reduce(hits)
    return dict(zip(neighbours, (100 * hits / max(1, int(keep.sum()))).tolist()))


class Probe(nn.Module):
    """All candidates side by side: linear classifiers, one for each kind of features and rate."""

    def __init__(self, width, blocks, classes):
        super().__init__()
        self.width, self.heads = width, nn.ModuleList()
        for rows in KINDS.values():
            dim = len(range(blocks + 1)[rows]) * width  # as many rows as the slice takes
            self.heads.append(nn.Linear(dim, len(RATES) * classes))
            nn.init.normal_(self.heads[-1].weight, std=0.01)
            nn.init.zeros_(self.heads[-1].bias)

    def forward(self, z):  # (B, (blocks + 1) D) -> (B, candidates, classes)
        z = z.unflatten(-1, (-1, self.width))
        scores = [head(z[:, rows].flatten(1)) for head, rows in zip(self.heads, KINDS.values())]
        return torch.cat([s.unflatten(1, (len(RATES), -1)) for s in scores], dim=1)

    def losses(self, z, y):
        scores = self(z).mT  # (B, classes, candidates)
        y = y[:, None].expand(-1, scores.shape[-1])
        return F.cross_entropy(scores, y, reduction="none").mean(0)


@torch.no_grad()
def probe_accuracies(probe, features, labels):
    """Top-1 and top-5 accuracy of each candidate in per cent, a list of pairs."""
    hits = 0
    for z, y in zip(features.split(256), labels.split(256)):
        scores = probe(z.float())  # (B, candidates, classes)
        top = scores.topk(min(5, scores.shape[-1])).indices == y[:, None, None]
        hits = hits + torch.stack([top[..., 0], top.any(-1)], -1).sum(0)
    return (100 * hits / len(labels)).tolist()


def fit(probe, rates, batches, n, args, run, state):
    """Train all candidates of the probe side by side, by SGD, for --epochs of n images.

    batches(batch_sampler=keys): yields features and labels, whose probe.losses is (candidates,).
    Saved to probe.pth every --saveckp_freq epochs and 15 minutes; goes on from state, if any.
    """
    path, device = Path(args.output_dir) / "probe.pth", next(probe.parameters()).device
    rates = torch.tensor(rates, device=device)
    optimizer = torch.optim.SGD(probe.parameters(), lr=1.0, momentum=0.9)
    per_epoch = n // args.batch_size
    done, total = 0, args.epochs * per_epoch
    if state:
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        say(f"resumed {path} at step {done}")
    lr = cosine_schedule(args.batch_size / 256, 0.0, total)
    clock, start, saved = time.perf_counter(), done, time.monotonic()
    BUSY.append("the probe")
    for z, y, *_ in batches(batch_sampler=block_keys(n, args, done, total)):
        losses = probe.losses(z, y)
        optimizer.zero_grad()
        # SGD on a loss times its rate is SGD at that rate: one optimizer for all candidates.
        ((losses * rates).sum() / WORLD).backward()
        if WORLD > 1:
            for p in probe.parameters():
                dist.all_reduce(p.grad)
        optimizer.param_groups[0]["lr"] = float(lr[done])
        optimizer.step()
        done += 1
        epoch, i = divmod(done, per_epoch)
        if i and done % 10 and not (SIGNALS and WORLD == 1):
            continue

        # Every 10 steps, at an epoch's end and, alone, at a signal
        left = eta(clock, done - start, total - start)
        number = max(meet(max(SIGNALS, default=0)))
        late = max(meet(time.monotonic() - saved > 900))
        due = not i and (epoch % args.saveckp_freq == 0 or epoch == args.epochs)
        if number or late or due:
            saved = time.monotonic()
            with together():
                if RANK == 0:
                    content = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict()}
                    write(path, partial(torch.save, content | {"step": done, "run": run}))
        if number:
            say(f"{signal.Signals(number).name}: saved {path} at step {done}, to be resumed")
            leave(128 + number)
        if i:
            say(f"step {left}", end="")
        else:
            lowest = losses.detach().nan_to_num(math.inf).min().item()
            if lowest == math.inf:
                stop("no finite loss: try --amp off, or other --weights", agreed=True)
            say(f"epoch {epoch}/{args.epochs}: lowest loss {lowest:.3f}, step {left}")
    BUSY.clear()


# --------------------------------------------------------------------------------- the segmentation

PATCH_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)  # for 256 images


def load_mask(path, ignore):
    """A grayscale or palette image, a class a pixel -> int64 (H, W), -1 where it is ignore."""
    with Image.open(os.fsdecode(path)) as image:
        mask = torch.from_numpy(np.array(image)).long()
    if mask.ndim != 2:
        raise ValueError(f"{os.fsdecode(path)} has colours, not a class a pixel")
    return mask.masked_fill(mask == ignore, -1)


@torch.no_grad()
def encode_patches(model, x):
    """uint8 (B, 3, H, W) -> (B, h, w, D): patch tokens of the last block."""
    x = normalize(x.to(model.pos_embed.device, non_blocking=True) / 255)
    grid = [side // model.patch_size for side in x.shape[2:]]
    return model.get_intermediate_layers(x)[0][:, model.first_patch :].unflatten(1, grid).float()


class Scenes(Images):
    """scenes[key] -> image (3, H, W), its mask (H, W), problem; labels: names of the masks.

    flip: mirror half of them, as in training. The mask of an image that cannot be read is void.
    """

    def __init__(self, root, names, masks, size, ignore, flip, seed):
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        super().__init__(root, names, masks, resize, seed)
        self.ignore, self.flip = ignore, flip

    def __getitem__(self, key):
        image, path, problem = super().__getitem__(key)
        mask = load_mask(path, self.ignore)[None, None].float()
        mask = F.interpolate(mask, image.shape[1:], mode="nearest-exact")[0, 0].long()
        if self.flip and torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask.fill_(-1) if problem else mask, problem


def find_scenes(root, split, ignore):
    """Names of the images below root/split; paths, highest class and digest of their masks."""
    with or_stop(f"cannot list {root / split}"):
        names, *_ = find_images(root / split)
    folder = os.fsencode(f"{root / split}_masks")
    masks = [os.path.join(folder, os.path.splitext(name)[0] + b".png") for name in names]
    missing = [os.fsdecode(mask) for mask in masks if not os.path.exists(mask)]
    if missing or not names:
        stop(f"{root / split}: {len(names)} images, {len(missing)} without a mask {missing[:1]}")
    highest, content = -1, hashlib.sha256()
    with or_stop("cannot segment"):
        for mask in (load_mask(path, ignore) for path in masks):
            highest = max(highest, int(mask.max()))
            content.update(mask.numpy().tobytes())
    return np.array(names), np.array(masks), highest, content.hexdigest()[:16]


class PatchProbe(nn.Module):
    """All candidates side by side: batch normalisation and a linear classifier of patch tokens."""

    def __init__(self, width, classes):
        super().__init__()
        self.register_buffer("moments", torch.stack([torch.zeros(width), torch.ones(width)]))
        self.head = nn.Linear(width, len(PATCH_RATES) * classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, z):  # (B, h, w, D) -> (B, classes, h, w) of each candidate
        moments = self.moments
        if self.training:  # those of the tokens of all processes
            moments = torch.stack([z.mean((0, 1, 2)), z.square().mean((0, 1, 2))]) / WORLD
            if WORLD > 1:
                dist.all_reduce(moments)
            self.moments.lerp_(moments, 0.1)  # as BatchNorm does
        mean, square = moments
        z = (z - mean) / ((square - mean**2).clamp(min=0) + 1e-5).sqrt()
        return self.head(z).movedim(-1, 1).chunk(len(PATCH_RATES), dim=1)

    @staticmethod
    def loss(scores, y):  # y (B, H, W), -1: void
        scores = upsample(scores, y.shape[1:])
        return F.cross_entropy(scores, y, reduction="none", ignore_index=-1).mean()

    def losses(self, z, y):  # scores of all pixels are kept of one candidate at a time
        return torch.stack([checkpoint(self.loss, x, y, use_reentrant=False) for x in self(z)])


def upsample(scores, size):  # (B, classes, h, w) -> (B, classes, *size)
    return F.interpolate(scores.contiguous(), size, mode="bilinear")


@torch.no_grad()
def confusions(probe, source, classes):
    """(candidates, classes, classes): how many pixels of each class were given which."""
    device = probe.moments.device
    counts = torch.zeros(len(PATCH_RATES), classes**2, dtype=torch.long, device=device)
    for z, y, _ in source:
        for count, scores in zip(counts, probe(z)):
            given = upsample(scores, y.shape[1:]).argmax(1)
            count += torch.bincount((classes * y + given)[y >= 0], minlength=classes**2)
    if WORLD > 1:
        dist.all_reduce(counts)
    return counts.unflatten(1, (classes, classes)).double()


def segmentation_scores(counts):
    """Of one confusion matrix, %: mIoU over the classes that occur, pixel accuracy, IoU of each."""
    hits = counts.diagonal()
    iou = 100 * hits / (counts.sum(0) + counts.sum(1) - hits)  # NaN: neither there nor given
    known = [None if math.isnan(value) else value for value in iou.tolist()]
    accuracy = 100 * hits.sum() / counts.sum()
    return {"miou": iou.nanmean().item(), "pixel_accuracy": accuracy.item(), "iou": known}


def segment(args, model, embed, device):
    """--segment: the linear probe of patch tokens. -> what results.json says of it."""
    root, patch = Path(args.data_path), model.patch_size
    held_out = "val" if (root / "val").is_dir() else "test"
    with together():
        names, masks, last, content = find_scenes(root, "train", args.ignore_index)
        *val, val_last, val_content = find_scenes(root, held_out, args.ignore_index)
        classes = last + 1
        if not 0 <= val_last < classes:
            stop(f"{held_out}_masks/ goes to class {val_last}, train_masks/ to {last}")
        size = args.segment or load_image(root / "train" / os.fsdecode(names[0])).shape[1:]
        size = [side // patch * patch for side in size]
        if args.segment and size != args.segment:
            stop(f"--segment {args.segment} is not made of multiples of the patch, {patch}")
        if classes < 2 or min(size) == 0:
            stop(f"nothing to judge: {classes} classes in {root}/train_masks, images of {size}")
        order = np.random.default_rng(args.seed).permutation(len(names))
        held, part = np.split(order, [max(1, len(names) // 10)])
        if len(part) < args.batch_size:
            stop(f"{len(part)} images are fewer than a step of {args.batch_size}")
        scenes = partial(Scenes, size=size, ignore=args.ignore_index, seed=args.seed)
        train = scenes(root / "train", names[part], masks[part], flip=True)
        judged = [scenes(root / "train", names[held], masks[held], flip=False)]
        judged.append(scenes(root / held_out, *val, flip=False))
    run, state = open_run(args, [train, *judged], masks=[content, val_content])
    say(f"{len(names)} training images of {size}, {len(val[0])} to judge by, {classes} classes")

    load = partial(embedded, embed, args, device)
    torch.manual_seed(seed_from(args.seed))
    probe = PatchProbe(model.norm.weight.numel(), classes).to(device)
    fit(probe, PATCH_RATES, partial(load, train), len(part), args, run, state)
    probe.eval()
    counts = []
    for split in judged:
        own = {"batch_size": args.batch_size_per_gpu, "sampler": range(RANK, len(split), WORLD)}
        counts.append(confusions(probe, load(split, **own), classes))
    miou = [segmentation_scores(count)["miou"] for count in counts[0]]
    best = miou.index(max(miou))
    rate, scores = PATCH_RATES[best], segmentation_scores(counts[1][best])
    by_rate = {f"{rate:g}": value for rate, value in zip(PATCH_RATES, miou)}
    say(f"mIoU on {len(held)} held-out images by lr: {by_rate}")
    iou = " ".join("-" if x is None else f"{x:.1f}" for x in scores["iou"])
    say(f"lr {rate:g} on {held_out}/: mIoU {scores['miou']:.2f}; of each class: {iou}")
    say(f"pixel accuracy {scores['pixel_accuracy']:.2f} %")
    with together():
        if RANK == 0:
            picture = draw_scenes(judged[1], probe, embed, best)
            write(Path(args.output_dir) / "segmentation.png", partial(picture.save, format="PNG"))
    return {"run": run, "segmentation": {"held_out_miou": by_rate, "best_lr": rate, **scores}}


@torch.no_grad()
def draw_scenes(scenes, probe, embed, best):
    """A picture with a row for each of four scenes: image, what the probe says, mask."""
    colours = np.random.default_rng(1).integers(30, 256, (256, 3), dtype=np.uint8)
    colours[-1], lines = 0, []  # void: black
    for i in np.linspace(0, len(scenes) - 1, min(4, len(scenes))).astype(int).tolist():
        image, mask, _ = scenes[i]
        given = upsample(probe(embed(image[None]))[best], mask.shape)[0].argmax(0).cpu()
        maps = [colours[x.numpy() % 256] for x in (given, mask)]
        lines.append(np.concatenate([image.permute(1, 2, 0).numpy(), *maps], axis=1))
    return Image.fromarray(np.concatenate(lines))


# ------------------------------------------------------------------------------------- the pictures


def draw(model, paths, transform, out, tile=168, gap=4):
    """Write to out a picture with a row for each of the images.

    Its columns: the image; the last block's attention of CLS to the patches, head by head; the
    first three principal components of the patch features of all images as red, green, blue.
    """
    if out.suffix.lower() != ".png" or out.exists():
        stop(f"--pictures {out}: first the name of a new .png file, then images")
    images = []
    for path in paths:
        with or_stop(f"cannot read the image {path}"):
            images.append(transform(load_image(path)))
    images = torch.stack(images)  # (n, 3, S, S)
    x = normalize(images.to(model.pos_embed.device) / 255)
    with torch.no_grad():
        attention = model.get_last_selfattention(x)[:, :, 0, model.first_patch :]  # (n, heads, N)
        patches = model.get_intermediate_layers(x)[0][:, model.first_patch :]  # (n, N, D)
    centred = (patches - patches.mean((0, 1))).flatten(0, 1).double()
    components = (centred @ torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -3:]).flip(1)
    low, high = components.quantile(torch.tensor([0.01, 0.99]).to(components), dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1).view(len(x), -1, 3).mT  # (n, 3, N)
    light = (attention / attention.quantile(0.98, dim=-1, keepdim=True)).clamp(0, 1)
    maps = [images / 255, *light[:, :, None].expand(-1, -1, 3, -1).unbind(1), colours]
    names = ["image", *(f"head {i + 1}" for i in range(attention.shape[1])), "PCA"]

    pitch, top = tile + gap, 16
    size = len(maps) * pitch - gap, top + len(images) * pitch - gap
    picture = Image.new("RGB", size, "white")
    for column, (name, values) in enumerate(zip(names, maps)):
        ImageDraw.Draw(picture).text((column * pitch + 2, 2), name, fill="black")
        side = math.isqrt(values[0].numel() // 3)
        for row, pixels in enumerate(values.reshape(-1, 3, side, side)):
            pixels = transforms.functional.to_pil_image(pixels.float().cpu())
            one = pixels.resize((tile, tile), Image.NEAREST if column else Image.BICUBIC)
            picture.paste(one, (column * pitch, top + row * pitch))
    write(out, partial(picture.save, format="PNG"))


# -------------------------------------------------------------------------------------- the program

TINY, INF, AMP = 1e-12, math.inf, ("auto", "bf16", "fp16", "off")
OPTIONS = {  # flag: (default, range, help)
    "--checkpoint_key": ("teacher", None, "name of the weights inside FILE, if there are several"),
    "--resize_size": (256, (1, INF), "shorter side of an image before its centre is cut, pixels"),
    "--crop_size": (224, (1, INF), "side of what the model sees, pixels"),
    "--epochs": (100, (0, INF), "passes of the probe over the training images; 0: k-NN alone"),
    "--batch_size_per_gpu": (0, (0, INF), "images a step in each process; 0: 128, --segment: 8"),
    "--ignore_index": (255, (0, INF), "what a mask says where there is no class"),
    "--amp": ("auto", AMP, "auto: bf16 or else fp16 on GPUs; off: float32 without TF32"),
    "--num_workers": (min(10, os.cpu_count()), (0, INF), "data loading processes of a process"),
    "--saveckp_freq": (5, (1, INF), "save the probe, to be resumed, every so many epochs"),
    "--seed": (0, (0, INF), "of held-out images, classifiers, order, crops"),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse = partial(stop, agreed=True)  # all processes have the same flags
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="what to judge")
    add("--data_path", help="holds train/ and val/ or test/, of class folders")
    add("--output_dir", default=f"output_{SCRIPT.stem}", help="of all it writes")
    add("--num_heads", type=int, help="of the model; by default as standard ViTs of its width have")
    add("--cached", action="store_true", help="the probe learns from one central crop an image")
    text = "linear probe of patch tokens, images resized to H W (default: the first one's size)."
    text += " Masks of the same names, PNG, a class a pixel: train_masks/, val_masks/"
    add("--segment", nargs="*", type=int, metavar=("H", "W"), help=text)
    text = "write the backbone as timm loads it, with strict=True, and end"
    add("--export", metavar="OUT.pth", help=text)
    text = "draw attention and features of IMG (default: of 8 validation images) and end"
    add("--pictures", nargs="+", metavar=("OUT.png", "IMG"), help=text)
    for flag, (default, allowed, text) in OPTIONS.items():
        choices = AMP if allowed is AMP else None
        add(flag, default=default, type=type(default), choices=choices, help=text)
    args = parser.parse_args(argv)
    for flag, (default, allowed, _) in OPTIONS.items():
        value = getattr(args, flag[2:])
        if isinstance(default, int) and not allowed[0] <= value <= allowed[1]:
            refuse(f"{flag} {value} is not in the range from {allowed[0]:g} to {allowed[1]:g}")
    if args.resize_size < args.crop_size:
        refuse(f"--resize_size {args.resize_size} is smaller than --crop_size {args.crop_size}")
    if not args.data_path and not args.export and len(args.pictures or []) < 2:
        refuse("--data_path is needed: a folder that holds train/ and val/ or test/")
    if args.segment is not None and args.pictures:
        refuse("--segment draws its own picture: leave out --pictures")
    if args.segment is not None and (len(args.segment) not in (0, 2) or not args.epochs):
        refuse("--segment takes no number or two, H and W, and at least one of --epochs")
    args.batch_size_per_gpu = args.batch_size_per_gpu or (128 if args.segment is None else 8)
    args.batch_size = args.batch_size_per_gpu * WORLD
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


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def same_run(old, new):
    """ValueError that names what differs where new is not as in old."""
    differ = [f"its {k} is {old.get(k)}, not {v}" for k, v in new.items() if old.get(k) != v]
    if differ:
        raise ValueError(f"it is of another run: {'; '.join(differ)}")


# Flags that may differ when a run goes on.
FREE = "weights data_path output_dir pictures export batch_size_per_gpu num_workers saveckp_freq"


def open_run(args, splits, **more):
    """Lock the output folder; -> what the run is; the state of its probe to go on from, or {}."""
    output, state = Path(args.output_dir), {}
    path, results_path = output / "probe.pth", output / "results.json"
    with together():
        if RANK == 0:
            claim(output)
        for split in splits:
            split[0]  # ends here if no image can be read
        run = {name: value for name, value in vars(args).items() if name not in FREE.split()}
        run["weights_sha256"] = digest(Path(args.weights).read_bytes())
        run |= {"images": [len(split) for split in splits], **more}
        run["image_lists"] = [digest(b"\0".join(split.names)) for split in splits]
        with or_stop(f"cannot use {results_path}: choose another --output_dir"):
            if results_path.exists():
                same_run(json.loads(results_path.read_text())["run"], run)
        with or_stop(f"cannot resume {path}: move it away, or choose another --output_dir"):
            if path.exists():
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                same_run(state["run"], run)
    if len(set(meet((*run["image_lists"], len(state))))) > 1:
        folders = f"{args.data_path}, {args.output_dir}"
        stop(f"the processes do not find the same files in {folders}", agreed=True)
    return run, state


def classify(args, model, embed, centre, data, device, dtype):
    """k-NN and the linear probe. -> what results.json says of them."""
    width, blocks = model.norm.weight.numel(), min(BLOCKS, len(model.blocks))
    with together():
        train, val = data
        labelled = [(name, label) for name, label in zip(*train[1:]) if label >= 0]
        images = [Images(train[0], *zip(*labelled), centre), Images(*val, centre)]
        n, classes = len(images[0]), max(train[2]) + 1
        count = max(1, min(n // 10, 10000))  # of images held out
        if args.epochs and n - count < args.batch_size:
            stop(f"{n} images, a tenth held out, are less than a step: lower --batch_size_per_gpu")
    run, state = open_run(args, images)

    load = partial(embedded, embed, args, device)
    kept = torch.float32 if dtype == torch.float32 else torch.float16
    every = range((blocks + 1) * width)
    cls = every[-2 * width : -width]  # of the last block: all that k-NN needs
    table = {"columns": every if args.epochs else cls, "dtype": kept, "device": device}
    say(f"{n} training images, {len(images[1])} to judge by, {classes} classes")
    features, labels = extract(images[0], load, **table)
    val_features, val_labels = extract(images[1], load, **table)
    bad = int((labels < 0).sum()) + int((val_labels < 0).sum())
    banks = (x[:, cls.start : cls.stop] if args.epochs else x for x in (features, val_features))
    knn = knn_accuracies(*zip(banks, (labels, val_labels)))
    say("k-NN, top-1 %: " + ", ".join(f"k = {k}: {accuracy:.2f}" for k, accuracy in knn.items()))
    results = {"run": run, "knn": knn, "bad_images": bad}
    if not args.epochs:
        return results

    # The probe
    order = np.random.default_rng(args.seed).permutation(n)
    held, part = np.split(order[(labels >= 0).cpu().numpy()[order]], [count])
    if len(part) < args.batch_size:
        stop(f"{len(part)} readable images are less than a step", agreed=True)
    held_features, held_labels = features[held], labels[held]
    if args.cached:

        def batches(batch_sampler):
            for keys in batch_sampler:
                rows = torch.from_numpy(part[np.array(keys) % len(part)]).to(device)
                yield features[rows].float(), labels[rows]
    else:
        del features
        bicubic = InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(args.crop_size, interpolation=bicubic)
        crop = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
        names, of = images[0].names[part], images[0].labels[part]
        batches = partial(load, Images(train[0], names, of, crop, args.seed))

    torch.manual_seed(seed_from(args.seed))
    probe = Probe(width, blocks, classes).to(device)
    fit(probe, RATES * len(KINDS), batches, len(part), args, run, state)
    accuracies = probe_accuracies(probe, held_features, held_labels)
    names = [f"{kind}, lr {rate:g}" for kind in KINDS for rate in RATES]
    best = max(range(len(names)), key=lambda i: accuracies[i][0])
    readable = val_labels >= 0
    judged = probe_accuracies(probe, val_features[readable], val_labels[readable])
    top1, top5 = judged[best]
    say(f"top-1 / top-5, %, on {len(held)} images held out of the training ones")
    say(f"{'lr':>8}" + "".join(f"{kind:>20}" for kind in KINDS))
    for i, rate in enumerate(RATES):
        cells = (f"{a:6.2f} / {b:6.2f}" for a, b in accuracies[i :: len(RATES)])
        say(f"{rate:8g}" + "".join(f"{cell:>20}" for cell in cells))
    say(f"the best, {names[best]}, on the validation images: {top1:.2f} / {top5:.2f}")
    chosen = {"best": names[best], "val_top1": top1, "val_top5": top5}
    return results | {"probe": {"held_out": dict(zip(names, accuracies))} | chosen}


def main():
    args, began = parse_args(), time.perf_counter()
    device = start_process()
    dtype = precision(args.amp, device)
    resize = transforms.Resize(args.resize_size, InterpolationMode.BICUBIC)
    centre = transforms.Compose([resize, transforms.CenterCrop(args.crop_size)])
    output, data, segmenting = Path(args.output_dir), None, args.segment is not None
    with together():
        model, left_out = load_backbone(args.weights, args.checkpoint_key, args.num_heads)
        if args.crop_size % model.patch_size and not segmenting and not args.export:
            stop(f"--crop_size {args.crop_size} is not a multiple of the patch, {model.patch_size}")
        if args.data_path and not (segmenting or args.export):
            data = find_data(Path(args.data_path))
            if len(data) < 2:
                stop(f"nothing to judge in {args.data_path}")
    model.to(device)
    text = f"{model.norm.weight.numel()} wide, {len(model.blocks)} blocks of "
    text += f"{model.blocks[0].attn.num_heads} heads, patch {model.patch_size}, "
    text += f"{model.first_patch - 1} registers"
    say(f"{args.weights}: {text}; left out: {', '.join(left_out) or 'nothing'}")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    if args.export:
        with together():
            if RANK == 0:
                export(model, Path(args.export))
    elif args.pictures:
        out, *paths = args.pictures
        if not paths:
            names = data[1][1][:: math.ceil(len(data[1][1]) / 8)]
            paths = [os.path.join(data[1][0], os.fsdecode(name)) for name in names]
        if RANK == 0:
            draw(model, paths, centre, Path(out))
            say(f"drawn: {out}")
    else:
        embed = autocast(partial(encode_patches if segmenting else encode, model))
        if segmenting:
            results = segment(args, model, embed, device)
        else:
            results = classify(args, model, embed, centre, data, device, dtype)
        results |= {"weights": args.weights, "seconds": time.perf_counter() - began}
        text = json.dumps(results, indent=2) + "\n"
        with together():
            if RANK == 0:
                write(output / "results.json", lambda file: file.write(text.encode()))
    leave()


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, answer)
    sys.excepthook = last_words
    for stream in sys.stdout, sys.stderr:  # a file's name may be no valid text
        stream.reconfigure(errors="backslashreplace")
    main()
