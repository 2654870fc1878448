"""Run the experiment."""

from experiments.best_found.run import main

if __name__ == "__main__":
    main()
