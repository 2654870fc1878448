"""Is the solver's error the lowest? Its answers beside a plain search in numpy, on many kinds of small stacks.

A problem is a kind of stack, a size (L, b, a, r, k) and a seed; `kinds.py` lists them all.
"""
