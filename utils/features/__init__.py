"""The meaning of each feature, for analyze_features.py. Read in this order:

feature_pass, examples   one pass over the activations: statistics, examples of every feature
best                     the best entries of each group of a stream
pass_backup              an unfinished pass in a file
catalogue                the tables of features, written, read and searched
analysis, studies/       an analysis under way; the paper's studies, a file each
labels, concepts         a feature's meaning without a judge; lists of words of one kind
judge, questions         language models that are asked about features
neurons, geometry        neurons in the place of features; nearest directions, a map of them
sampling                 features drawn to be studied; bootstrap intervals
report, browser          pictures, and the page that shows them and every feature
share, dashboards        a finished analysis for other tools: what their pages show of a feature
neuronpedia, saedashboard, upload   their files; features sent to Neuronpedia
search                   features by words, by prompts, by similarity
"""
