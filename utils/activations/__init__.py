"""Text to activations on disk, for save_activations.py. Read in this order:

corpus       datasets to documents to contexts of tokens
store        the format: shards and manifest, their writer, their reader
extraction   contexts through the model into shards, resuming, repairing
batches      shuffled batches for training, in memory that does not grow with the data
"""
