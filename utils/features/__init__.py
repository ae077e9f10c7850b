"""What each feature is about, for analyze_features.py. Read in this order:

feature_pass            one pass over the activations: statistics, examples
tables, catalogue       the tables of features, written and read
analysis                an analysis under way; its studies are in studies/
neighbours, concepts     near directions; lists of words known beforehand
phrases, bootstrap      explanations without a judge; intervals
judge, questions        language models that are asked about features
study_plots             pictures of the studies
report, browser         pictures, and the page that shows them and every feature
search                  features by words, by prompts, by likeness
"""
