"""The OpenAI-compatible HTTP face of a node: requests held while models wake, answers streamed, one shape of errors."""
