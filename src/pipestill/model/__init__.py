"""Models as ordered blocks, what crosses their boundaries, what is trained, and what it costs."""
