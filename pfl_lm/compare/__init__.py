"""Several methods on the same clients: which runs that takes, running them, and reading them."""
