"""A language model with an autoencoder in it. Read in this order:

feature_model   feature activations, raw directions, reconstruction
clamps          features changed in the residual stream
generation      prompts as tokens; texts written at once, or streamed a token at a time
"""
