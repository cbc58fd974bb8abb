"""``python -m flexpatch.launch``: programs that know nothing of flexpatch, with all models they load patched."""
