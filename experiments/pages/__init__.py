"""The numbers of README, of the pages in docs and of the notebooks, taken from the data in figures/.

    python -m experiments.pages            # write them, a second
    python -m experiments.pages --check    # say which pages are stale, and change nothing
    python -m experiments.pages --list     # the names of all blocks

A page holds `<!-- data: NAME -->`, what the block NAME says, and `<!-- end -->`. A block is a table on lines of its own
or a number within a sentence. Its text comes from the function of that name in `blocks`, and is never edited by hand.
"""
