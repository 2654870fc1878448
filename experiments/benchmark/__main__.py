"""Run the experiment."""

from experiments.benchmark.run import main

if __name__ == "__main__":
    main()
