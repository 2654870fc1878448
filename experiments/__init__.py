"""One experiment per module or folder, run as `python -m experiments.NAME` from the root of the checkout.

`figures` draws every picture again from the data beside it. `support` and `models` hold the code that several
experiments use, `trained` the adapters and updates that were trained for them.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, see rasa_theory/__init__.py
