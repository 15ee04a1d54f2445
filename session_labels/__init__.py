"""Parts of precompute_labels.py: sprites, files, a person's review, and the comparison with the truth."""
