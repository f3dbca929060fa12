"""Do 30 training steps of the official code and 30 of ours end in the same weights?

    pip install timm omegaconf einops
    python assets/official.py SimDINO  # the folder of a clone of RobinWu218/SimDINO (8149fc4)

First, one process of ours takes 30 steps of 64 images, each step in 8 rounds of 8 images, with
--eps_sq 0.4. Then 8 processes of the official code take the same images, 8 each, with --eps 0.05.
As in the published runs, the images of a process are a group; there it had 64. Both sides start
from the same weights and see the same views and masks of the built-in images. --clip_grad is 0.05,
which clips most gradients at first.

SimDINO: main_dino.train_one_epoch runs as it is, with the official network, loss, parameter groups
and schedules. SimDINOv2: SimSSLMetaArch with its parameter groups, forward_backward and
update_teacher, in the lines of do_train. FSDP needs GPUs; in its place, the gradients are averaged
over the processes. The schedules are ours, as the official warm-up starts from min_lr, ours from 0.

Not compared: mixed precision, stochastic depth, which the two draw differently, the augmentation,
the drawing of masks, the first weights. The official code runs on the CPU, without its compilation,
gradient scaler and block chunks, and with its block "memeff", as "nested" needs xFormers.

Printed is ‖ours - official‖ / ‖official - start‖ over all weights. The official SimDINOv2 casts the
position embedding to float32; in the row "without cast", it is cast to float64.
"""

import argparse
import importlib
import os
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

PROCESSES = 8
EPOCHS = 3
STEPS = 10  # of an epoch
FLAGS = "--batch_size 64 --batch_size_per_gpu 8 --group_size 8 --drop_path_rate 0 --eval_freq 0"
FLAGS += f" --clip_grad 0.05 --epochs {EPOCHS} --warmup_epochs 1"
FLAGS += " --momentum_teacher 0.9 --weight_decay_end 0.4"
FLAGS_2 = " --layerscale 0.1 --layerwise_decay 0.9 --patch_embed_lr_mult 0.2"
VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}


def ours(name, dtype, folder):
    """The weights after training by our script; what the official code needs is saved."""
    torch.set_default_dtype(dtype)
    script = importlib.import_module(name)
    flags = FLAGS
    if name == "simdinov2":
        flags += FLAGS_2
    args = script.parse_args(["--output_dir", folder, *flags.split()])
    images, _ = script.open_images(args)
    model = script.build(args, torch.device("cpu"))
    schedule = script.schedules(args, STEPS)
    start = {key: tensor.clone() for key, tensor in model.student.state_dict().items()}
    data = script.MicroBatches(images, args)
    augment = script.augment
    batches = []
    for item in product(range(EPOCHS * STEPS), range(PROCESSES)):
        seed, views, *masks = data[item]
        torch.manual_seed(seed)
        batches.append((seed, [view.to(dtype) for view in augment(views)], *masks))
    torch.save((vars(args), schedule, start, batches), f"{folder}/start.pt")
    script.augment = lambda views: views  # they are augmented already
    for step in range(EPOCHS * STEPS):
        settings = {key: values[step] for key, values in schedule.items()}
        model.step(batches[step * PROCESSES : (step + 1) * PROCESSES], **settings)
    return model.student.state_dict(), model.teacher.state_dict()


