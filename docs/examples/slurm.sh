#!/bin/bash
#SBATCH --job-name=gptq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# sbatch slurm.sh MODEL OUT
# MODEL is read on every node: a path that all have, or a Hub id. OUT is written by the first node alone.
# When the time is over --max-runtime ends the run in order; the same job, submitted again, goes on.
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  -m gptq_cli quantize "$1" -o "$2" --bits 4 --max-runtime 3h50m --allow-network-fs
