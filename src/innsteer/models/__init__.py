"""Language models: loaded, their parts found by structure, told from one another."""

from innsteer.models.loading import Encoded, LanguageModel, hub_id, load_model, until, unwrapped

__all__ = ["Encoded", "LanguageModel", "hub_id", "load_model", "until", "unwrapped"]
