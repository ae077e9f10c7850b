"""From text to activations on disk, for save_activations.py. Read in this order:

files              which files of a folder are read, and the records in them
splits             the configurations and splits of a dataset's folder
corpus             datasets to documents
contexts           documents to tokens, long ones in pieces, packed into contexts
manifest, shards   the format on disk: the source of the activations; arrays with checksums
store              all activations of a folder, in batches of contexts
capture            a batch through the model, its sums, and its way from a GPU to the host
queues             threads that read ahead of the model and write behind it
extraction         contexts through the model into shards, resuming, repairing
preset             how fast the model runs here, and so which preset of the demo suits
pools, torch_pools the memory in which rows are shuffled: the host's, a GPU's
batches            shuffled batches for training, in memory that does not grow with the data
"""
