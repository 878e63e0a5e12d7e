"""The task of blockwise training, each student block against its teacher block, and what is found out of it."""
