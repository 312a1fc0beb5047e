#!/bin/bash
# A pretraining run under Slurm, one task per GPU and no other launcher in between: a signal reaches the ranks at once
# and nobody but Slurm kills them, so that the last checkpoint has the time that --signal leaves.
#
#     sbatch --nodes 4 configs/launch/slurm.sh configs/train/my.yaml [--section.key VALUE ...]
#
# Submit it from the activated environment, which sbatch hands on. my.yaml is your own config.
#
#SBATCH --job-name=modmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=$1
shift
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

ranks() {
    # Newer versions of srun do not take --cpus-per-task from sbatch.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
        export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
        exec python "$@"' bash "$@"
}

# Older versions of Slurm set SLURM_NTASKS only inside of srun.
world=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))}
ranks tools/launch_check.py --expect-world "$world" --config "$config" "$@"
code=0
ranks train/pretrain.py --config "$config" "$@" || code=$?
# 143: saved after SIGTERM, because of the time limit or a preemption; the same command resumes.
if [ "$code" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
