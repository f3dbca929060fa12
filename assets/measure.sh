#!/usr/bin/env bash
# The runs behind README.md's figures, some eight hours on two cores. From the project's folder:
#     bash assets/measure.sh data official built_in worlds curves robust pixels nan
# dino/ and SimDINO/ are clones of facebookresearch/dino (7c446df) and RobinWu218/SimDINO (8149fc4).
# curves and robust ran with OMP_NUM_THREADS=1.
set -euo pipefail
export PYTHONPATH=.

# Whole images, small models: what curves and robust share
whole="--small_images --patch_size 4 --local_crops_number 0 --num_workers 0"
simdino() { python simdino.py $whole --momentum_teacher 0.95 --gamma 0.008 "$@"; }
dino() {
    PYTHONPATH=.:dino python assets/compare.py $whole --lr 0.001 --momentum_teacher 0.99 --prototypes 4096 "$@"
}
part() { # part FOLDER N: the first N images of each class, and all to judge by
    for class in $(ls cifar10/train); do
        mkdir -p "$1/train/$class" "$1/test"
        cp $(ls -d cifar10/train/"$class"/* | head -"$2") "$1/train/$class"
        cp -r cifar10/test/"$class" "$1/test"
    done
}

data() { # CIFAR-10 as class folders of JPEG files
    python - <<'END'
from pathlib import Path
from torchvision.datasets import CIFAR10

for split in "train", "test":
    data = CIFAR10("downloads", split == "train", download=True)
    for i, (image, label) in enumerate(data):
        folder = Path("cifar10", split, data.classes[label])
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:05}.jpg")
END
}
official() {
    python assets/official.py SimDINO
}
built_in() {
    for seed in 0 1 2; do
        torchrun simdino.py --eval_freq 1 --seed $seed --output_dir runs/built_in-$seed
        torchrun simdinov2.py --eval_freq 1 --seed $seed --output_dir runs/built_in2-$seed
    done
    torchrun simdino.py --eval_freq 1 --gamma 0 --output_dir runs/gamma0
}
worlds() {
    part c6400 640
    same="--data_path c6400 --small_images --local_crops_number 4 --drop_path_rate 0.1 --batch_size 64 --lr 0.004"
    same="$same --group_size 16 --momentum_teacher 0.9 --epochs 3 --max_steps 99 --eval_freq 0 --num_workers 0"
    for W in 1 2 4; do
        run="torchrun --nproc_per_node=$W"
        $run simdino.py $same --batch_size_per_gpu 16 --output_dir runs/world-$W
        $run simdinov2.py $same --batch_size_per_gpu 16 --layerscale 1 --layerwise_decay 1 --output_dir runs/world2-$W
        PYTHONPATH=.:SimDINO/simdino $run assets/compare.py $same --eps 0.05 \
            --output_dir runs/official-$W
    done
}
curves() {
    for method in simdino dino; do
        $method --data_path cifar10 --global_crops_size 24 --epochs 20 --warmup_epochs 2 --eval_freq 2 \
            --output_dir runs/curve-$method
    done
}
change() { # change NAME OPTIONS_OF_SIMDINO OPTIONS_OF_DINO; - for a method: not run
    short="--data_path small --global_crops_size 16 --epochs 10 --warmup_epochs 1 --eval_freq 100"
    for seed in 0 1 2; do
        [ "$2" = - ] || simdino $short $2 --seed $seed --output_dir "runs/simdino-$seed $1"
        [ "$3" = - ] || dino $short $3 --seed $seed --output_dir "runs/dino-$seed $1"
    done
}
robust() {
    part small 1000
    change default "" ""
    change "lr × 2" - "--lr 0.002"
    change "lr × 4" "--lr 0.02" "--lr 0.004"
    change "batch × 4" "--batch_size 256 --batch_size_per_gpu 256" "--batch_size 256 --batch_size_per_gpu 256"
    change "slower teacher" "--momentum_teacher 0.98" "--momentum_teacher 0.996"
    change "ε² × 4" "--eps_sq 1.6" -
    change "γ 0.0195" "--gamma 0.0195" -
    change "teacher temp. × ½" - "--teacher_temp 0.02"
    for run in simdino-0 dino-0; do # their linear accuracy
        python eval_linear.py --weights "runs/$run default/checkpoint.pth" --data_path small \
            --cached --batch_size 128 --output_dir runs/linear-$run
    done
}
pixels() { # k-NN of raw pixels; after built_in and robust, which make the images
    python - <<'END'
import contextlib, types, torch, simdino
pixels = types.SimpleNamespace(teacher=types.SimpleNamespace(backbone=torch.nn.Flatten()))
pixels.device, pixels.autocast = torch.device("cpu"), contextlib.nullcontext()
for folder, size in ("runs/built_in-0/patterns", 32), ("cifar10", 24), ("small", 16):
    flags = ["--small_images", "--data_path", folder, "--global_crops_size", str(size)]
    images = simdino.open_images(simdino.parse_args(flags))[1]
    bank, val = (simdino.embed(pixels, images[name], {}) for name in ("train", "val"))
    print(folder, simdino.knn_accuracy(bank, val))
END
}
nan() { # of 40 draws near a collapse, how many losses are NaN: official, ours; 12 views of 64 images
    PYTHONPATH=.:SimDINO/simdino python - <<'END'
import sys, types, torch, torch.distributed as dist
from torch.nn.functional import normalize
sys.modules["wandb"] = types.ModuleType("wandb")
import main_dino, simdino

def is_nan(loss, seed, dtype, cosine):
    torch.manual_seed(seed)
    z = normalize(torch.randn(14, 64, 256), dim=-1) * (1 - cosine) ** 0.5
    z = normalize(z + normalize(torch.randn(256), dim=-1) * cosine**0.5, dim=-1)
    with torch.autocast("cpu", dtype):
        return loss(z[2:], z[:2])[0].isnan().item()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for dtype in torch.bfloat16, torch.float16:
    for eps_sq in 0.05, 0.4:
        for cosine in 0.9, 0.999:
            for loss in main_dino.MCRLoss(12, 0, 1, eps_sq, 1), simdino.SimDINOLoss(eps_sq):
                count = sum(is_nan(loss, seed, dtype, cosine) for seed in range(40))
                print(dtype, f"eps_sq {eps_sq}, mean cosine {cosine}, {type(loss).__name__}: {count}")
END
}

for step in "$@"; do $step; done
