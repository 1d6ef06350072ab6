"""
What the plans of a model cost on this machine, and which one fits a budget, as `pyrdiff plan` says it:

    python examples/plan.py runs/pddpm/pipeline --batch_size 16 --budget_ms 200
"""

from pyrdiff.cli import run
from pyrdiff.commands.plan import main

if __name__ == "__main__":
    run(main)
