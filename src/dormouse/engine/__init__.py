"""What runs a model: the Engine protocol, its implementations, and the worker process around one engine."""
