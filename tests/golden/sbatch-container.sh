#!/bin/bash

# Parameters
#SBATCH --comment=hpcft-0123456789ab-0-89abcdef
#SBATCH --cpus-per-task=12
#SBATCH --error='/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_0_log.err'
#SBATCH --gpus-per-node=4
#SBATCH --job-name=made
#SBATCH --mem=49152M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --signal=USR2@90
#SBATCH --time=90

# setup
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_%t_log.out' --error '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs/%j_%t_log.err' --kill-on-bad-exit=1 --wait=60 '--container-image=/shared/a b.sqsh' --cpu-bind=none apptainer exec --nv /shared/hpcft.sif python -u -m submitit.core._submit '/scratch/ünï '"'"'x'"'"'/runs/made/0123456789ab/logs'
