"""pfl-lm: personalized federated fine-tuning of language models with LoRA adapters.

Importing this package is free: nothing heavy is loaded until a verb needs it.
"""

__version__ = "0.1.0"
