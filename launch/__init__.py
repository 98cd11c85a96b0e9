"""The whole life of a job on SLURM, or on this machine. Which file to read:

submit a run         submit.py -> plan.py (read, place, check) -> script.py -> prepare.py; placement.py has the data
what is refused      checks.py; profile.py is the site's section, estimate.py and speeds.py say what fits and how long
inside a job         templates/job.sbatch.j2 -> job.py (may it run, what now) -> agent.py beside every rank -> hang.py
before training      preflight.py, and preflight_cli.py to run it alone
on this machine      local.py
watch and stop       status.py, runs.py (what a run wrote), slurm.py (commands), folder.py (what is stored where)
grids                sweep.py -> collect.py -> plot.py
"""
