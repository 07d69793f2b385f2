"""A model's weights: import from the formats people have, and the folder of an imported model.

`models` reads and removes imported models, `importer` makes them; the other modules are one source or one format
each. Nothing here imports torch or transformers before a model is really imported.
"""

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, list_models, open_model, remove_model

__all__ = ["ImportedModel", "import_model", "list_models", "open_model", "remove_model"]
