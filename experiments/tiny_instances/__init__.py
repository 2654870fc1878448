"""The least errors of ten tiny stacks, beside the solver's best error and the certified floors.

    python -m experiments.tiny_instances             # best errors and floors, with the stored minima: half a minute
    python -m experiments.tiny_instances --again     # the minima too: eight minutes on one core
    python -m experiments.tiny_instances --page docs/theory/tiny_instances.md    # and the table of the page
    python -m experiments.tiny_instances --smoke --out DIR

`branching` proves minima by branch and bound over a few angles, `descent` looks for them from many random starts.
Neither shares code with the package. `run` makes the table tiny_instances.csv; docs/theory/tiny_instances.md reads it.
"""
