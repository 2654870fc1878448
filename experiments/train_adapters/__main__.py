"""Run the experiment."""

from experiments.train_adapters.run import main

if __name__ == "__main__":
    main()
