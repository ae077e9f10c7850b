"""A language model with an autoencoder in it. Read in this order:

evaluation   crossing from Keras to torch; the model's loss with the reconstruction in place
clamps       features changed in the residual stream
streaming    texts that are seen while they are written
"""
