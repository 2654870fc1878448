"""One experiment per module or folder, run as `python -m experiments.NAME` from the root of the checkout.

`figures` draws every picture again from the data beside it. `support` and `minilm` hold the code that several
experiments use, `trained` the adapters and updates that were trained for them.
"""
