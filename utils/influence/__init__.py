"""The influence of features on texts, for influence_llm.py. Read in this order:

generations          untouched and steered texts, and their log
portrait             a picture of a feature: what it reads, beside what it makes the model write
texts, evidence      texts by steering and by other methods; does steering bring in a concept?
attribution          which features lead to the next token
export               steering vectors for other programs
chat, playground     features clamped by hand
"""
