#!/bin/bash

# Parameters
#SBATCH --comment=hpcft-0123456789ab-0-89abcdef
#SBATCH --cpus-per-task=12
#SBATCH --error='/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_0_log.err'
#SBATCH --gres=gpu:4
#SBATCH --job-name=made
#SBATCH --mem=49152M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --propagate=NONE
#SBATCH --requeue
#SBATCH --signal=USR2@60
#SBATCH --time=90

# setup
export PYTHONSAFEPATH=1
export PYTHONUTF8=1
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_%t_log.out' --error '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_%t_log.err' --open-mode=append --kill-on-bad-exit=1 --wait=60 /opt/hpcft/bin/python -u -m hpcft.training.start_rank '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs' '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/runs-hpcft-0123456789ab-0-89abcdef.json' d9e5adc2817fed2803a758db1e828bb9816ec8ffcb95dbf59fd97326b8aaa114


# teardown
code=$?
[ $code -eq 0 ] || /opt/hpcft/bin/python -m hpcft.training.requeue '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/runs-hpcft-0123456789ab-0-89abcdef.json' d9e5adc2817fed2803a758db1e828bb9816ec8ffcb95dbf59fd97326b8aaa114
exit $code