"""Adapters as others load them, their cards, and the way to the Hub.

Import from the modules: what ``pfl-lm push`` needs must not pull in torch.
"""
