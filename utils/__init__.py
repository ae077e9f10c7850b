"""The modules of the four scripts: a folder for each script, and here what all of them use.

settings, artifacts    constants as flags, a stage's folder
characters             characters and words of all scripts, from tokens that split them
backend                the framework that Keras uses
embedded               the offline model and text
language_model         the model: loading it, its residual stream
plots, terminal        drawing, lines of text

activations ← autoencoder ← steering ← features ← influence: each imports from those before it
and from the modules here, never the other way.
"""
