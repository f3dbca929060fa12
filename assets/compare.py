"""simdino.py with the loss of another repository: DINO's, or the official SimDINO's.

    PYTHONPATH=.:DINO python assets/compare.py --prototypes 512 [the flags of simdino.py]
    PYTHONPATH=.:OFFICIAL torchrun --nproc_per_node=2 assets/compare.py --eps 0.05 [...]

DINO: a clone of facebookresearch/dino (7c446df). OFFICIAL: the folder simdino of a clone of
RobinWu218/SimDINO (8149fc4). Both have their loss in main_dino.py; all else is simdino.py's.
"""

import argparse
import importlib
import sys
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F

import simdino

parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
parser.add_argument("--prototypes", type=int, default=512)
parser.add_argument("--eps", type=float, default=0.05)
parser.add_argument("--teacher_temp", type=float, default=0.04)
parser.add_argument("--frozen_steps", type=int, default=78)  # of the prototypes
OWN, sys.argv[1:] = parser.parse_known_args()
sys.modules["wandb"] = types.ModuleType("wandb")  # the official code imports it
main_dino = importlib.import_module("main_dino")


def official(model, args):
    views = 2 + args.local_crops_number
    mcr = main_dino.MCRLoss(views, 0, args.expa_type, OWN.eps, args.coeff)

    def loss_fn(z_s, z_t):
        loss, comp, expa = mcr(z_s.flatten(0, 1), z_t.flatten(0, 1))
        return loss, {"comp": comp, "expa": expa}

    model.loss_fn = loss_fn
    return model


def dino(model, args):
    """The head's unit rows meet prototypes of unit norm, as in DINOHead with norm_last_layer."""
    backbone, head = model.student.backbone, model.student.head
    layer = torch.nn.Linear(head.mlp[-1].out_features, OWN.prototypes, bias=False)
    head.prototypes = layer.to(model.device).weight
    model = simdino.SimDINO(backbone, head, None, args.clip_grad, dtype=model.dtype)
    temperature = OWN.teacher_temp
    views = 2 + args.local_crops_number
    cross_entropy = main_dino.DINOLoss(OWN.prototypes, views, temperature, temperature, 0, 1)
    cross_entropy.register_buffer("steps", torch.zeros(()))
    model.saved["dino_loss"] = cross_entropy  # its center and its steps are in the checkpoint
    head.prototypes.register_hook(lambda grad: grad * (cross_entropy.steps > OWN.frozen_steps))

    def loss_fn(z_s, z_t):
        cross_entropy.steps += 1
        student = F.linear(z_s.flatten(0, 1), F.normalize(head.prototypes, dim=-1))
        teacher = F.linear(z_t.flatten(0, 1), F.normalize(model.teacher.head.prototypes, dim=-1))
        loss = cross_entropy(student, teacher, 0)
        cosine = (z_s[:2] * z_t.flip(0)).sum(-1).mean()
        return loss, {"comp": cosine.detach(), "expa": torch.zeros_like(cosine)}

    model.loss_fn = loss_fn
    return model


def build(args, device, plain=simdino.build):
    if not dist.is_initialized():  # the losses ask for the other processes
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    swap = official if hasattr(main_dino, "MCRLoss") else dino
    return swap(plain(args, device), args)


def parse_args(plain=simdino.parse_args):
    """The flags of simdino.py and those of this file, so that a resumed run compares all."""
    return argparse.Namespace(**vars(plain()), **vars(OWN))


simdino.parse_args = parse_args
simdino.build = build
simdino.main()
