"""Is the solver's error the lowest? Its answers beside a plain search in numpy, on many kinds of small stacks.

    python -m experiments.best_found reference               the plain search on every problem, by far the longest part
    python -m experiments.best_found ours --effort default   the solver of the package where there is a reference
    python -m experiments.best_found table                   a line per kind, and the picture
    python -m experiments.best_found hidden                  shared dyads hidden in whole bundled updates

A problem is a kind of stack, a size (L, b, a, r, k) and a seed; `kinds.py` lists them all. The reference is in
`reference.py`, which shares no code with the package. Both are upper bounds on e_rasa(k) at points where no term
d_ij b_j a_j of the pool and no B~_i A~_i has a norm above 8 ||M_i||. The commands add a row after each problem, and an
interrupted run goes on where it stopped. Errors are squared norms over ||M||^2, seconds are of the processor on one
thread. Written to --out:

    best_found_starts.csv   one row per problem: the reference, the error of each of its starts, and for k = r the best
                            of 20 random starts of CP codes of others
    best_found.csv          one row per problem and effort: the solver's error, seconds, stop reason and largest term
                            beside the reference
    best_found_hidden.csv   one row per bundled stack, size of the dyads, seed and effort: the solver's error beside
                            that of a descent from the dyads themselves, in units of the input
    best_found.png          errors less the reference in units of e_lora, in rising order
"""
