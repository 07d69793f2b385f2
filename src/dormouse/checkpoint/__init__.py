"""A model's weights: import from the formats people have, the folder of an imported model, its weights in memory.

`models` reads and removes imported models, `importer` makes them and `writer` stores their weights, `pool` holds these
in memory; the other modules are one source or one format each. Nothing here imports torch or transformers before a
model is really imported, and what a worker needs (`models`, `tensors`, `null_source`) does not import the store.
"""
