"""The round loop, who takes part, where clients run, and what is kept of it."""
