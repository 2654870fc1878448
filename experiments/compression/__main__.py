"""Run the experiment."""

from experiments.compression.run import main

if __name__ == "__main__":
    main()
