"""Training loops: each composes the library into one readable file."""
