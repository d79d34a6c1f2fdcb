#!/bin/sh
# Train on a Slurm cluster, with one torchrun on each node, from the folder of the repository:
#   sbatch --nodes=2 --gpus-per-node=8 --time=04:00:00 recipes/slurm.sh config/train_gpt2.py --out_dir=out
# Two minutes before the time is up, the run saves and the job goes back to the queue; when its turn comes, it resumes. A run
# that fails or is finished is not queued again; to go on with it, submit it with --init_from=resume. All nodes must see the
# dataset and out_dir. Without GPUs, PROCESSES says how many processes a node has.
#SBATCH --job-name=nanogpt
#SBATCH --ntasks-per-node=1
#SBATCH --output=nanogpt-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

PATH="$PWD/.venv/bin:$PATH"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
export PATH MASTER_ADDR MASTER_PORT PROCESSES

[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && set -- "$@" --init_from=resume # queued again

out_of_time=
trap 'out_of_time=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the processes that srun has started

# With --signals-to-handle, torchrun passes SIGUSR1 on to the ranks.
srun --kill-on-bad-exit=0 sh -c 'exec torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" \
    --nproc_per_node="$PROCESSES" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 train.py "$@"' sh "$@" &
wait $!
code=$?
[ "$out_of_time" ] && wait $! # the trap has ended the first wait
[ "$out_of_time" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
