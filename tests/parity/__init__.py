"""Independent re-implementations, written from the papers and not from our code."""