def official(process, name, dtype, cast, clone, folder):
    """One process of the official code, on the CPU. The first one saves the weights at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings; an error is raised in main
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    torch.Tensor.cuda = lambda tensor, **options: tensor
    torch.cuda.synchronize = lambda: None
    if not cast:
        torch.Tensor.float = torch.Tensor.double
    dist.init_process_group("gloo", f"file://{folder}/store", None, PROCESSES, process)
    args, schedule, start, batches = torch.load(f"{folder}/start.pt", weights_only=True)
    train = {"simdino": official_simdino, "simdinov2": official_simdinov2}[name]
    with open(os.devnull, "w") as null, redirect_stdout(null):
        args = argparse.Namespace(**args)
        student, teacher = train(args, schedule, start, batches[process::PROCESSES], clone)
    if process == 0:
        torch.save((student.state_dict(), teacher.state_dict()), f"{folder}/official.pt")


def official_simdino(args, schedule, start, batches, clone):
    """Student and teacher after the lines of main_dino.train_dino."""
    sys.modules["wandb"] = ModuleType("wandb")
    sys.path.insert(0, f"{clone}/simdino")
    import main_dino
    import utils
    from vision_transformer import DINOHead, VisionTransformer

    def network():
        norm = partial(nn.LayerNorm, eps=1e-6)
        vit = VisionTransformer([32], patch_size=8, **VIT, qkv_bias=True, norm_layer=norm)
        network = utils.MultiCropWrapper(vit, DINOHead(96, 256, hidden_dim=512))
        network.load_state_dict(start)
        return network

    teacher = network().requires_grad_(False)
    student = nn.parallel.DistributedDataParallel(network())
    loss = main_dino.MCRLoss(2 + args.local_crops_number, 0, args.expa_type, 0.05, args.coeff)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student), fused=True)
    cosine = partial(utils.cosine_scheduler, epochs=EPOCHS, niter_per_ep=STEPS)
    lr = cosine(args.lr * 64 / 256, args.min_lr, warmup_epochs=1)
    weight_decay = cosine(args.weight_decay, args.weight_decay_end)
    momentum = cosine(args.momentum_teacher, 1)
    flags = {"use_simdino": True, "freeze_last_layer": 1, "enable_logging": False}
    flags = SimpleNamespace(**flags, epochs=EPOCHS, clip_grad=args.clip_grad)
    utils.MetricLogger.synchronize_between_processes = lambda self: None  # it needs a GPU
    for epoch in range(EPOCHS):
        loader = [(views, None) for _, views in batches[epoch * STEPS : (epoch + 1) * STEPS]]
        settings = (optimizer, lr, weight_decay, momentum, epoch, None, flags)
        main_dino.train_one_epoch(student, teacher, teacher, loss, loader, *settings)
    return student.module, teacher


def official_simdinov2(args, schedule, start, batches, clone):
    """Student and teacher after the lines of simdinov2.train.train.do_train."""
    sys.path.insert(0, clone)
    train = ModuleType("simdinov2.train")  # without its imports, which need many packages
    train.__path__ = [f"{clone}/simdinov2/train"]
    fsdp = ModuleType("simdinov2.fsdp")
    fsdp.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    fsdp.reshard_fsdp_model = lambda module: None
    fsdp.get_fsdp_wrapper = fsdp.ShardedGradScaler = None
    sys.modules |= {"simdinov2.train": train, "simdinov2.fsdp": fsdp}
    import timm.optim
    from omegaconf import OmegaConf
    from simdinov2.models import vision_transformer as vits
    from simdinov2.train.ssl_meta_arch_sim import SimSSLMetaArch

    def vit_nano(block, **options):
        return vits.DinoVisionTransformer(**VIT, block_fn=vits.get_block_fn(block), **options)

    vits.vit_nano = vit_nano
    flags = "compile=false compute_precision.grad_scaler=false student.arch=vit_nano"
    flags += " student.block=memeff student.block_chunks=0 student.drop_path_rate=0"
    flags += " student.patch_size=8 crops.global_crops_size=32 dino.head_hidden_dim=512"
    flags += f" crops.local_crops_number={args.local_crops_number}"
    flags += f" optim.clip_grad={args.clip_grad}"
    files = [f"{clone}/simdinov2/configs/{x}_config.yaml" for x in ("ssl_default", "simdino")]
    cfg = OmegaConf.merge(*map(OmegaConf.load, files), OmegaConf.from_cli(flags.split()))
    model = SimSSLMetaArch(cfg)
    model.need_to_synchronize_fsdp_streams = False
    for network in (model.student, model.teacher):
        network.load_state_dict({k.replace("head.", "dino_head.", 1): v for k, v in start.items()})
    model.train()
    groups = model.get_params_groups(True)
    optimizer = timm.optim.create_optimizer_v2(groups, opt=cfg.optim.opt, **cfg.optim.kwargs)
    for step, (_, views, masks, index) in enumerate(batches):
        for group in optimizer.param_groups:
            group["weight_decay"] = schedule["weight_decay"][step] * group["wd_multiplier"]
            group["lr"] = schedule["lr"][step] * group["lr_multiplier"]
        optimizer.zero_grad()
        masked = masks.sum(-1, keepdim=True).clamp(min=1).expand_as(masks)[masks]
        images = {
            "collated_global_crops": torch.cat(views[:2]),
            "collated_local_crops": torch.cat(views[2:]),
            "collated_masks": masks,
            "mask_indices_list": index,
            "n_masked_patches": torch.tensor([len(index)]),
            "masks_weight": 1 / masked,
        }
        model.forward_backward(images, teacher_temp=None)
        for p in model.student.parameters():
            dist.all_reduce(p.grad)
            p.grad /= PROCESSES
        for network in model.student.values():
            nn.utils.clip_grad_norm_(network.parameters(), cfg.optim.clip_grad)
        optimizer.step()
        model.update_teacher(schedule["momentum"][step])
    return model.student, model.teacher


def flat(weights):
    """All weights as one vector in float64."""
    weights = {key.replace("dino_head.", "head."): tensor for key, tensor in weights.items()}
    return torch.cat([weights[key].flatten().double() for key in sorted(weights)])


def main():
    clone = str(Path(sys.argv[1]).resolve())
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    rows = [
        ("simdino", torch.float64, True),
        ("simdino", torch.float32, True),
        ("simdinov2", torch.float64, False),
        ("simdinov2", torch.float64, True),
        ("simdinov2", torch.float32, True),
    ]
    for name, dtype, cast in rows:
        with tempfile.TemporaryDirectory() as folder:
            with open(os.devnull, "w") as null, redirect_stdout(null):
                weights = ours(name, dtype, folder)
            torch.multiprocessing.spawn(official, (name, dtype, cast, clone, folder), PROCESSES)
            start = flat(torch.load(f"{folder}/start.pt", weights_only=True)[2])
            other = torch.load(f"{folder}/official.pt", weights_only=True)
        for network, a, b in zip(("student", "teacher"), weights, other):
            apart = (flat(a) - flat(b)).norm() / (flat(b) - start).norm()
            note = "" if cast else ", without cast"
            print(f"{name}, {dtype}{note}: {network} {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
