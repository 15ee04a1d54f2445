"""Parts of precompute_labels.py: games, sprites, files, a person's review, scrolling, the comparison with the
truth."""
