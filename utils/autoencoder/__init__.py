"""Sparse autoencoders and their training, for train_autoencoder.py. Read in this order:

autoencoder          what all kinds share: encoding, the loss as a sum of terms, dead latents
kinds                a class each: equations, options, terms of the loss
training             from settings to a trained autoencoder
callbacks            what is logged and backed up on the way; training_curves: drawn
sparse, devices      products with the active latents alone; over several devices
optimizer            Adam, rows of norm 1, the schedule of the learning rate
kernels              Adam on PyTorch, plain; triton_kernels: the same on a graphics card
recorded             a step that is recorded on a graphics card and replayed
memory               what a training will hold, computed before it starts
fidelity, saved      variance explained, cosine, L0; autoencoders and their metrics as files
several              of several layers and sizes, one on each graphics card
hub, model_card      a repository of the hub, and its card
sweep, scaling_laws  many sizes and budgets on the same batches; the laws fitted to them, drawn
"""
