"""Models as blocks, tasks that train them, and what is found out of a task before it runs."""
