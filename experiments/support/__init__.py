"""What several experiments use: rows of results, timing, and the looks of methods in pictures."""
