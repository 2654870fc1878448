"""Run the experiment."""

from experiments.why_sharing_pays.run import main

if __name__ == "__main__":
    main()
