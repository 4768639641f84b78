"""Engines that run a model, steered or not; all honour the Protocol in ``base``."""
