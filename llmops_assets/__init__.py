"""The life of a language model as Dagster assets, from spec to archive."""

__version__ = "0.1.0"
