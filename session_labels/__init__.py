"""Parts of precompute_labels.py: sprites, files, a person's review, scrolling, and the comparison with the truth."""
