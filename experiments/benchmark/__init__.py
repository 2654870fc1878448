"""The cost of a sweep and the gain of a pass over M, beside the sweeps of the paper and the CP codes of others.

    python -m experiments.benchmark            # some minutes; figures/benchmark.csv, passes.csv and three pictures
    python -m experiments.benchmark --traces   # what passes.png shows, and no more: passes.csv
    python -m experiments.benchmark --quick --out DIR    # small sizes, for function

Part 1, `passes`: from the allocation start, error after every sweep, passes over M (the start's residual left out) and
seconds: 300 joint sweeps, the paper's sweeps, and the core's until its error is not above that of the joint ones; on
the first stack, k = r, also the CP sweeps of tensorly and pyttb from there; its whole traces are in passes.csv.
Part 2, `sweep`: seconds of one joint sweep beside its own two products with M, and of one CP sweep of tensorly, pyttb
and pygenten, where they are installed, on the same tensor, k = r, in one process, in alternating order. A sweep of
theirs is a tenth of what eleven take longer than one, from the same start, so that setting up does not count; the last
two compute in float64 and run there only.
Part 3, `growth`: the same seconds of ours where one of L, b, R and k grows, the others held fixed, in float32.
Part 4, `lora`: seconds of `solve_lora(.., "fast")` beside torch's svdvals; `error` is the width of its interval.
"""
