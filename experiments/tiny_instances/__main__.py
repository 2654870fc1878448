"""Run the experiment."""

import sys

from experiments.tiny_instances.run import main

if __name__ == "__main__":
    sys.exit(main())
