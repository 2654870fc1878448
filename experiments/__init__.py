"""What was measured, a script each; `python -m experiments.figures` draws all of it again."""
