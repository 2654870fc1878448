"""The theorem's own test bench: random instances, the laws that hold on every one of them, and the tally."""
