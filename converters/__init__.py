"""Converters between Hugging Face models, GGUF files and CCQ files, and the ``ccq-convert`` command."""
