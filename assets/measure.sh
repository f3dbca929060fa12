#!/usr/bin/env bash
# The runs behind README.md's figures, some four hours on two cores. From the project's folder:
#     bash assets/measure.sh data built_in worlds cifar compare robust nan loader
# dino/ and SimDINO/ are clones of facebookresearch/dino (7c446df) and RobinWu218/SimDINO (8149fc4);
# photos/ is a folder of photographs. compare and robust ran with OMP_NUM_THREADS=1.
set -euo pipefail
export PYTHONPATH=.

# Whole images, small models: what compare and robust share
whole="--small_images --patch_size 4 --local_crops_number 0 --amp bf16 --compile --num_workers 0 --eval_freq 100"
simdino() { python simdino.py $whole --momentum_teacher 0.95 --gamma 0.008 "$@"; }
dino() {
    PYTHONPATH=.:dino python assets/compare.py $whole --lr 0.001 --momentum_teacher 0.99 --prototypes 4096 "$@"
}
part() { # part FOLDER IMAGES CLASS...: the first images of each class, and all to judge by
    for class in "${@:3}"; do
        mkdir -p "$1/train/$class" "$1/test"
        cp $(ls -d cifar10/train/"$class"/* | head -"$2") "$1/train/$class"
        cp -r cifar10/test/"$class" "$1/test"
    done
}

data() { # CIFAR-10 as class folders
    python - <<'END'
from pathlib import Path
from torchvision.datasets import CIFAR10

for split in "train", "test":
    for i, (image, label) in enumerate(CIFAR10("downloads", split == "train", download=True)):
        folder = Path("cifar10", split, str(label))
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
END
}
built_in() {
    torchrun simdino.py --eval_freq 1 --output_dir runs/default
    torchrun simdino.py --eval_freq 1 --gamma 0 --output_dir runs/gamma0
    for seed in 0 1 2; do
        torchrun simdino.py --seed $seed --output_dir runs/built_in-$seed
        torchrun simdinov2.py --seed $seed --output_dir runs/built_in2-$seed
    done
}
worlds() {
    part c6400 640 {0..9}
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
cifar() {
    python simdino.py --data_path cifar10 --small_images --patch_size 4 --global_crops_size 24 --local_crops_number 0 \
        --momentum_teacher 0.95 --gamma 0.008 --epochs 20 --amp bf16 --output_dir runs/cifar10
    python eval_linear.py --weights runs/cifar10/checkpoint.pth --data_path cifar10 \
        --cached --batch_size 128 --output_dir runs/linear
}
compare() {
    for seed in 0 1 2; do
        for method in simdino dino; do
            $method --data_path cifar10 --global_crops_size 24 --epochs 4 --warmup_epochs 0.4 --seed $seed \
                --output_dir runs/$method-4-$seed
        done
    done
}
change() { # change NAME OPTIONS_OF_SIMDINO OPTIONS_OF_DINO; - for a method: not run
    short="--data_path small --global_crops_size 16 --epochs 10 --warmup_epochs 1"
    [ "$2" = - ] || simdino $short $2 --output_dir "runs/simdino $1"
    [ "$3" = - ] || dino $short $3 --output_dir "runs/dino $1"
}
robust() {
    part small 1000 {0..9}
    change default "" ""
    change "lr × 2" - "--lr 0.002"
    change "lr × 4" "--lr 0.02" "--lr 0.004"
    change "batch × 4" "--batch_size 256 --batch_size_per_gpu 256" "--batch_size 256 --batch_size_per_gpu 256"
    change "slower teacher" "--momentum_teacher 0.98" "--momentum_teacher 0.996"
    change "ε² × 4" "--eps_sq 1.6" -
    change "γ × 2.4" "--gamma 0.0195" -
    change "teacher temp. × ½" - "--teacher_temp 0.02"
}
nan() { # of 40 draws, how many losses are NaN in bf16: official, ours; 12 views of 64 images
    PYTHONPATH=.:SimDINO/simdino python - <<'END'
import sys, types, torch, torch.distributed as dist
from torch.nn.functional import normalize
sys.modules["wandb"] = types.ModuleType("wandb")
import main_dino, simdino
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for eps_sq, cosine in (0.05, 0.9), (0.05, 0.999), (0.4, 0.9), (0.4, 0.999):
    official, ours, count = main_dino.MCRLoss(12, 0, 1, eps_sq, 1), simdino.SimDINOLoss(eps_sq), [0, 0]
    for seed in range(40):
        torch.manual_seed(seed)
        z = normalize(torch.randn(14, 64, 256), dim=-1) * (1 - cosine) ** 0.5
        z = normalize(z + normalize(torch.randn(256), dim=-1) * cosine**0.5, dim=-1)
        with torch.autocast("cpu", torch.bfloat16):
            losses = official(z[2:].flatten(0, 1), z[:2].flatten(0, 1))[0], ours(z[2:], z[:2])[0]
        count = [n + x.isnan().item() for n, x in zip(count, losses)]
    print(f"eps_sq {eps_sq}, mean cosine {cosine}:", *count)
END
}
loader() { # images a second that one core decodes and crops, 2 + 10 views, five passes over photos/
    python - <<'END'
import time, pathlib, torch, simdino
torch.set_num_threads(1)
files, crop = [x for x in pathlib.Path("photos").rglob("*.*")], simdino.MultiCrop()
for _ in range(5):
    start = time.monotonic()
    for file in files:
        crop(simdino.load_image(file))
    print(round(len(files) / (time.monotonic() - start)))
END
}

for step in "$@"; do $step; done
