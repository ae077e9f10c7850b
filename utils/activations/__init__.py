"""From text to activations on disk, for save_activations.py. Read in this order:

files              which files of a folder are read, and the records in them
hub                the files of a dataset of the Hugging Face Hub, read where they lie
splits             the configurations and splits of a dataset
subsets, chats     which subsets are read; records of messages, as text
corpus             datasets to documents
contexts           documents to tokens, long ones in pieces, packed into contexts
manifest, shards   the format on disk: the source of the activations; arrays with checksums
coding             activations in int8, by blocks
rolling            a folder of bounded size, cut into windows that are freed
store              all activations of a folder, in batches of contexts
places             where in its document each token is
capture            a batch through the model, its sums, and its way from a GPU to the host
claims             who makes which shard, where several processes share a run
queues             threads that read ahead of the model and write behind it
layers             a layer's folder: its manifest, and which of its shards are damaged
extraction         contexts through the model into shards, resuming, repairing
checks             whether a finished folder is what its settings say
preset             how fast the model runs here, and so which preset of the demo suits
pools, torch_pools the memory in which rows are shuffled: the host's, a GPU's
batches            shuffled batches for training, in memory that does not grow with the data
following          batches of one window after another, while the next is written
"""
