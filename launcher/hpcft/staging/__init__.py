"""Downloads a recipe's models and data into the Hugging Face cache, and finds them there.

Downloading needs a network and is done on a login node; finding files in the cache needs none.
"""
