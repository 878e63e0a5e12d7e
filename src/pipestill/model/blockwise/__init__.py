"""The task whose student blocks are trained alone, each against its teacher block, and what is found out of it."""
