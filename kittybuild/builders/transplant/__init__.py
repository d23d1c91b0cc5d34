"""Tables for another model's tokenizer: rows of shared tokens are copied, others approximated, one method a builder.

The methods are those of mergekit-tokensurgeon (0.1.5), by their descriptions and by what it makes of small models.
"""
