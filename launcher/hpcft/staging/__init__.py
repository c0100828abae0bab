"""Models, tokenizers and data ahead of time: what a recipe takes from the hub, fetched and checked.

Fetching needs a network and happens on a login node; looking up what is there needs none.
"""
