"""The frozen backbone and the adapter in it."""
