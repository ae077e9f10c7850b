"""Text to activations on disk, for save_activations.py. Read in this order:

corpus             datasets to documents to contexts of tokens
manifest, shards   the format on disk: what the activations are of; arrays written whole, checked
store              all of a folder, in batches of contexts
extraction         contexts through the model into shards, resuming, repairing
batches            shuffled batches for training, in memory that does not grow with the data
"""
