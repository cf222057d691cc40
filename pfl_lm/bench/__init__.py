"""How fast a recipe trains here: against loops written by hand, and against the machine itself."""
