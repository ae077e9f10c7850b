"""What the four scripts share: a folder for each of them, and what all of them need.

settings, artifacts    constants as flags, a stage's folder
backend                which framework Keras computes with
embedded               the offline model and text
language_model         the model: loading it, its residual stream
plots, terminal        drawing, lines of text

activations ← autoencoder ← steering ← features ← influence: each imports from those before it
and from the modules here, never the other way.
"""
