"""Other tools' autoencoders, in and out: a module for each tool. Read in this order:

imported             an autoencoder of another tool in this project's terms, and how it becomes one
                     of ours
source               a folder or a repository of the hub that holds such; its files and tensors
hooks                places in a language model, as other tools name them
importing            from a source to the folder that a training writes
matching             what activations an autoencoder is for
conventions, check   an autoencoder as read on the activations at hand, and by other conventions
own                  this project's files, of a folder or the hub
folded               an autoencoder of this project in the terms that other tools share; its files
exporting            from that folder to other tools' files
saelens, sparsify    in and out; in alone: dictionary_learning and a module for each other tool
"""

from types import ModuleType

from utils.autoencoder.formats import (
    dictionary_learning,
    goodfire,
    llama_scope,
    mlsae,
    own,
    qwen_scope,
    saelens,
    sparsify,
)

# Asked in this order which hook points of a source are theirs.
FORMATS: tuple[ModuleType, ...] = (
    dictionary_learning,
    goodfire,
    llama_scope,
    mlsae,
    own,
    qwen_scope,
    saelens,
    sparsify,
)
