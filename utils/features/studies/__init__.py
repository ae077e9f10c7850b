"""The paper's studies of features, a file each."""
