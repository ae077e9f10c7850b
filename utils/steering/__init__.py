"""A language model with an autoencoder in it. Read in this order:

feature_model   feature activations, raw directions, reconstruction; what everything later is given
clamps          features changed in the residual stream
generation      prompts as tokens; texts at once, or seen while they are written
"""
