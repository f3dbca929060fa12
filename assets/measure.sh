#!/usr/bin/env bash
# The main runs behind README.md's figures: some six hours on two cores. From the project's folder:
#     bash assets/measure.sh built_in worlds cifar dino robust augmentation weights segment loader
# Data: cifar10/ as README.md makes it; clones of facebookresearch/dino (7c446df) in dino/ and of
# RobinWu218/SimDINO (8149fc4) in SimDINO/; camvid/ with train/, test/, train_masks/, test_masks/;
# photos/: CamVid's 367 training images and 200 of ImageNet.
set -euo pipefail
export PYTHONPATH=.

part() { # part FOLDER IMAGES CLASS...: the first images of each class, and all to judge by
    for class in "${@:3}"; do
        mkdir -p "$1/train/$class" "$1/test"
        cp $(ls -d cifar10/train/"$class"/* | head -"$2") "$1/train/$class"
        cp -r cifar10/test/"$class" "$1/test"
    done
}
small() { # ten classes of 1,000 images, the settings that all runs share
    [ -d small ] || part small 1000 {0..9}
    "${script[@]}" --data_path small --small_images --local_crops_number 4 --batch_size_per_gpu 128 --lr 0.004 \
        --momentum_teacher 0.95 --num_workers 0 --amp bf16 --epochs 5 "$@"
}
script=(python simdino.py)

built_in() {
    torchrun simdino.py --eval_freq 1 --output_dir runs/default
    torchrun simdino.py --eval_freq 1 --gamma 0 --output_dir runs/gamma0
    for seed in 0 1 2; do
        torchrun simdino.py --seed $seed --output_dir runs/built_in-$seed
        torchrun simdinov2.py --seed $seed --output_dir runs/built_in2-$seed
    done
    python eval_linear.py --weights runs/built_in2-0/checkpoint.pth --resize_size 96 --crop_size 96 \
        --pictures features.png runs/built_in2-0/patterns/val/{2/001,5/003,9/001}.png
}
worlds() {
    [ -d c6400 ] || part c6400 640 {0..9}
    same="--data_path c6400 --small_images --local_crops_number 4 --drop_path_rate 0.1 --batch_size 64 --lr 0.004"
    same="$same --group_size 16 --momentum_teacher 0.9 --epochs 3 --max_steps 99 --eval_freq 0 --num_workers 0"
    for W in 1 2 4; do
        run="torchrun --nproc_per_node=$W"
        $run simdino.py $same --batch_size_per_gpu 16 --output_dir runs/world-$W
        $run simdinov2.py $same --batch_size_per_gpu 16 --layerscale 1 --layerwise_decay 1 --output_dir runs/world2-$W
        PYTHONPATH=.:SimDINO/simdino $run assets/compare.py $same --batch_size_per_gpu 64 --eps 0.05 \
            --output_dir runs/official-$W
    done
}
cifar() {
    python simdino.py --data_path cifar10 --small_images --patch_size 4 --global_crops_size 24 --local_crops_number 0 \
        --momentum_teacher 0.95 --gamma 0.008 --epochs 20 --amp bf16 --output_dir runs/cifar10
    python eval_linear.py --weights runs/cifar10/checkpoint.pth --data_path cifar10 --resize_size 27 --crop_size 24 \
        --cached --output_dir runs/linear
}
dino() {
    for seed in 0 1 2; do
        for epochs in 5 15; do
            small --seed $seed --epochs $epochs --output_dir runs/simdino-$epochs-$seed
        done
        # The best of seven settings each: 512, 1,024 or 4,096 prototypes, teacher temperature 0.02, 0.04 and
        # 0.04 to 0.07, momentum 0.9 to 0.996, lr 0.0005 to 0.004.
        script=(env PYTHONPATH=.:dino python assets/compare.py)
        small --seed $seed --lr 0.0005 --momentum_teacher 0.98 --output_dir runs/dino-5-$seed
        small --seed $seed --epochs 15 --prototypes 4096 --lr 0.001 --momentum_teacher 0.99 --output_dir runs/dino-15-$seed
        script=(python simdino.py)
    done
}
robust() {
    for seed in 0 1; do
        small --seed $seed --epochs 15 --eps 0.05 --group_size 0 --output_dir runs/official-15-$seed
        for flags in "--eps_sq 0.04" "--eps_sq 0.126" "--eps_sq 1.26" "--eps_sq 4" "--gamma 0.00293" "--gamma 0.0469" \
            "--group_size 16" "--group_size 0" "--eps 0.05 --group_size 0" "--lr 0.002" "--lr 0.008" \
            "--batch_size_per_gpu 32" "--batch_size_per_gpu 64" "--batch_size_per_gpu 256"; do
            small $flags --seed $seed --output_dir "runs/robust $flags $seed"
        done
    done
}
augmentation() {
    without=("s.photometric = lambda x, **_: s.normalize(x / 255)" "s.color_jitter = lambda x: x"
        "s.gaussian_blur = lambda x, sigma: x")
    for seed in 0 1; do
        for i in 0 1 2; do
            script=(python -c "import simdino as s; ${without[i]}; s.main()")
            small --seed $seed --output_dir runs/augmentation-$i-$seed
        done
        small --seed $seed --global_crops_scale 1 1 --output_dir runs/augmentation-crop-$seed
        small --seed $seed --local_crops_number 0 --output_dir runs/augmentation-local-$seed
    done
    script=(python simdino.py)
}
weights() {
    part A 2000 0 2 4 6 8
    part B 2000 1 3 5 7 9
    same="--batch_size 64 --batch_size_per_gpu 64 --lr 0.005 --amp off --eval_freq 1"
    small $same --data_path A --epochs 10 --output_dir runs/A
    small $same --data_path B --epochs 4 --output_dir runs/scratch
    small $same --data_path B --epochs 4 --pretrained_weights runs/A/checkpoint.pth --output_dir runs/from_A
}
segment() {
    same="--data_path photos --arch vit_nano --patch_size 8 --hidden_dim 512 --global_crops_size 96 --local_crops_size 48"
    same="$same --global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25 --local_crops_number 6 --drop_path_rate 0"
    same="$same --batch_size 64 --batch_size_per_gpu 64 --group_size 64 --lr 0.005 --warmup_epochs 8"
    same="$same --weight_decay_end 0.04 --momentum_teacher 0.9 --eval_freq 0"
    python simdino.py $same --epochs 100 --output_dir runs/street1
    python simdinov2.py $same --epochs 80 --layerscale 1 --layerwise_decay 1 --patch_embed_lr_mult 1 --output_dir runs/street2
    for run in street1 street2; do
        python eval_linear.py --weights runs/$run/checkpoint.pth --data_path camvid --segment 176 240 --ignore_index 11 \
            --epochs 15 --output_dir runs/$run-scenes
    done
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
