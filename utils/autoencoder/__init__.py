"""Sparse autoencoders and their training, for train_autoencoder.py. Read in this order:

autoencoder          what all kinds share
kinds                a class each: equations, options, loss
sparse, devices      products with the active latents alone; over several devices
optimizer, training  Adam in one kernel, rows of norm 1; from settings to a trained autoencoder
training_curves      the picture of a training
fidelity, saved      variance explained, cosine, L0; autoencoders as files
sweep, scaling_laws  many sizes and budgets on the same batches; the laws fitted to them
"""
