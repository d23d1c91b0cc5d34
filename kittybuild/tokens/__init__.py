"""Vocabularies: what a model's tokenizer files say, the output's vocabulary and files, where its rows come from, chat
templates. Bytes in, bytes out: no file is opened here, and no tokenizer class is ever run."""
